"""A mistake is told where it is made, with what is wrong and a way out, and costs nothing.

After every error here the files are what they were, and once the mistake is mended the run goes on
to the very bits of a run in which it was never made.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MICRO_STEPS, Noisy, assert_same_bits, bits, build, session
from torch import nn
from torch.utils.data import Subset

import nbtrain
from nbtrain import (
    BudgetError,
    CheckpointError,
    DataError,
    LossError,
    SessionError,
    StoreError,
    TrustError,
    checkpoint,
    parts,
)
from nbtrain.errors import RecipeError, TaskError
from nbtrain.stores import FolderStore, MemoryStore


def fields(**changes: Any) -> dict[str, Any]:
    """Return the fields of the tiny task, always with the same first weights."""
    torch.manual_seed(0)
    return vars(build()) | changes


def opened(folder: Any, **changes: Any) -> nbtrain.Session:
    """Open the tiny run from fields, as for a loop of one's own."""
    task = fields(**{name: changes.pop(name) for name in [*changes] if name in fields()})
    return session(folder, build=None, **(task | changes))


def train(run: nbtrain.Session, until: int | None = None) -> None:
    """Train in a loop of one's own, to a step or to the end."""
    for batch in run:
        if run.step == until:
            break
        loss, _, _ = run.task.run(batch)
        run.update(loss)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def aligned(there: object, here: object) -> str:
    return f"\n  in checkpoint: {there}\n  in session:    {here}\n"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the bits of a run without any mistake."""
    return bits(opened(tmp_path_factory.mktemp("whole")).run())


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Return the folder of a run cut in its second epoch."""
    folder = tmp_path / "begun"
    train(opened(folder), until=4)
    return folder


# ------------------------------------------------------------------------------ what a cell says

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "accumulate=0": ({}, "a whole number from 1 up"),
    "batch_size=-1": ({}, "a whole number from 1 up"),
    "batch_size=0": ({}, "a whole number from 1 up"),
    "batch_size=2.5": ({}, "a whole number from 1 up"),
    "epochs=0": ({}, "a whole number from 1 up, or None"),
    "decay='sawtooth'": ({}, "Use one of: constant"),
    "warmup='steep'": ({}, "Use one of: linear"),
    "warmup_epochs=-1": ({}, "0 or more"),
    "keep=1": ({}, "from 2 up"),
    "keep='3'": ({}, "from 2 up"),
    "seed='a'": ({}, "a whole number"),
    "seed=1.5": ({}, "a whole number"),
    "clip_norm=-1.0": ({}, "above 0, or None"),
    "clip_norm=0": ({}, "above 0, or None"),
    "num_workers=-1": ({}, "from 0 up"),
    "deterministic=1": ({}, "True or False"),
    "base_lr=0.1": ({}, "go together"),
    "base_lr=-0.1": ({"base_batch": 32}, "above 0"),
    "budget='soon'": ({}, '"9h"'),
    "budget=0": ({}, "above zero"),
    "save_every='often'": ({}, '"9h"'),
    "store=5": ({}, "a folder, a URL"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_an_argument_that_makes_no_sense_is_refused_with_its_value(
    begun: Path, what: str, expected: dict[str, torch.Tensor]
) -> None:
    others, way_out = ARGUMENTS[what]
    name, value = what.split("=")
    here = files(begun)
    with pytest.raises(ValueError, match=re.escape(way_out)) as caught:
        opened(begun, **others, **{name: eval(value)})
    words = str(caught.value)
    assert name in words or "duration" in words
    assert value in words or "go together" in words
    assert files(begun) == here
    assert_same_bits(bits(opened(begun).run()), expected)


@pytest.mark.parametrize(
    "name", ["../tiny", "a/b", "", ".hidden", "-x", "a b", "x" * 101, "ä", "x\n", None, 5]
)
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match=r"^name=.* is no name for a session"):
        nbtrain.Session(name, store=tmp_path, **fields())
    with pytest.raises(ValueError, match=r"is no name|no session"):
        nbtrain.resume(name or "", store=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_argument_is_told_before_build_is_called(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate=0"):
        session(tmp_path, build=never, accumulate=0)


def never() -> nbtrain.Task:
    pytest.fail("build was called")


def test_a_duration_may_be_a_timedelta(tmp_path: Path) -> None:
    run = opened(tmp_path, budget=timedelta(hours=9), save_every=timedelta(minutes=5)).run()
    assert run.is_done


def test_a_field_that_no_task_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no argument modle=\. Did you mean model=\?"):
        opened(tmp_path, modle=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Give build, or at least model="):
        nbtrain.Session("tiny", store=tmp_path, model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"^loss belongs into the Task that build returns"):
        session(tmp_path, loss=nn.MSELoss())
    with pytest.raises(ValueError, match=r"^loss, valid belong into the Task"):
        session(tmp_path, loss=nn.MSELoss(), valid=Noisy())
    assert not list(tmp_path.iterdir())


def test_a_rate_is_not_an_argument_and_it_is_said_whose_it_is(tmp_path: Path, begun: Path) -> None:
    words = (
        r"no argument lr=\. The rate is the optimizer's, in build; or session\.set\(lr=\.\.\.\) from"
    )
    with pytest.raises(ValueError, match=words):
        session(tmp_path, lr=0.1)
    with pytest.raises(ValueError, match=words):
        opened(begun, lr=0.1)
    assert not list((tmp_path / "tiny").glob("*"))
    session(tmp_path / "built", epochs=1, decay="constant").save()
    with pytest.raises(ValueError, match=words):
        nbtrain.resume("tiny", store=tmp_path / "built", trust_code=True, lr=0.1)
    with pytest.raises(ValueError, match=r"The rate is the optimizer's, in build; or of the space"):
        nbtrain.Population("herd", build, members=2, interval=1, space={}, lr=0.1)


def test_a_hint_is_of_a_word_that_is_alike(begun: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^There is no argument foo=\. See help\(nbtrain\.Session\)\.$"
    ):
        opened(begun, foo=1)
    run = opened(begun)
    with pytest.raises(ValueError, match=r"^metric cannot be set\. There are: epochs"):
        run.set(metric="accuracy")
    with pytest.raises(ValueError, match=r"Did you mean batch_size\? There"):
        run.set(batchsize=2)


def test_a_change_that_makes_no_sense_changes_nothing(begun: Path) -> None:
    run = opened(begun)
    settings, entries = dict(run.journal.settings), list(run.journal.entries)
    for changes, words in (
        ({"nonsense": 1}, "nonsense cannot be set. There are: epochs"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": 2, "batch_size": -1}, "batch_size=-1"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"accumulate": 2, "budget": "soon"}, "soon"),
        ({"accumulate": 0, "budget": "1h"}, "accumulate=0"),
    ):
        limit_s = run.budget.limit_s
        with pytest.raises(ValueError, match=words):
            run.set(**changes)
        assert (run.journal.settings, run.journal.entries) == (settings, entries)
        assert run.budget.limit_s == limit_s


# -------------------------------------------------------------------------- the clock, the place


def test_a_budget_that_is_over_already_is_told_at_once(begun: Path) -> None:
    here = files(begun)
    with pytest.raises(BudgetError, match=r"(?s)budget of 1h00m is over already: 2h00m.*budget=None"):
        opened(begun, budget="1h", started_at=time.time() - 7200)
    assert files(begun) == here
    assert opened(begun, budget="3h", started_at=time.time() - 7200).step == 4


def test_a_place_below_a_regular_file_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    asked: list[int] = []
    run = opened(tmp_path / "file" / "store", train=Counted(asked))
    with pytest.raises(StoreError, match=r"(?s)Writing tiny/.*file/store.*choose another place"):
        run.run()
    assert (run.state, run.step, asked) == ("failed", 0, [])
    assert files(tmp_path) == {"file": b"mine"}


def test_checkpoints_that_lie_behind_links_are_no_new_session(begun: Path, tmp_path: Path) -> None:
    for path in list((begun / "tiny").iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    for open_it in (lambda: opened(begun), lambda: nbtrain.resume("tiny", store=begun)):
        with pytest.raises(StoreError, match="links are not followed"):
            open_it()


def test_a_place_that_is_read_only_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor]
) -> None:
    asked: list[int] = []
    run = opened(tmp_path / "store", train=Counted(asked))

    def refuse(path: Any, *_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"(?s)Read-only file system.*choose another place"):
        run.run()
    assert (run.state, run.step, asked) == ("failed", 0, [])
    monkeypatch.undo()
    assert_same_bits(bits(run.run()), expected)


class Counted(Noisy):
    """Data that tell what was asked of them."""

    def __init__(self, asked: list[int]) -> None:
        self.asked = asked

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        return super().__getitem__(index)


# -------------------------------------------------------------------- what no longer fits together


def net(width: int = 8, classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, width),
        nn.BatchNorm1d(width),
        nn.Dropout(0.3),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def of(model: nn.Module, kind: Any = torch.optim.AdamW, split: int = 0) -> dict[str, Any]:
    """Return a model with its optimizer."""
    held = list(model.parameters())
    groups = [{"params": held[:split]}, {"params": held[split:]}] if split else held
    return {"model": model, "optimizer": kind(groups, lr=0.05)}


def renamed() -> nn.Module:
    model = nn.Sequential()
    for name, module in zip("abcde", net(), strict=True):
        model.add_module(name, module)
    return model


MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str, object, object]] = {
    "a shorter data set": (lambda: {"train": Subset(Noisy(), range(20))}, DataError, "length", 23, 20),
    "another seed": (lambda: {"seed": 1}, CheckpointError, "seed has changed", 0, 1),
    "a wider model": (
        lambda: of(net(width=16)),
        CheckpointError,
        "'0.weight'",
        "(8, 6) float32",
        "(16, 6) float32",
    ),
    "another head": (
        lambda: of(net(classes=4)),
        CheckpointError,
        "'4.weight'",
        "(3, 8) float32",
        "(4, 8) float32",
    ),
    "other names": (lambda: of(renamed()), CheckpointError, "'0.weight'", "(8, 6) float32", "absent"),
    "one module more": (
        lambda: of(nn.Sequential(*net(), nn.Linear(3, 3))),
        CheckpointError,
        "'5.weight'",
        "absent",
        "(3, 3) float32",
    ),
    "another dtype": (
        lambda: of(net().double()),
        CheckpointError,
        "'0.weight'",
        "(8, 6) float32",
        "(8, 6) float64",
    ),
    "another optimizer": (
        lambda: of(net(), torch.optim.SGD),
        CheckpointError,
        "optimizer is of another class",
        "AdamW",
        "SGD",
    ),
    "other groups": (
        lambda: of(net(), split=2),
        CheckpointError,
        "groups hold other numbers",
        [6],
        [2, 4],
    ),
    "a part more": (
        lambda: {"parts": {"ema": nn.Linear(1, 1)}},
        CheckpointError,
        "parts are others",
        [],
        ["ema"],
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_no_longer_fits_the_checkpoint_is_told_with_both_sides(
    begun: Path, what: str, expected: dict[str, torch.Tensor]
) -> None:
    make, error, words, there, here = MISFITS[what]
    before = files(begun)
    changes = make()
    model = changes.get("model")
    weights = {n: v.clone() for n, v in model.state_dict().items()} if model else {}
    with pytest.raises(error, match=words) as caught:
        opened(begun, **changes)
    assert aligned(there, here) in str(caught.value)
    assert str(caught.value).endswith(
        "Build the session as it was, or give the new one another name; the checkpoint is untouched."
    )
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert files(begun) == before
    assert_same_bits(bits(opened(begun).run()), expected)


def test_a_part_of_another_name_is_told_with_both_names(tmp_path: Path) -> None:
    opened(tmp_path, parts={"ema": nn.Linear(1, 1)}).run()
    with pytest.raises(CheckpointError, match="The parts are others") as caught:
        opened(tmp_path, parts={"average": nn.Linear(1, 1)})
    assert aligned(["ema"], ["average"]) in str(caught.value)


class Unsavable:
    """A part whose state only pickle could hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"made": object()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


def test_a_part_that_cannot_be_saved_is_told_before_the_first_step(tmp_path: Path) -> None:
    asked: list[int] = []
    run = opened(tmp_path / "store", parts={"odd": Unsavable()}, train=Counted(asked))
    with pytest.raises(CheckpointError, match=r"parts/odd/made is a builtins\.object.*without pickle"):
        run.run()
    assert (run.step, asked) == (0, [])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("open_it", [opened, lambda folder: nbtrain.resume("tiny", store=folder)])
def test_a_session_of_a_newer_format_is_told_and_left_alone(
    begun: Path, monkeypatch: pytest.MonkeyPatch, open_it: Callable[[Path], Any]
) -> None:
    newest = checkpoint.find([FolderStore(begun)], "tiny")[0]
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    loaded = checkpoint.load(newest)
    loaded.number += 1
    checkpoint.commit(FolderStore(begun), "tiny", loaded)
    monkeypatch.undo()
    here = files(begun)
    with pytest.raises(
        CheckpointError, match=r"(?s)written by a newer nbtrain.*pip install -U"
    ) as caught:
        open_it(begun)
    assert aligned("format 7", "format 2") in str(caught.value)
    assert files(begun) == here


# ------------------------------------------------------------------------------- a loss that is spoilt


class Spoiling:
    """Cross entropy, but for one call of it; validation is not counted."""

    def __init__(self, at: int, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.at, self.spoil, self.calls = at, spoil, 0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(output, target)
        self.calls += torch.is_grad_enabled()
        return self.spoil(loss) if self.calls == self.at else loss


def nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def nan_gradient(loss: torch.Tensor) -> torch.Tensor:
    return loss + (loss * 0.0).sqrt()


def newest_weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.find([FolderStore(folder)], "tiny")[0]).model


def assert_back_at_a_good_checkpoint(run: nbtrain.Session, folder: Path, before: int) -> None:
    assert (run.state, run.reason) == ("failed", "error")
    assert run.step < before
    kept = newest_weights(folder)
    for name, value in run.task.model.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, kept[name]), name


# Micro-steps 1..8 are the steps 1..3 of the first epoch, 9..16 the steps 4..6 of the second.
SPOILT = {"first": (1, 1), "middle": (5, 2), "end of an epoch": (8, 3), "last": (MICRO_STEPS, 6)}


@pytest.mark.parametrize("where", SPOILT)
@pytest.mark.parametrize("how", ["run", "own loop"])
def test_a_loss_that_is_nan_stops_the_run_at_its_last_good_checkpoint(
    tmp_path: Path, where: str, how: str, expected: dict[str, torch.Tensor]
) -> None:
    call, step = SPOILT[where]
    run = opened(tmp_path, loss=Spoiling(call, nan))
    with pytest.raises(
        LossError, match=rf"The loss is nan at step {step} .*learning rate 0\.\d+"
    ) as told:
        run.run() if how == "run" else train(run)
    assert "session.set(lr=0.017)" in str(told.value)
    del told
    assert_back_at_a_good_checkpoint(run, tmp_path, step)
    assert_same_bits(bits(run.run()), expected)


def test_after_a_nan_the_rate_can_be_lowered_and_the_run_goes_on(tmp_path: Path) -> None:
    run = opened(tmp_path, loss=Spoiling(12, nan))
    with pytest.raises(LossError):
        run.run()
    run.set(lr=0.01)
    run.run()
    assert run.is_done and run.step == 6
    assert [(e.step, e.what, e.new) for e in run.journal.entries] == [(3, "lr", 0.01)]
    assert max(run.history["lr"][3:]) <= 0.01 < max(run.history["lr"][:3])


def test_a_save_by_hand_right_after_a_nan_keeps_nothing_of_it(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = opened(tmp_path, accumulate=1, loss=Spoiling(2, nan))

    def loop() -> None:
        for batch in run:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            run.save()

    with pytest.raises(LossError, match="at step 2"):
        loop()
    run._loop.leave()
    assert (run.state, run.step) == ("stopped", 1)
    assert all(value.isfinite().all() for value in newest_weights(tmp_path).values())


def test_a_loop_closed_right_after_a_nan_tells_it(tmp_path: Path) -> None:
    run = opened(tmp_path, accumulate=1, loss=Spoiling(2, nan))
    batches = iter(run)
    for _ in range(2):
        loss, _, _ = run.task.run(next(batches))
        run.update(loss)
    with pytest.raises(LossError, match="at step 2"):
        batches.close()
    assert_back_at_a_good_checkpoint(run, tmp_path, 2)


@pytest.mark.parametrize("where", SPOILT)
def test_weights_that_a_gradient_spoilt_are_never_saved(
    tmp_path: Path, where: str, expected: dict[str, torch.Tensor]
) -> None:
    call, step = SPOILT[where]
    run = opened(tmp_path, save_every=1e-9, loss=Spoiling(call, nan_gradient))
    with pytest.raises(LossError, match=rf"not finite at step {step} ") as told:
        run.run()
    del told
    assert_back_at_a_good_checkpoint(run, tmp_path, step)
    assert_same_bits(bits(run.run()), expected)


def test_weights_spoilt_by_the_last_step_before_a_stop_are_never_saved(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = opened(tmp_path, loss=Spoiling(5, nan_gradient))

    def loop() -> None:
        for batch in run:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            if run.step == 2:
                run.stop()

    with pytest.raises(LossError, match=r"The weights '0\.weight' are not finite at step 2"):
        loop()
    assert_back_at_a_good_checkpoint(run, tmp_path, 2)
    assert_same_bits(bits(run.run()), expected)


def test_a_weight_is_seen_that_alone_is_not_finite() -> None:
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2).bfloat16()])
    model.empty = nn.Parameter(torch.empty(0))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.finfo(p.dtype).max)  # the largest are no fault
    assert parts.spoilt(model) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        for name, p in [item for item in model.named_parameters() if item[1].numel()]:
            whole = p.detach().clone()
            p.data.view(-1)[-1] = value
            assert parts.spoilt(model) == name
            p.requires_grad_(False)
            assert parts.spoilt(model) is None  # frozen: no step has made it so
            p.requires_grad_(True).data.copy_(whole)
    assert parts.spoilt(nn.Dropout()) is None


def test_a_validation_loss_that_is_nan_is_no_score_and_costs_nothing(tmp_path: Path) -> None:
    epochs = iter([float("nan"), 1.0])

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        found = nn.functional.cross_entropy(output, target)
        return found if torch.is_grad_enabled() else found * current[0]

    current = [next(epochs)]
    run = opened(tmp_path, loss=loss)
    for epoch in run.epochs():
        if epoch.number == 1:
            current[0] = next(epochs)
        for batch in epoch:
            run.update(run.task.run(batch)[0])
        run.log(accuracy=float("nan"))
        run.save()  # with a value that strict JSON does not know
    assert run.is_done
    found = checkpoint.find([FolderStore(tmp_path)], "tiny")
    scores = [m.facts["valid_loss"] for m in found if m.facts["valid_loss"] is not None]
    assert scores == [run.history.epochs[1]["valid_loss"]]
    again = opened(tmp_path)
    assert_same_bits(bits(again), bits(run))
    again.best()


# -------------------------------------------------------------------------------------- what build is


def returns_a_model() -> Any:
    return nn.Linear(1, 1)


def returns_nothing() -> Any:
    return None


def needs_arguments(lr: float, width: int) -> Any:
    return build()


def raises() -> Any:
    raise FileNotFoundError("data/train.csv")


BUILDS: dict[str, tuple[Any, type[Exception], str]] = {
    "a model": (returns_a_model, TaskError, r"returned a torch.*Linear.*nbtrain\.Task\("),
    "None": (returns_nothing, TaskError, r"returned a None.*nbtrain\.Task\("),
    "arguments": (needs_arguments, TaskError, r"build needs lr, width.*Give each a default"),
    "a lambda": (lambda: build(), RecipeError, r"(?s)build is a lambda.*def build\(\)"),
    "a Task": (build(), RecipeError, r"(?s)build is .*Task.*def build\(\)"),
    "an error of its own": (raises, FileNotFoundError, r"data/train\.csv"),
}


@pytest.mark.parametrize("what", BUILDS)
def test_a_build_that_cannot_be_used_is_told_at_once(tmp_path: Path, what: str) -> None:
    make, error, words = BUILDS[what]
    with pytest.raises(error, match=words):
        session(tmp_path, build=make)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ data that raise


class Broken(Noisy):
    """Data of which one sample cannot be read while a file is there."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7 and self.mark.exists():
            raise OSError("truncated JPEG")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_raises_is_named_and_once_mended_the_run_goes_on_exactly(
    tmp_path: Path, num_workers: int, expected: dict[str, torch.Tensor]
) -> None:
    mark = tmp_path / "mark"
    run = opened(tmp_path / "store", train=Broken(mark), num_workers=num_workers)
    train(run, until=3)  # the second epoch, in which the sample comes in another place
    mark.touch()
    with pytest.raises(
        DataError, match=r"(?s)OSError: truncated JPEG.* index 7 \(epoch 1, position "
    ) as told:
        run.run()
    assert "in the data set" in str(told.value.__cause__)
    assert "nothing is lost" in str(told.value)
    assert run.state == "failed" and 3 <= run.step < 6
    mark.unlink()
    assert_same_bits(bits(run.run()), expected)


@pytest.mark.parametrize("data", [[], iter([1]), {1, 2}])
def test_data_without_positions_are_refused_at_once(tmp_path: Path, data: Any) -> None:
    with pytest.raises(DataError, match="train: "):
        opened(tmp_path, train=data)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- two sessions of one name


def test_a_newer_session_retires_the_older_one(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    older = opened(tmp_path)
    train(older, until=2)
    newer = opened(tmp_path)
    for use in (older.run, lambda: train(older)):
        with pytest.raises(SessionError, match="A newer session 'tiny' was made in this kernel"):
            use()
    assert_same_bits(bits(newer.run()), expected)


def test_a_loop_that_an_error_left_behind_is_saved_before_the_newer_one_opens(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    older = opened(tmp_path)
    batches = iter(older)  # held, as the traceback of a cell holds it
    for batch in batches:
        if older.step == 4:
            break
        older.update(older.task.run(batch)[0])
    newer = opened(tmp_path)
    assert newer.step == 4
    assert older.state == "stopped"
    with pytest.raises(SessionError):
        next(batches)
    numbers = [m.number for m in checkpoint.find([FolderStore(tmp_path)], "tiny")]
    assert len(set(numbers)) == len(numbers)
    assert_same_bits(bits(newer.run()), expected)


def test_a_session_that_trains_in_another_thread_refuses_a_second(
    tmp_path: Path,
) -> None:
    trains, let = threading.Event(), threading.Event()
    run = opened(tmp_path)

    def wait(*_: Any) -> None:
        trains.set()
        assert let.wait(60)

    run.task.model.register_forward_pre_hook(wait)
    thread = threading.Thread(target=run.run)
    thread.start()
    assert trains.wait(60)
    try:
        with pytest.raises(SessionError, match=r"'tiny' is training in this kernel already\. Stop it"):
            opened(tmp_path)
        with pytest.raises(SessionError, match=r"'tiny' is training already\. Stop it"):
            run.run()
    finally:
        let.set()
        thread.join(60)
    assert run.is_done


def test_sessions_of_other_names_and_places_do_not_mind_each_other(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "one"), opened(tmp_path / "other")
    third = nbtrain.Session("third", store=tmp_path / "one", epochs=1, num_workers=0, **fields())
    for run in (one, other, third):
        assert run.run().is_done


# -------------------------------------------------------------------------- a loop of the user's own


def test_update_twice_for_a_batch_is_refused_and_the_run_goes_on(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = opened(tmp_path)
    for batch in run:
        run.update(run.task.run(batch)[0])
        with pytest.raises(SessionError, match=r"update\(\) goes with a batch"):
            run.update(torch.ones((), requires_grad=True))
    assert_same_bits(bits(run), expected)


def test_update_outside_the_loop_is_refused(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for _ in range(2):
        with pytest.raises(SessionError, match="call it once inside the session's loop"):
            run.update(torch.ones((), requires_grad=True))
        run.run()


def test_a_batch_without_update_is_refused_and_the_run_goes_on(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = opened(tmp_path)
    train(run, until=4)
    with pytest.raises(SessionError, match=r"A batch was not given to session\.update"):
        for _ in run:
            pass
    assert run.step == 4
    assert_same_bits(bits(run.run()), expected)


def test_an_epoch_of_which_nothing_is_trained_is_refused(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    run = opened(tmp_path)
    with pytest.raises(SessionError, match=r"Nothing of epoch 0 was trained.*for batch in epoch"):
        for _ in run.epochs():
            pass
    assert run.step == 0
    assert_same_bits(bits(run.run()), expected)


BAD_LOSSES: dict[str, Callable[[torch.Tensor], tuple[Any, Any]]] = {
    "detached": lambda loss: (loss.detach(), None),
    "a number": lambda loss: (loss.item(), None),
    "a vector": lambda loss: (torch.stack([loss, loss]), None),
    "of nothing": lambda loss: (loss, 0),
    "of less than nothing": lambda loss: (loss, -3),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_loss_that_cannot_be_used_is_refused_and_the_right_one_still_taken(
    tmp_path: Path, kind: str, expected: dict[str, torch.Tensor]
) -> None:
    run = opened(tmp_path)
    for batch in run:
        loss, _, _ = run.task.run(batch)
        bad, n = BAD_LOSSES[kind](loss)
        with pytest.raises(ValueError, match=r"^loss=.*not detached|^n=.* must be above 0"):
            run.update(bad, n)
        run.update(loss)
    assert_same_bits(bits(run), expected)


# ------------------------------------------------------------------------------------------- resume


def mark(word: str) -> None:
    """Leave a file with this name, where a test has said where."""
    if folder := os.environ.get("NBTRAIN_TEST_MARKS"):
        (Path(folder) / word).touch()


def marking(function: Any) -> Any:
    mark("imported")
    return function


@marking
def marked() -> nbtrain.Task:
    """Build the tiny task, and tell that it was called."""
    mark("called")
    return build()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Return the folder of a session whose recipe leaves marks when it is run."""
    folder = tmp_path / "stored"
    session(folder, build=marked).run()
    return folder


def test_without_a_word_of_trust_all_is_shown_and_nothing_is_run(
    tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("NBTRAIN_TEST_MARKS", str(marks))
    here = files(stored)
    found = checkpoint.find([FolderStore(stored)], "tiny")
    for name in ("tiny", None):
        with pytest.raises(TrustError) as caught:
            nbtrain.resume(name, store=stored)
        words = str(caught.value)
        assert f"Found 'tiny' in {FolderStore(stored).place}: step 6, epoch 2.00, stage 1" in words
        best = checkpoint.best_of(found)
        assert best is not None
        assert f"best validation loss {best.facts['valid_loss']:.4g}" in words
        assert found[0].files["recipe.py"]["sha256"] in words
        for line in checkpoint.recipe(found[0]).splitlines():
            assert f" | {line}\n" in words
        assert "trust_code=True" in words.splitlines()[-1]
    assert list(marks.iterdir()) == []
    assert files(stored) == here
    run = nbtrain.resume("tiny", store=stored, trust_code=True, num_workers=0)
    assert sorted(path.name for path in marks.iterdir()) == ["called", "imported"]
    assert run.is_done


def test_a_build_of_ones_own_needs_no_trust(stored: Path) -> None:
    run = nbtrain.resume("tiny", marked, store=stored, epochs=3)
    assert (run.step, run.journal.settings["epochs"]) == (6, 3)
    assert run.run().step == 9


def test_a_session_that_is_not_there_is_told_with_those_that_are(stored: Path) -> None:
    with pytest.raises(
        SessionError, match=r"(?s)no session 'tinny' in .*; there is: tiny\..*Check the name"
    ):
        nbtrain.resume("tinny", store=stored, trust_code=True)
    with pytest.raises(SessionError, match="there is: no session at all"):
        nbtrain.resume("tiny", store=MemoryStore(), trust_code=True)
    with pytest.raises(SessionError, match=r"There is no session in .*Give store="):
        nbtrain.resume(store=MemoryStore(), trust_code=True)


def test_where_there_are_several_the_name_is_asked_for(stored: Path) -> None:
    other = nbtrain.Session("other", store=stored, epochs=1, num_workers=0, bar=False, **fields())
    other.run()
    with pytest.raises(SessionError, match=r"2 sessions: other, tiny, in .*nbtrain\.resume\(name\)"):
        nbtrain.resume(store=stored, trust_code=True)


def test_a_listing_that_is_too_old_is_told_before_anything_is_run(
    tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBTRAIN_TEST_MARKS", str(tmp_path))
    with pytest.raises(SessionError, match="not as far as it should be") as caught:
        nbtrain.resume("tiny", store=stored, trust_code=True, at_least=7)
    assert aligned("step 6", "at least step 7") in str(caught.value)
    assert not (tmp_path / "imported").exists()
    assert nbtrain.resume("tiny", store=stored, trust_code=True, at_least=6).step == 6


def test_a_loop_of_ones_own_has_no_recipe_and_says_what_to_do(begun: Path) -> None:
    with pytest.raises(RecipeError, match="'tiny' was trained by a loop of its own") as caught:
        nbtrain.resume("tiny", store=begun, trust_code=True)
    assert "Run the cells that made it" in str(caught.value)


def test_a_change_that_no_session_knows_is_refused_by_resume(stored: Path) -> None:
    here = files(stored)
    with pytest.raises(ValueError, match="nonsense"):
        nbtrain.resume("tiny", marked, store=stored, nonsense=1)
    with pytest.raises(ValueError, match="accumulate=0"):
        nbtrain.resume("tiny", marked, store=stored, accumulate=0)
    assert files(stored) == here
