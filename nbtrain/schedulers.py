"""The schedulers of torch that a user brings: how often each is stepped, and what of it may not change.

A scheduler of torch keeps the rate in the optimizer's groups and goes on from what it finds there. So
build makes optimizer and scheduler, and then the optimizer's state is put back first and the
scheduler's after it: each is what it was, and no constructor runs after that to write a rate of its
own. Functions that it was given, as LambdaLR is, are in no state; build brings them again.

Here the session's own rates are written too, and told apart from those that the user gives.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from nbtrain.errors import NbtrainWarning, TaskError

PER = ("step", "epoch")
LONG_BEFORE = 0.8  # of its length

_built: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()
_written: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()


def check(scheduler: Any, per: str | None, optimizer: Optimizer) -> None:
    """Refuse what cannot be stepped, or nobody knows how often.

    Raises:
        TaskError: says what it is, and what it should be.
    """
    if not isinstance(scheduler, LRScheduler):
        kind = f"{type(scheduler).__module__}.{type(scheduler).__qualname__}"
        raise TaskError(
            f"Task(scheduler=) is a {kind}, none of torch.optim.lr_scheduler. One of another kind is a "
            "part that your own loop steps: parts={...}."
        )
    if scheduler.optimizer is not optimizer:
        raise TaskError("Task(scheduler=) is over another optimizer. Make it from the task's.")
    known = _known(scheduler)
    if per is None and not known:
        raise TaskError(
            f"How often is the {type(scheduler).__name__} stepped? Say it, as its numbers count "
            'either: Task(scheduler_per="step") or Task(scheduler_per="epoch").'
        )
    if per is not None and per not in PER:
        raise TaskError(f"Task(scheduler_per={per!r}) is not known. Use one of: {', '.join(PER)}.")
    if isinstance(scheduler, ReduceLROnPlateau) and per == "step":
        raise TaskError("A ReduceLROnPlateau needs a validation. Leave scheduler_per out.")


def refuse_length(scheduler: Any, num_left: int, *, is_resumed: bool, levels: int) -> None:
    """Refuse one of a fixed length that the run outlasts; warn where the run ends long before it.

    Args:
        scheduler: As it is now; most have no length.
        num_left: How often it will be stepped from here to the run's end.
        is_resumed: Whether it came from a checkpoint, which has its length.
        levels: Frames of ours above this call, so that a warning points at the user's line.

    Raises:
        TaskError: says both numbers, and a way out.
    """
    length = getattr(scheduler, "total_steps", None)
    if not isinstance(length, int) or num_left <= 0:
        return
    kind, num_run = type(scheduler).__name__, scheduler.last_epoch + num_left
    both = f"The {kind} has total_steps={length}, and the run steps it {num_run} times"
    if num_run > length and is_resumed:
        raise TaskError(
            f"{both}. It is the checkpoint's and cannot be lengthened. Give the session no more epochs "
            'than it was made for, or a new name; decay="onecycle" instead of it could be lengthened.'
        )
    if num_run > length:
        raise TaskError(
            f"{both}: after {length} it would raise. Make it with total_steps={num_run}, "
            'or leave it out and give the session decay="onecycle", which knows the length.'
        )
    if num_run < LONG_BEFORE * length:
        warnings.warn(
            f"{both} only: the rates will not have come to their end. A step is one of the "
            f"optimizer's, after all its micro-batches; total_steps={num_run} ends with the run.",
            NbtrainWarning,
            stacklevel=2 + levels,
        )


def refuse_other_direction(scheduler: Any, metric: str, direction: str) -> None:
    """Refuse a plateau that takes a better metric for a worse one.

    Raises:
        TaskError: names its mode and the session's direction.
    """
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != direction:
        raise TaskError(
            f"The ReduceLROnPlateau has mode={scheduler.mode!r}, and the session's metric={metric!r} "
            f"has direction={direction!r}: it would lower the rates while that gets better. "
            f"Make it with mode={direction!r}, or give direction={scheduler.mode!r}."
        )


def per(scheduler: LRScheduler, asked: str | None) -> str:
    """Return after what it is stepped: "step" or "epoch"."""
    return asked or _known(scheduler)


def _known(scheduler: LRScheduler) -> str:
    if isinstance(scheduler, (OneCycleLR, CyclicLR)):
        return "step"
    return "epoch" if isinstance(scheduler, ReduceLROnPlateau) else ""


def step(scheduler: LRScheduler, value: float | None) -> None:
    """Step it; one that looks at a metric only where that was measured."""
    # In a fresh process it would say that the optimizer has made no step yet.
    scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]
    if not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()
    elif value is not None:
        scheduler.step(value)


def written(group: Mapping[str, Any]) -> set[str]:
    """Return what a scheduler writes into a group of the optimizer, besides the rate."""
    return {"momentum", "betas"} if "max_momentum" in group else set()


def scales(optimizer: Optimizer) -> list[float]:
    """Return what each group's rate is to be multiplied by: `lr_scale`, timm's way of layer decay."""
    return [float(group.get("lr_scale", 1.0)) for group in optimizer.param_groups]


def is_scaled(before: Sequence[float], here: Sequence[float]) -> bool:
    """Whether the groups' rates are what they were, but for one factor."""
    shares = [[lr / rates[0] if rates[0] else lr for lr in rates] for rates in (before, here)]
    return all(map(math.isclose, *shares))


def write(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Write the rates of the next step into the optimizer's groups, and remember that."""
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    _written[optimizer] = list(rates)


def restored(optimizer: Optimizer) -> None:
    """Remember that the rates of now are not the user's, if some were written before."""
    if optimizer in _written:
        _written[optimizer] = [float(group["lr"]) for group in optimizer.param_groups]


def peaks(optimizer: Optimizer, *, is_planned: bool) -> list[float]:
    """Return the rates that the user gave: of the first time, or what they have written since.

    What a schedule, ours or torch's, has written into the groups is no peak.

    Args:
        is_planned: Whether a session is about to write rates; else a loop of the user's own may.
    """
    groups, written = optimizer.param_groups, _written.get(optimizer)
    now = [float(group["lr"]) for group in groups]
    if written is None:
        is_users = is_planned and not any("initial_lr" in group for group in groups)
    else:
        is_users = len(now) == len(written) and not all(map(_is_rate, groups, written))
    if is_users:
        _built[optimizer] = now
        _written.pop(optimizer, None)
    return _built.setdefault(optimizer, now)


def _is_rate(group: Mapping[str, Any], written: float) -> bool:
    lr = group["lr"]  # as a tensor it is rounded
    return float(lr) == (float(lr.new_tensor(written)) if isinstance(lr, Tensor) else written)


def options(scheduler: LRScheduler) -> dict[str, Any]:
    """Return what it was made with, as far as its state has it: this goes on as it was saved."""
    named = inspect.signature(type(scheduler)).parameters.keys() | {"base_lrs"}
    state = scheduler.state_dict()
    return {name: state[name] for name in sorted(named - {"last_epoch"}) if name in state}
