"""Every option at once, cut anywhere: what is exact alone is exact beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Noisy, assert_same_bits, bits, die, in_fresh_process, session
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nbtrain

ROOM = 2  # of the device, in samples; a micro-batch has three
CALLS = (4, 30, 61, 100)  # of the step: in a window, in an epoch, in a validation


class Scarce:
    """A step that logs by name, and finds no memory for more than a few samples."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, target = batch
        if model.training and len(x) > ROOM:
            raise torch.OutOfMemoryError("no memory")
        self._left -= 1
        if not self._left:
            die()
        output = model(x)
        loss = nn.functional.cross_entropy(output, target, label_smoothing=0.1)
        return {"loss": loss, "spread": output.std()}


def build(calls: int = -1, fresh: tuple[str, ...] = ()) -> nbtrain.Task:
    body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.ReLU())
    stem = nn.Linear(6, 6).requires_grad_(False)
    model = nn.Sequential(stem, body, nn.Linear(8, 3))
    model.append(nn.Linear(3, 3, bias=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    return nbtrain.Task(
        model=model,
        optimizer=optimizer,
        train=Noisy(),
        valid=Noisy(),
        step=Scarce(calls),
        ema=AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
        fresh=fresh,
    )


def opened(folder: Path, calls: int = -1) -> nbtrain.Session:
    def made() -> nbtrain.Task:
        return build(calls)

    return session(
        folder,
        build=made,
        warmup_epochs=0,
        decay="constant",
        precision="fp16",
        clip_norm=0.5,
        epochs=5,
        patience=50,
        validate_every="2 steps",
        save_every=1e-9,
    )


def train(folder: Path, result: Path, calls: int) -> None:
    run = opened(folder, calls).run()
    torch.save(bits(run), result)


def test_all_at_once_ends_in_the_same_bits_wherever_it_is_cut(tmp_path: Path) -> None:
    assert in_fresh_process(train, tmp_path / "whole", tmp_path / "whole.pt", -1) == 0
    expected = torch.load(tmp_path / "whole.pt")
    assert len(set(expected["history.lr"].tolist())) > 1
    for calls in CALLS:
        folder, result = tmp_path / f"cut-{calls}", tmp_path / f"{calls}.pt"
        assert in_fresh_process(train, folder, result, calls) == -9
        assert in_fresh_process(train, folder, result, -1) == 0
        assert_same_bits(torch.load(result), expected)


def test_a_range_test_leaves_all_of_it_as_it_was(tmp_path: Path) -> None:
    expected = bits(opened(tmp_path / "whole").run())
    run = opened(tmp_path / "tried")

    def stop(*_: Any) -> None:
        if run.step == 4:
            run.stop()

    stops = run.task.model.register_forward_pre_hook(stop)
    assert run.run().state == "stopped"
    stops.remove()
    found = run.find_lr(steps=10)
    assert len(found.losses) > 2
    assert_same_bits(bits(run.run()), expected)


class Counting(torch.utils.data.IterableDataset[Any]):
    """A stream with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return 23

    def __iter__(self) -> Any:
        while self.at < 23:
            self.at += 1
            yield torch.full((6,), self.at / 23) + 0.1 * torch.randn(6), self.at % 3
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def streamed() -> nbtrain.Task:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Counting())


@pytest.mark.parametrize("steps", [10, 25])
def test_a_range_test_leaves_a_stream_where_it_was(tmp_path: Path, steps: int) -> None:
    expected = bits_without_validation(session(tmp_path / "whole", build=streamed).run())
    run = session(tmp_path / "tried", build=streamed)
    for batch in run:
        loss, n, _ = run.task.run(batch)
        run.update(loss, n=n)
        if run.step == 1:
            run.stop()
    run.find_lr(steps=steps)
    assert_same_bits(bits_without_validation(run.run()), expected)


def bits_without_validation(run: nbtrain.Session) -> dict[str, torch.Tensor]:
    found = {f"model.{k}": v.clone() for k, v in run.task.model.state_dict().items()}
    return found | {f"history.{c}": torch.tensor(run.history[c]) for c in ("step", "loss", "lr")}


def taught() -> nbtrain.Task:
    """A teacher that is frozen, and moved by the step itself."""
    model = nn.ModuleDict({"student": nn.Linear(6, 3), "teacher": nn.Linear(6, 3)})
    model["teacher"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["student"].parameters(), lr=0.1)

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        student, teacher = model["student"], model["teacher"]  # type: ignore[index]
        with torch.no_grad():
            teacher.weight.lerp_(student.weight, 0.2)
        return (student(batch[0]) - teacher(batch[0])).square().mean()

    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), step=step)


@pytest.mark.parametrize("micro_step", [1, 4, 8])
def test_a_teacher_that_moves_goes_back_with_its_window(tmp_path: Path, micro_step: int) -> None:
    expected = bits_without_validation(session(tmp_path / "whole", build=taught).run())
    run = session(tmp_path / "cut", build=taught)
    for number, batch in enumerate(run):
        loss, n, _ = run.task.run(batch)
        if number == micro_step:
            break
        run.update(loss, n=n)
    assert_same_bits(bits_without_validation(session(tmp_path / "cut", build=taught).run()), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patience": 2}, r"patience= waits for validations, and there are none. Give Task\(valid=\)"),
        ({"decay": "plateau"}, r'decay="plateau" waits for validations'),
        ({"metric": "acuracy"}, "metric='acuracy' is not among what the validation gives: valid_loss"),
    ],
)
def test_what_no_validation_will_answer_is_refused_before_any_training(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ValueError, nbtrain.NbtrainError), match=said):
        session(tmp_path, build=unwatched, **changes).run()
    assert session(tmp_path, build=unwatched).step == 0


def unwatched() -> nbtrain.Task:
    model = nn.Linear(6, 3)
    return nbtrain.Task(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), train=Noisy())


def watched(lr: float = 0.1) -> nbtrain.Task:
    task = unwatched()
    task.valid = Noisy()
    return task


def test_a_population_takes_the_whole_of_a_schedule(tmp_path: Path) -> None:
    population = nbtrain.Population(
        "herd",
        watched,
        space={"warmup_epochs": [0, 1]},
        members=2,
        interval="1 epoch",
        epochs=2,
        decay="restarts",
        period=0.5,
        floor=0.1,
        store=tmp_path,
        bar=False,
        device="cpu",
        num_workers=0,
    )
    assert population.run().is_done
    assert population.members[0].journal.settings["period"] == 0.5
