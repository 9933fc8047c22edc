"""A resumed run is the run: cut anywhere, gone on with in a fresh process, to the same bits."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    EPOCHS,
    MICRO_STEPS,
    Noisy,
    assert_same_bits,
    bits,
    build,
    cut_and_die,
    die,
    finish,
    in_fresh_process,
    run_and_die,
    session,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import nbtrain
from nbtrain import randomness

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no workers": ({}, {}),
    "one worker, then none": ({"num_workers": 1}, {}),
    "none, then two workers": ({}, {"num_workers": 2}),
    "four workers, then one": ({"num_workers": 4}, {"num_workers": 1}),
}


def dropping_last() -> nbtrain.Task:
    task = build()
    task.train = DataLoader(Noisy(), batch_size=3, shuffle=True, drop_last=True)
    return task


def far_ahead() -> nbtrain.Task:
    task = build()
    task.train = DataLoader(
        Noisy(), batch_size=3, shuffle=True, num_workers=2, prefetch_factor=5, persistent_workers=True
    )
    return task


def weighted() -> nbtrain.Task:
    task = build()
    sampler = WeightedRandomSampler(torch.arange(23).float() + 1, 23)
    task.train = DataLoader(Noisy(), batch_size=3, sampler=sampler)
    return task


def stepwise() -> nbtrain.Task:
    """A schedule of torch's own, that the user steps, as a part."""
    task = build()
    task.parts = {"schedule": torch.optim.lr_scheduler.StepLR(task.optimizer, 2, 0.5)}
    return task


BUILDS = {"drop_last": dropping_last, "far ahead": far_ahead, "weighted": weighted}


def whole(tmp_path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    result = tmp_path / "whole.pt"
    assert in_fresh_process(finish, tmp_path / "whole", result, **changes) == 0
    return torch.load(result)


def finished(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    result = folder.with_suffix(".pt")
    assert in_fresh_process(finish, folder, result, **changes) == 0
    return torch.load(result)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_cut_at_any_micro_step_ends_in_the_same_bits(tmp_path: Path, way: str) -> None:
    before, after = WAYS[way]
    expected = whole(tmp_path)
    for micro_step in range(MICRO_STEPS + 1):
        folder = tmp_path / f"cut-{micro_step}"
        died = in_fresh_process(cut_and_die, folder, micro_step, **before)
        assert died == -signal.SIGKILL
        assert_same_bits(finished(folder, **after), expected)


@pytest.mark.parametrize("name", BUILDS)
def test_a_loader_that_is_taken_over_resumes_exactly(tmp_path: Path, name: str) -> None:
    expected = whole(tmp_path, build=BUILDS[name])
    for micro_step in (0, 4, 7, 8, 11):
        folder = tmp_path / f"cut-{micro_step}"
        died = in_fresh_process(cut_and_die, folder, micro_step, build=BUILDS[name])
        assert died == -signal.SIGKILL
        assert_same_bits(finished(folder, build=BUILDS[name], num_workers=0), expected)


def test_run_killed_in_any_call_of_the_loss_validation_too_ends_in_the_same_bits(
    tmp_path: Path,
) -> None:
    expected = whole(tmp_path)
    for calls in range(2 * MICRO_STEPS):  # a validation has as many batches as the training
        folder = tmp_path / f"cut-{calls}"
        assert in_fresh_process(run_and_die, folder, calls) == -signal.SIGKILL
        assert_same_bits(finished(folder), expected)


def test_a_resume_of_a_resume_of_a_resume_ends_in_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    for micro_step, workers in ((1, 0), (4, 2), (3, 1), (4, 0)):
        died = in_fresh_process(cut_and_die, folder, micro_step, num_workers=workers)
        assert died == -signal.SIGKILL
    run = session(folder)
    assert run.stage == 5
    assert_same_bits(finished(folder), whole(tmp_path))


def test_what_another_cell_draws_in_between_changes_nothing(tmp_path: Path) -> None:
    run = session(tmp_path / "disturbed")
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        torch.rand(run.step + 1)
        random.seed(17)
    assert_same_bits(bits(run), whole(tmp_path))


class Told(Dataset[Any]):
    """Samples that say which they are, and what their augmentation drew."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


def seen(folder: Path, **changes: Any) -> list[tuple[int, float]]:
    """Return the samples of a run in their order, reopened after every third step."""
    found: list[tuple[int, float]] = []
    sizes = iter(changes.pop("sizes"))
    while True:
        batch_size, accumulate = next(sizes)
        model = nn.Linear(1, 1)
        run = nbtrain.Session(
            "told",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            train=Told(),
            store=folder,
            epochs=EPOCHS,
            batch_size=batch_size,
            accumulate=accumulate,
            bar=False,
            num_workers=0,
        )
        for indices, drawn in run:
            found += zip(indices.tolist(), drawn.tolist(), strict=True)
            run.update(model(drawn.float()[:, None]).mean())
            if run.step % 3 == 0 and not run.is_done and changes["cuts"]:
                run.stop()
        if run.is_done:
            return found


def test_batch_size_and_accumulation_may_change_between_stages(tmp_path: Path) -> None:
    expected = seen(tmp_path / "whole", sizes=[(3, 3)], cuts=False)
    cut = seen(tmp_path / "cut", sizes=[(3, 3), (5, 1), (2, 2), (4, 1), (7, 2)] * 9, cuts=True)
    assert sorted(index for index, _ in expected[:23]) == list(range(23))
    assert cut == expected


def edit_live(folder: Path, result: Path, cuts: bool) -> None:
    """Change settings by hand at three steps, cut or not."""
    edits: dict[int, dict[str, Any]] = {
        1: {"accumulate": 1, "warmup_epochs": 2},
        4: {"lr": 0.01},
        6: {"batch_size": 5, "accumulate": 2},
    }
    run = session(folder, epochs=3)
    while not run.is_done:
        made = -1
        for batch in run:
            if run.step in edits and made != run.step:
                made = run.step
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            if run.step in edits:
                run.set(**edits.pop(run.step))
                if cuts:
                    run.stop()
        run = session(folder, epochs=3) if cuts else run
    torch.save(bits(run), result)


def test_a_run_with_live_edits_replays_to_the_same_bits(tmp_path: Path) -> None:
    for name, cuts in (("whole", False), ("cut", True)):
        result = tmp_path / f"{name}.pt"
        assert in_fresh_process(edit_live, tmp_path / name, result, cuts) == 0
    assert_same_bits(torch.load(tmp_path / "cut.pt"), torch.load(tmp_path / "whole.pt"))


def step_by_hand(folder: Path, result: Path, until: int) -> None:
    """Train with a schedule of torch's own; die in the body of a step's last micro-step."""
    run = session(folder, build=stepwise, warmup_epochs=0, decay="constant", save_every=1e-9)
    for batch in run:
        loss, _, _ = run.task.run(batch)
        before = run.step
        run.update(loss)
        if run.step > before:
            run.task.parts["schedule"].step()
        if run.step == until:
            die()
    torch.save(bits(run), result)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_schedule_of_torchs_own_resumes_as_a_part(tmp_path: Path) -> None:
    expected = tmp_path / "whole.pt"
    assert in_fresh_process(step_by_hand, tmp_path / "whole", expected, -1) == 0
    rates = torch.load(expected)["history.lr"]
    assert len(set(rates.tolist())) == 3
    for until in range(1, 6):
        folder, result = tmp_path / f"cut-{until}", tmp_path / f"{until}.pt"
        assert in_fresh_process(step_by_hand, folder, result, until) == -signal.SIGKILL
        assert in_fresh_process(step_by_hand, folder, result, -1) == 0
        assert_same_bits(torch.load(result), torch.load(expected))


def test_training_in_another_thread_with_workers_gives_the_same_bits(tmp_path: Path) -> None:
    run = session(tmp_path / "threaded", num_workers=2)
    thread = threading.Thread(target=run.run)
    thread.start()
    thread.join(60)
    assert run.is_done
    assert_same_bits(bits(run), whole(tmp_path))


def test_accumulation_alone_gives_the_bits_of_a_plain_loop_when_it_is_one(tmp_path: Path) -> None:
    run = session(tmp_path, accumulate=1, warmup_epochs=0, decay="constant", epochs=1)
    plain = build()
    plain.model.load_state_dict(run.task.model.state_dict())
    for step, batch in enumerate(run):
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        randomness.seed(0, "step", step, 0)
        plain.optimizer.zero_grad()
        nn.functional.cross_entropy(plain.model(batch[0]), batch[1]).backward()
        plain.optimizer.step()
    for one, other in zip(run.task.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
