"""A range test tells the losses over the rates, and the session is to the bit what it was."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Noisy, assert_same_bits, bits, build, session
from torch import nn
from torch.optim import lr_scheduler

import nbtrain
from nbtrain import finding
from nbtrain.errors import SessionError

FEW: dict[str, Any] = {"low": 1e-4, "high": 0.1, "steps": 10}


def tensors(run: nbtrain.Session) -> dict[str, torch.Tensor]:
    """Return all that a run holds, and all generators."""
    state = run.task.optimizer.state_dict()["state"]
    found = {f"model.{name}": value.clone() for name, value in run.task.model.state_dict().items()}
    found |= {f"{i}.{k}": v.clone() for i, kept in state.items() for k, v in kept.items()}
    found |= {f"buffer.{name}": b.clone() for name, b in run.task.model.named_buffers()}
    found |= {f"group.{i}.lr": torch.tensor(g["lr"]) for i, g in enumerate(groups(run))}
    found["torch"] = torch.get_rng_state()
    found["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    found["python"] = torch.tensor(random.getstate()[1])
    return found


def groups(run: nbtrain.Session) -> list[dict[str, Any]]:
    return run.task.optimizer.param_groups


def plain(run: nbtrain.Session) -> Any:
    """Return the place, the settings, the parts, the modes, and the store."""
    modes = [module.training for module in run.task.model.modules()]
    states = {name: part.state_dict() for name, part in run.task.parts.items()}
    saved = [vars(saved) for saved in run._loop.keeping.saver.known()]
    grads = [p.grad is None for p in run.task.model.parameters()]
    place = (run.step, run.epoch, run.progress, run.state, run.stage, list(run.history))
    return place, run.journal.state_dict(), states, modes, saved, grads


def scheduled() -> nbtrain.Task:
    task = build()
    scheduler = lr_scheduler.OneCycleLR(task.optimizer, max_lr=0.1, total_steps=7)
    fields = {name: getattr(task, name) for name in ("model", "optimizer", "train", "valid")}
    return nbtrain.Task(**fields, scheduler=scheduler)


def with_a_hidden_buffer() -> nbtrain.Task:
    task = build()
    task.model.register_buffer("seen", torch.zeros(1), persistent=False)
    task.model.register_forward_pre_hook(count)
    return task


def count(model: Any, _: object) -> None:
    model.seen.add_(1)


def smooth() -> nbtrain.Task:
    """A task without anything that is drawn or computed over a micro-batch."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy())


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scheduler": {"build": scheduled, "warmup_epochs": 0, "decay": "constant"},
    "hidden buffer": {"build": with_a_hidden_buffer},
    "workers": {"num_workers": 2},
}


def until(run: nbtrain.Session, step: int, order: str) -> None:
    """Train so many steps in a loop of one's own, then pause or stop."""
    for batch in run if step else ():
        run.update(run.task.run(batch)[0])
        if run.step == step:
            getattr(run, order)()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("step", "order"), [(0, "stop"), (2, "pause"), (3, "stop"), (4, "stop")])
def test_the_run_after_it_is_the_run_without_it(
    tmp_path: Path, way: str, step: int, order: str
) -> None:
    without, run = (session(tmp_path / name, **WAYS[way]) for name in ("without", "with"))
    for one in (without, run):
        until(one, step, order)
    before, rest = tensors(run), plain(run)
    found = run.find_lr(**FEW)
    assert len(found.losses) == 10
    assert len(set(found.losses)) == 10
    assert_same_bits(tensors(run), before)
    assert plain(run) == rest
    assert_same_bits(bits(run.run()), bits(without.run()))


def raising(error: BaseException | None) -> Callable[..., torch.Tensor]:
    """Return a loss whose 12th call raises, or sends this process an interrupt."""
    calls = iter(range(12))

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            if error is not None:
                raise error
            os.kill(os.getpid(), signal.SIGINT)
        return nn.functional.cross_entropy(output, target)

    return loss


@pytest.mark.parametrize("error", [ValueError("the loss is odd"), KeyboardInterrupt(), None])
@pytest.mark.parametrize("way", ["plain", "scheduler"])
def test_whatever_ends_it_all_is_as_before(
    tmp_path: Path, way: str, error: BaseException | None
) -> None:
    run = session(tmp_path / "with", **WAYS[way])
    until(run, 2, "stop")
    before, rest = tensors(run), plain(run)
    handler = signal.getsignal(signal.SIGINT)
    run.task.loss, loss = raising(error), run.task.loss
    with pytest.raises(KeyboardInterrupt if error is None else type(error)):
        run.find_lr(**FEW)
    run.task.loss = loss
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_bits(tensors(run), before)
    assert plain(run) == rest
    assert_same_bits(bits(run.run()), bits(session(tmp_path / "without", **WAYS[way]).run()))


@pytest.mark.parametrize("is_saved", [True, False])
def test_where_the_putting_back_fails_the_next_run_never_trains_on_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool
) -> None:
    run = session(tmp_path / "with")
    until(run, 2 if is_saved else 0, "stop")
    with monkeypatch.context() as patch:
        patch.setattr(finding.parts, "put", raising_at_once)
        with pytest.raises(OSError, match="no putting back"):
            run.find_lr(**FEW)
    if is_saved:
        assert_same_bits(bits(run.run()), bits(session(tmp_path / "without").run()))
    else:
        with pytest.raises(SessionError, match="has no checkpoint to go back to"):
            run.run()


def raising_at_once(*_: Any) -> None:
    raise OSError("no putting back")


def test_where_memory_is_short_it_tries_smaller_micro_batches_and_the_session_is_as_before(
    tmp_path: Path,
) -> None:
    def short(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if len(output) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return nn.functional.cross_entropy(output, target)

    run = session(tmp_path, build=smooth)
    wanted = run.find_lr(**FEW)
    before, rest = tensors(run), plain(run)
    run.task.loss = short
    found = run.find_lr(**FEW)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-4)
    assert_same_bits(tensors(run), before)
    assert plain(run) == rest


def test_a_finished_session_can_be_tried_too(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=1, decay="constant").run()
    before = tensors(run)
    assert len(run.find_lr(**FEW).losses) == 10
    assert run.is_done
    assert_same_bits(tensors(run), before)


def test_a_model_keeps_the_modes_of_its_modules_after_it_and_a_frozen_one_in_it(
    tmp_path: Path,
) -> None:
    run = session(tmp_path)
    frozen = run.task.model[1].eval()
    seen: list[bool] = []
    frozen.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    run.find_lr(**FEW)
    assert not any(seen)
    run.task.model.eval()
    run.find_lr(**FEW)
    assert seen[-1], "as run() does with a model that was left in eval mode"
    assert not any(module.training for module in run.task.model.modules())


def test_the_rates_rise_in_equal_steps_of_their_logarithm_and_are_trained_with(tmp_path: Path) -> None:
    run = session(tmp_path)
    trained: list[float] = []
    run.task.optimizer.register_step_pre_hook(lambda o, *_: trained.append(o.param_groups[0]["lr"]))
    found = run.find_lr(low=1e-3, high=0.1, steps=11)
    assert trained == list(found.lrs) == pytest.approx([10 ** (k / 5 - 3) for k in range(11)])
    assert found.smoothed[0] == pytest.approx(found.losses[0], rel=1e-12)
    two = (0.98 * 0.02 * found.losses[0] + 0.02 * found.losses[1]) / (1 - 0.98**2)
    assert found.smoothed[1] == pytest.approx(two, rel=1e-12)


def test_it_ends_where_the_loss_diverges(tmp_path: Path) -> None:
    run = session(tmp_path, build=steep)
    before = tensors(run)
    found = run.find_lr(low=1e-3, high=1e9, steps=100)
    assert found.diverged
    assert 10 < len(found.losses) < 100
    assert found.suggestion is not None
    assert 0.001 < found.suggestion < 0.2, "far below where it diverges, 0.5"
    assert found.lrs[-1] > 0.5
    assert_same_bits(tensors(run), before)
    assert not run.find_lr(**FEW).diverged


def steep() -> nbtrain.Task:
    """A line to be found with plain gradient descent: far too high a rate leads to infinity."""
    model = nn.Linear(6, 3)
    return nbtrain.Task(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train=Noisy(),
        loss=squared,
    )


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target[:, None]).square().mean()


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_mean() -> None:
    lrs = [10.0 ** (k / 10) for k in range(-60, 0)]
    valley = [abs(k - 40.0) for k in range(60)]
    assert finding.suggest(lrs, valley) == lrs[40] / 10
    assert finding.suggest(lrs, [float(k) for k in range(60)]) is None
    assert finding.suggest(lrs, [abs(k - 5.0) for k in range(60)]) is None, "of too few losses"
    assert finding.suggest([], []) is None


def test_a_loss_that_is_never_finite_is_a_result_too(tmp_path: Path) -> None:
    run = session(tmp_path)
    run.task.loss = lambda output, target: output.sum() * float("nan")
    found = run.find_lr(**FEW)
    assert (found.losses, found.suggestion, found.diverged) == ((), None, True)
    assert repr(found) == "<range test: no rate, diverged, no suggestion>"
    assert found._repr_png_()[:4] == b"\x89PNG"


def test_it_is_shown_as_a_figure_of_its_own(tmp_path: Path) -> None:
    found = session(tmp_path, build=steep).find_lr(low=1e-3, high=1e9, steps=60)
    figure = found.plot()
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [line.get_label() for line in axes.lines] == [
        "_raw",
        "running mean",
        f"suggestion {found.suggestion:.2g}",
    ]
    assert axes.lines[1].get_ydata().tolist() == list(found.smoothed)
    assert found._repr_png_()[:4] == b"\x89PNG"
    assert "matplotlib.pyplot" not in sys.modules
    assert repr(found).startswith("<range test: 0.001 to ")


def test_it_is_refused_while_training_runs(tmp_path: Path) -> None:
    run = session(tmp_path)
    next(batches := iter(run))
    with pytest.raises(SessionError, match="is training in this kernel, and a range test"):
        run.find_lr()
    batches.close()


def test_a_loop_of_ones_own_has_to_tell_its_loss(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="keeps its loss to itself"):
        session(tmp_path, build=None, **vars_of(build())).find_lr(**FEW)
    told = session(tmp_path, build=None, loss=nn.CrossEntropyLoss(), **vars_of(build()))
    assert len(told.find_lr(**FEW).losses) == 10


def vars_of(task: nbtrain.Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in ("model", "optimizer", "train")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0}, "low=0 must be a learning rate above 0"),
        ({"high": float("inf")}, "high=inf must be"),
        ({"low": "1e-3"}, "low='1e-3' must be"),
        ({"low": 1.0, "high": 0.1}, "must be below high=0.1"),
        ({"steps": 5}, "a whole number from 10 up"),
        ({"steps": 10.0}, "a whole number from 10 up"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        session(tmp_path).find_lr(**arguments)
