"""What `build` returns: model, optimizer, data, loss; and what one micro-step of it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nbtrain import schedulers
from nbtrain.errors import TaskError
from nbtrain.history import COLUMNS

TAKEN = (*COLUMNS, "n", "count")
METHODS = ("update", "compute", "reset")  # of a metric that keeps count


@runtime_checkable
class Part(Protocol):
    """Anything whose state is saved with the session."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class Task:
    """All that a run is made of.

    Args:
        model: Saved and loaded with the session.
        optimizer: Over the model's parameters; its learning rates are the peaks of the schedule.
        train: A map-style data set, an iterable one (see `stream`), or a DataLoader over one.
        valid: The same, for validation after each epoch; or None.
        loss: loss(output, target), the mean over the batch, shape ().
        metrics: By name, metric(output, target): the batch's mean, shape (), or a value for each
            sample, shape (batch,). Averaged over all samples of the validation. Or an object with
            `update`, `compute` and `reset`, as those of torchmetrics.
        step: step(model, batch), instead of the model on (x, y) and `loss`: the batch's mean loss,
            or (sum of losses, count), which then makes the window's denominator; or a dict of "loss"
            and others that are logged by name: means too, or with "count" sums over so many.
        collate: Makes a batch of a list of samples; torch's own by default.
        parts: By name, anything else with `state_dict` and `load_state_dict`.
        ema: An average of the model's weights, updated after each step, and validated and kept as the
            best in place of the model: torch.optim.swa_utils.AveragedModel(model, ...), or timm's
            ModelEmaV3(model, ...).
        skip_seen: Whether an iterable `train` without `state_dict` is read again from the epoch's start
            on resume, up to where it was; it says how long that took.
        fresh: Names or patterns, such as "head.*", of parameters that may differ from a checkpoint's:
            new, gone, of another shape, unfrozen. Those begin as they are built, all else goes on.
        schedule: A function of progress in epochs that gives the factor on the learning rates, instead
            of a session's `decay`; a pure one, of which nothing is saved: build brings it again.
        scheduler: One of torch's, over the optimizer. The session steps and saves it, as the part
            "scheduler"; do not step it yourself.
        scheduler_per: "step" or "epoch": how often. None knows it of OneCycleLR and CyclicLR, each
            step, and of ReduceLROnPlateau, each epoch, on the session's `metric`; all others count what
            you let them count.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Any
    valid: Any = None
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    metrics: Mapping[str, Any] = field(default_factory=dict)
    step: Callable[[nn.Module, Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    ema: Any = None
    skip_seen: bool = False
    fresh: Sequence[str] = ()
    schedule: Callable[[float], float] | None = None
    scheduler: Any = None
    scheduler_per: str | None = None

    def __post_init__(self) -> None:
        if self.scheduler is not None and isinstance(self.parts, Mapping):
            self.parts = {"scheduler": self.scheduler} | dict(self.parts)

    def check(self) -> Task:
        """Refuse a task that cannot be trained.

        Raises:
            TaskError: says which field, what it is, and what it should be.
        """
        wanted: dict[str, tuple[Any, str]] = {
            "model": (nn.Module, "a torch.nn.Module"),
            "optimizer": (torch.optim.Optimizer, "a torch.optim.Optimizer"),
            "parts": (Mapping, "a dict of names and parts"),
            "metrics": (Mapping, "a dict of names and functions"),
        }
        for name, (kind, words) in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TaskError(f"Task({name}=) is a {_kind(value)}. Give {words}.")
        for name in ("loss", "step", "collate", "schedule"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name == "loss"):
                raise TaskError(f"Task({name}=) is a {_kind(value)}. Give a function.")
        self._check_metrics()
        if self.train is None:
            raise TaskError("Task(train=) is None. Give a data set or a DataLoader.")
        if self.scheduler is not None or self.scheduler_per is not None:
            if self.parts.get("scheduler") is not self.scheduler:
                raise TaskError('A part is named "scheduler", as Task(scheduler=) is. Rename the part.')
            schedulers.check(self.scheduler, self.scheduler_per, self.optimizer)
        for name, part in self.parts.items():
            if not isinstance(part, Part):
                raise TaskError(
                    f"The part {name!r}, a {_kind(part)}, has no state_dict and load_state_dict. "
                    "Give it both, or leave it out of parts."
                )
        self._check_ema()
        if isinstance(self.fresh, str) or not all(isinstance(name, str) for name in self.fresh):
            raise TaskError(f'Task(fresh=) is {self.fresh!r}. Give a list of names: ["head.*"].')
        known = {id(p) for p in self.model.parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not any(id(p) in known for p in held):
            raise TaskError(
                "The optimizer holds none of the model's parameters. "
                "Make it from this model: torch.optim.SGD(model.parameters(), lr=...)."
            )
        return self

    @property
    def validated(self) -> Task:
        """The task with the model that is validated: the average, where there is one."""
        return self if self.ema is None else replace(self, model=self.ema.module)

    def average(self, step: int) -> None:
        """Update the average, if there is one, after so many optimizer updates."""
        if self.ema is None:
            return
        if hasattr(self.ema, "update_parameters"):
            self.ema.update_parameters(self.model)
            return
        if isinstance(drawn := getattr(self.ema, "_sr_generator", None), torch.Generator):
            drawn.manual_seed(step)  # timm's, which rounds bf16 averages, and which no state_dict has
        self.ema.update(self.model, step=step)

    def named(self, output: Any) -> Mapping[str, Any]:
        """Return what is logged by name, of what `run` gave last."""
        return output if self.step is not None and output is not None else {}

    def _check_metrics(self) -> None:
        if taken := {"valid_loss", *TAKEN} & self.metrics.keys():
            raise TaskError(f"The metric {min(taken)!r} has a name of the history's own. Rename it.")
        for name, metric in self.metrics.items():
            if isinstance(metric, type):
                raise TaskError(f"The metric {name!r} is a class. Give one of it: {metric.__name__}().")
            if not (callable(metric) or all(hasattr(metric, method) for method in METHODS)):
                raise TaskError(
                    f"The metric {name!r} is a {_kind(metric)}. Give a function of (output, target), "
                    f"or an object with {', '.join(METHODS)}."
                )

    def _check_ema(self) -> None:
        ema = self.ema
        if ema is None:
            return
        updates = hasattr(ema, "update_parameters") or hasattr(ema, "update")
        inner = getattr(ema, "module", None)
        if not (isinstance(ema, nn.Module) and isinstance(inner, nn.Module) and updates):
            raise TaskError(
                f"Task(ema=) is a {_kind(ema)}. Give torch.optim.swa_utils.AveragedModel(model, ...) "
                "or timm.utils.ModelEmaV3(model, ...)."
            )
        if getattr(ema, "device", None) is not None:
            raise TaskError(
                f"Task(ema=) was made with device={ema.device!r}, and is validated where the model is. "
                "Leave its device= out."
            )
        names = [sorted(module.state_dict()) for module in (self.model, inner)]
        if inner is self.model or names[0] != names[1]:
            raise TaskError("Task(ema=) averages another model. Make it from this one, after it.")

    @property
    def needs_a_metric(self) -> bool:
        """Whether the scheduler is one that looks at a metric."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    def anneal(self, per: str, value: float | None = None) -> None:
        """Step the scheduler, if there is one that is stepped so.

        Args:
            per: "step" or "epoch": what is over.
            value: Of the metric that is watched, at an epoch's end; None where that was not measured.
        """
        if self.scheduler is not None and per == schedulers.per(self.scheduler, self.scheduler_per):
            schedulers.step(self.scheduler, value)

    def run(self, batch: Any) -> tuple[Tensor, float | None, Any]:
        """Return (mean loss, what it was the mean of or None for samples, model output or None).

        With `step` the last is what it gives besides the loss, by name, as means.
        """
        if self.step is not None:
            result = self.step(self.model, batch)
            if isinstance(result, Mapping):
                return _read(result)
            if isinstance(result, tuple):
                total, count = result
                return total / count, float(count), None
            return result, None, None
        x, target = batch
        output = self.model(x)
        return self.loss(output, target), None, output


def call(build: Callable[[], Any]) -> Task:
    """Call the user's build and check what it gives.

    Raises:
        TaskError: it is no Task, or one that cannot be trained.
    """
    required = [
        p.name
        for p in inspect.signature(build).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise TaskError(
            f"build needs {', '.join(required)}, but a fresh kernel has nothing to give. "
            "Give each a default."
        )
    task = build()
    if not isinstance(task, Task):
        raise TaskError(
            f"build returned a {_kind(task)}. "
            "Let it return nbtrain.Task(model=..., optimizer=..., train=...)."
        )
    return task.check()


def _read(found: Mapping[str, Any]) -> tuple[Tensor, float | None, dict[str, Any]]:
    if "loss" not in found:
        raise TaskError(
            f'step returned a dict without "loss": {", ".join(map(str, found)) or "an empty one"}. '
            'Give {"loss": mean, ...}, or {"loss": sum, "count": n, ...}.'
        )
    named = {name: value for name, value in found.items() if name not in ("loss", "count")}
    check_names(named)
    count = found.get("count")
    if count is None:
        return found["loss"], None, named
    return found["loss"] / count, float(count), {n: value / count for n, value in named.items()}


def check_names(named: Mapping[str, Any]) -> None:
    """Refuse what cannot be logged by its name.

    Raises:
        TaskError: says which, and why.
    """
    for name, value in named.items():
        _refuse_taken(name)
        if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise TaskError(f"{name!r} is a {_kind(value)}. Give a number, or a tensor of one.")


def as_logged(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what a user logs as plain numbers.

    Raises:
        TaskError: says which is none, or has a name that is taken.
    """
    found = {}
    for name, value in metrics.items():
        _refuse_taken(name)
        is_large = getattr(value, "ndim", 0) and math.prod(value.shape) != 1
        if is_large or not hasattr(value, "__float__"):
            raise TaskError(f"{name}={shown(value)} cannot be logged. Give a number: log({name}=0.5).")
        found[name] = float(value)
    return found


def shown(value: Any) -> str:
    """Write a value that is not what it should be; of a whole tensor its shape."""
    is_large = isinstance(value, Tensor) and value.numel() > 1
    return f"a tensor of shape {tuple(value.shape)}" if is_large else repr(value)


def _refuse_taken(name: Any) -> None:
    if not isinstance(name, str) or name in TAKEN:
        raise TaskError(f"{name!r} cannot be logged: the history has it. Take another name.")


def _kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
