"""Out of memory: the same samples again in smaller micro-batches, the same mean, and never silently."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import test_member
import torch
from runs import assert_same_bits, die, in_fresh_process
from torch import nn
from torch.utils.data import Dataset

import nbtrain
from nbtrain import accumulation, checkpoint, forward, memory, probe
from nbtrain.stores import FolderStore

NUM_SAMPLES = 28  # of windows of 16, 12: the last micro-batch of an epoch is one of 4


class Told(Dataset[Any]):
    """Samples that say which they are, augmented at random."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((6,), index / NUM_SAMPLES) + 0.1 * torch.randn(6), index % 3


class Count:
    """A part that a step changes."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Short:
    """A step on a device that has room for so many samples, once it has seen some."""

    def __init__(self, room: int, count: Count, *, after: int = 0, dies_at: int = -1) -> None:
        self.room, self.count, self.after, self.dies_at = room, count, after, dies_at
        self.sizes: list[int] = []
        self.seen: list[tuple[int, ...]] = []
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.calls == self.dies_at:
            die()
        self.calls += 1
        x, y = batch
        self.count.value += len(y)
        output = model(x)  # the buffers have moved when the memory is found to be short
        if len(y) > self.room and self.count.value > self.after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        self.sizes.append(len(y))
        self.seen.append(tuple((x[:, 0] * 1e6).round().int().tolist()))
        return nn.functional.cross_entropy(output, y)


def build(room: int = 4, plain: bool = False, valid: bool = False, **changes: Any) -> nbtrain.Task:
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)]
    model = nn.Sequential(*([layers[0], layers[4]] if plain else layers))
    model = model.double() if plain else model
    count = Count()
    step: Any = Short(room, count, **changes)
    return nbtrain.Task(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        train=Doubled() if plain else Told(),
        valid=Told() if valid else None,
        step=step,
        parts={"count": count},
    )


class Doubled(Told):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x, y = super().__getitem__(index)
        return x.double(), y


def session(folder: Path, *, workers: int = 0, epochs: int = 2, **changes: Any) -> nbtrain.Session:
    def made() -> nbtrain.Task:
        return build(**changes)

    return nbtrain.Session(
        "short",
        made,
        store=folder,
        epochs=epochs,
        batch_size=8,
        accumulate=2,
        num_workers=workers,
        warmup_epochs=1,
        save_every=1e-9,
        bar=False,
        device="cpu",
    )


pytestmark = pytest.mark.filterwarnings("ignore:A fresh kernel could not rebuild this session")


def bits(run: nbtrain.Session) -> dict[str, torch.Tensor]:
    """Return all that must be equal: weights, buffers, optimizer, losses, rates, the part."""
    found = {name: value.clone() for name, value in run.task.model.state_dict().items()}
    for index, state in run.task.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    for column in ("step", "epoch", "progress", "loss", "lr"):
        found[f"history.{column}"] = torch.tensor(run.history[column], dtype=torch.float64)
    return found | {"count": torch.tensor(run.task.parts["count"].state_dict()["value"])}


def finish(folder: Path, result: Path, **changes: Any) -> None:
    run = session(folder, **changes)
    run.run()
    torch.save(bits(run), result)


def finished(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    result = folder.with_suffix(".pt")
    assert in_fresh_process(finish, folder, result, **changes) == 0
    return torch.load(result)


# ---- the step stays the step


def test_a_window_without_room_is_done_again_with_the_same_samples_and_the_same_mean(
    tmp_path: Path,
) -> None:
    wide = session(tmp_path / "wide", plain=True, room=8).run()
    short = session(tmp_path / "short", plain=True, room=4).run()
    assert wide.task.step.sizes == [8, 8, 8, 4] * 2
    assert short.task.step.sizes == [4] * 14
    flat = [[x for some in run.task.step.seen for x in some] for run in (wide, short)]
    assert flat[0] == flat[1], "the same samples in the same order, with the same augmentation"
    for one, other in zip(bits(wide).values(), bits(short).values(), strict=True):
        assert (one - other).abs().max() < 1e-12


def test_nothing_of_the_attempt_remains(tmp_path: Path) -> None:
    """Its second micro-step fails: buffers, a part and gradients have moved by then."""
    short = session(tmp_path / "short", after=8).run()
    known = session(tmp_path / "known")
    known._live.rooms = {"cpu": 4}
    known.run()
    assert short.task.step.sizes == [8, *known.task.step.sizes]
    assert short.task.parts["count"].value == known.task.parts["count"].value == 2 * NUM_SAMPLES
    assert_same_bits(bits(short), bits(known))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_short_resumes_to_the_same_bits_wherever_it_is_killed(
    tmp_path: Path, workers: int
) -> None:
    changes = {"room": 3, "after": NUM_SAMPLES + 8}  # in the third step's second micro-step
    whole = finished(tmp_path / "whole", **changes)
    for calls in (0, 4, 6, 7, 9, 14, 20) if workers == 0 else (6, 14):
        folder = tmp_path / f"killed-{calls}"
        died = in_fresh_process(
            finish, folder, tmp_path / "none", workers=workers, dies_at=calls, **changes
        )
        assert died == -signal.SIGKILL
        assert_same_bits(finished(folder, workers=2 - workers, **changes), whole)


def test_the_room_is_remembered_for_the_session_and_in_its_checkpoints(tmp_path: Path) -> None:
    first = session(tmp_path, epochs=1).run()
    assert [(e.step, e.what, e.old, e.new, e.by) for e in first.journal.entries] == [
        (0, "micro_batch", 8, 4, "memory")
    ]
    again = session(tmp_path).run()
    assert again.task.step.sizes == [4] * 7, "it is not tried again"
    assert "exact" in str(again.status()["grade"])
    assert len(again.journal.entries) == 2  # with the epochs
    newest = checkpoint.find([FolderStore(tmp_path)], "short")[0]
    assert checkpoint.state(newest)["rooms"] == {"cpu": 4}


def test_another_device_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session(tmp_path, epochs=1).run()
    monkeypatch.setattr(memory, "device_name", lambda model: "Tesla P100")
    again = session(tmp_path, room=8).run()
    assert again.task.step.sizes == [8, 8, 8, 4]
    assert again._live.rooms == {"cpu": 4}


def test_it_is_said_once_each_time_with_what_changes_and_what_does_not(tmp_path: Path) -> None:
    run = session(tmp_path, room=3).run()
    said = [line for line in run.lines if "out of memory" in line]
    assert said == [
        "out of memory with a micro-batch of 8 on cpu: at most 4 from here on. "
        "The step's samples and their mean stay; BatchNorm sees at most 4 at a time",
        "out of memory with a micro-batch of 4 on cpu: at most 2 from here on. "
        "The step's samples and their mean stay; BatchNorm sees at most 2 at a time",
    ]
    assert run.is_done


def test_a_batch_is_cut_evenly_so_that_no_single_sample_is_left_for_batchnorm() -> None:
    assert accumulation.cuts(33, 16) == [11, 11, 11]
    assert accumulation.cuts(7, 4) == [4, 3]
    assert accumulation.cuts(4, 4) == accumulation.cuts(4, None) == [4]
    for size in range(1, 40):
        for room in range(1, 40):
            found = accumulation.cuts(size, room)
            assert sum(found) == size and max(found) <= room and max(found) - min(found) <= 1
    window = accumulation.plan(23, batch_size=8, accumulate=3, room=3)
    assert window is not None
    assert (window.num_samples, window.num_micro_steps) == (23, 3 + 3 + 3)


# ---- where it does not help


def test_without_room_for_one_sample_it_raises_with_words_and_nothing_is_lost(tmp_path: Path) -> None:
    run = session(tmp_path, plain=True, room=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)1 sample\.\nTake a smaller model.*intact"):
        run.run()
    assert (run.state, run.reason, run.step) == ("failed", "error", 0)
    run.task.step.room = 8
    run.run()
    assert run.is_done and run.step == 4


def test_an_optimizer_without_room_for_its_state_is_no_matter_of_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path, room=8)

    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run.task.optimizer, "step", step)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the optimizer's step"):
        run.run()
    assert run._live.rooms == {}
    monkeypatch.undo()
    assert run.run().is_done


def test_any_other_error_is_the_users_own(tmp_path: Path) -> None:
    run = session(tmp_path)

    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    run.task.step = broken
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run.run()
    assert run.state == "failed" and run._live.rooms == {}


def limited(run: nbtrain.Session, room: int) -> nbtrain.Session:
    """Let validations have no memory for more than so many samples at a time."""
    step = run.task.step

    def scarce(model: nn.Module, batch: Any) -> Any:
        if not model.training and len(batch[0]) > room:
            raise torch.OutOfMemoryError("no memory")
        assert step is not None
        return step(model, batch)

    run.task.step = scarce
    return run


def test_a_validation_without_room_is_done_in_smaller_batches(tmp_path: Path) -> None:
    roomy = session(tmp_path / "roomy", valid=True, room=8).run()
    run = limited(session(tmp_path / "scarce", valid=True, room=8), 3).run()
    assert run.history["loss"] == roomy.history["loss"], "the training does not know of it"
    pairs = list(zip(run.history["valid_loss"], roomy.history["valid_loss"], strict=True))
    assert all(a == b if a is None or b is None else a == pytest.approx(b) for a, b in pairs)
    said = [line for line in run.lines if "in the validation with" in line]
    assert [line.rpartition("at most ")[2] for line in said] == ["4 from here on", "2 from here on"]


def test_a_validation_without_room_for_one_says_so_and_the_epochs_training_is_kept(
    tmp_path: Path,
) -> None:
    run = session(tmp_path, valid=True, room=8)
    step = run.task.step
    limited(run, 0)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run.run()
    assert "in the validation, with a single sample" in caught.value.__notes__[0]
    assert run.state == "failed" and len([x for x in run.lines if "in the validation with" in x]) == 3
    run.task.step = step
    assert run.run().is_done


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (MemoryError(), False),  # python's own, which a smaller micro-batch rarely helps
    ],
)
def test_what_is_a_shortage(error: Exception, is_one: bool) -> None:
    assert memory.is_shortage(error) is is_one


# ---- a loop of one's own, and a population


def test_in_a_loop_of_ones_own_the_error_says_what_to_write_and_that_goes_on(tmp_path: Path) -> None:
    run = session(tmp_path, room=8)

    def no_room(grad: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = run.task.model[4].weight.register_hook(no_room)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        list(iterate(run))
    assert "session.set(batch_size=4, accumulate=4) takes the same samples" in caught.value.__notes__[0]
    hook.remove()
    run.set(batch_size=4, accumulate=4)
    list(iterate(run))
    assert run.is_done and run.task.parts["count"].value == 2 * NUM_SAMPLES


def test_a_loop_of_ones_own_gets_the_micro_batches_that_run_has_found_to_fit(tmp_path: Path) -> None:
    run = session(tmp_path / "own", epochs=1).run()
    assert run.is_done
    run = session(tmp_path / "own")
    assert [len(batch[1]) for batch in iterate(run)] == [4] * 7


def iterate(run: nbtrain.Session) -> Any:
    for batch in run:
        yield batch
        run.update(run.task.run(batch)[0])


def short_member(lr: float = 0.1, momentum: float = 0.9) -> nbtrain.Task:
    task = test_member.build(lr, momentum)
    task.train, task.step, task.metrics = Told(), Short(2, Count()), {}  # its step is all
    return task


def test_a_member_of_a_population_gives_way_too() -> None:
    made = test_member.maker(short_member)
    one = test_member.member(made=made)
    one.begin(test_member.turn(), None, 1)
    assert one.train(lambda what: True, lambda what, took_s: None, time.monotonic)
    assert one.live is not None and one.live.rooms == {"cpu": 2}
    assert [e.what for e in one.live.journal.entries if e.by == "memory"] == ["micro_batch"]
    assert set(one.live.task.step.sizes) == {2}  # type: ignore[union-attr]


def test_a_rehearsed_window_is_cut_as_the_run_would_cut_it(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=1).run()
    run = session(tmp_path)
    seen = probe.seen(run._opened, run._live, trains=True)
    assert len(seen["samples"]) == run.task.step.calls == 4 and run.task.step.sizes == [4] * 4
    run._loop.keeping.load()
    assert run.run().is_done


def test_no_room_for_the_batch_itself_is_given_way_to_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = forward.Forward.moved

    def short(self: forward.Forward, batch: Any) -> Any:
        if torch.is_grad_enabled() and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return moved(self, batch)

    known = session(tmp_path / "known")
    known._live.rooms = {"cpu": 2}
    known.run()
    monkeypatch.setattr(forward.Forward, "moved", short)
    met = session(tmp_path / "met").run()
    assert met._live.rooms == {"cpu": 2}
    assert_same_bits(bits(met), bits(known))
