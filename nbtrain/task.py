"""What `build` returns: model, optimizer, data, loss; and what one micro-step of it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nbtrain import schedulers
from nbtrain.errors import TaskError
from nbtrain.naming import TAKEN, check_names, kind_of

UNHELD = (torch.complex128, torch.complex32)  # by safetensors
RETURNS = (
    "It may return the mean loss, a tensor; (sum of losses, count), in this order; or a dict, "
    '{"loss": mean, "kl": mean} or {"loss": sum, "count": n, "kl": sum}.'
)
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
                raise TaskError(f"Task({name}=) is a {kind_of(value)}. Give {words}.")
        for name in ("loss", "step", "collate", "schedule"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name == "loss"):
                raise TaskError(f"Task({name}=) is a {kind_of(value)}. Give a function.")
        if isinstance(self.loss, type):
            raise TaskError(f"Task(loss=) is a class. Give one of it: {self.loss.__name__}().")
        self._check_metrics()
        self._check_data()
        if self.scheduler is not None or self.scheduler_per is not None:
            if self.parts.get("scheduler") is not self.scheduler:
                raise TaskError('A part is named "scheduler", as Task(scheduler=) is. Rename the part.')
            schedulers.check(self.scheduler, self.scheduler_per, self.optimizer)
        for name, part in self.parts.items():
            if not isinstance(part, Part):
                raise TaskError(
                    f"The part {name!r}, a {kind_of(part)}, has no state_dict and load_state_dict. "
                    "Give it both, or leave it out of parts."
                )
        self._check_ema()
        if isinstance(self.fresh, str) or not all(isinstance(name, str) for name in self.fresh):
            raise TaskError(f'Task(fresh=) is {self.fresh!r}. Give a list of names: ["head.*"].')
        self._check_model()
        self._check_optimizer()
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

    def _check_data(self) -> None:
        for name in ("train", "valid"):
            value = getattr(self, name)
            if isinstance(value, (str, PurePath)):
                raise TaskError(
                    f"Task({name}=) is a path, {str(value)!r}. Give a data set that reads it: "
                    f"torchvision.datasets.ImageFolder({str(value)!r}, transform=...), say."
                )
        if self.train is None:
            raise TaskError("Task(train=) is None. Give a data set or a DataLoader.")

    def _check_model(self) -> None:
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if is_lazy(value):
                raise TaskError(
                    f"The model's {name!r} has no shape yet: its module is a lazy one. "
                    "Run one batch through the model in build, before anything else is made of it."
                )
        for name, value in self.model.state_dict().items():
            if isinstance(value, Tensor) and value.dtype in UNHELD:
                dtype = str(value.dtype).removeprefix("torch.")
                raise TaskError(
                    f"The model's {name!r} is {dtype}, which a checkpoint cannot hold: safetensors has "
                    "no such type. Make it complex64; or keep it as torch.view_as_real(...) and let "
                    "forward compute with torch.view_as_complex(...) of that."
                )

    def _check_optimizer(self) -> None:
        known = {id(p) for p in self.model.parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not any(id(p) in known for p in held):
            raise TaskError(
                "The optimizer holds none of the model's parameters. "
                "Make it from this model: torch.optim.SGD(model.parameters(), lr=...)."
            )
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TaskError(
                f"The optimizer, a {kind_of(self.optimizer)}, wants a closure: it computes the loss "
                "anew within its step, which a window of batches is not made for. Take one that steps "
                "without, such as torch.optim.AdamW."
            )
        strangers = [p for p in held if id(p) not in known]
        if strangers:  # a part may not be a module, so its tensors are known by where they lie
            kept = {t.data_ptr() for part in self.parts.values() for t in _tensors(part.state_dict())}
            for p in strangers:
                if p.data_ptr() not in kept:
                    raise TaskError(
                        f"The optimizer holds a parameter of shape {tuple(p.shape)} that neither the "
                        "model nor a part has: it would be trained and not saved. Put it into the "
                        'model, or give its module as a part: Task(parts={"head": module}).'
                    )

    def _check_metrics(self) -> None:
        if self.metrics and self.step is not None:
            named = ", ".join(f'"{name}": ...' for name in self.metrics)
            raise TaskError(
                "Task(metrics=) are of the model's output, which a step= keeps to itself. "
                f'Return them from step by name: {{"loss": ..., {named}}}.'
            )
        if taken := {"valid_loss", *TAKEN} & self.metrics.keys():
            raise TaskError(f"The metric {min(taken)!r} has a name of the history's own. Rename it.")
        for name, metric in self.metrics.items():
            if isinstance(metric, type):
                raise TaskError(f"The metric {name!r} is a class. Give one of it: {metric.__name__}().")
            if not (callable(metric) or all(hasattr(metric, method) for method in METHODS)):
                raise TaskError(
                    f"The metric {name!r} is a {kind_of(metric)}. Give a function of (output, target), "
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
                f"Task(ema=) is a {kind_of(ema)}. Give torch.optim.swa_utils.AveragedModel(model, ...) "
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

        With `step` the last is what it gives besides the loss, by name, as means. Of a count of 0 both
        are what step gave, to weigh nothing.

        Raises:
            TaskError: step returned something else than it may; or a loss to train has no gradient.
        """
        if self.step is not None:
            found = _read(self.step(self.model, batch))
        else:
            x, target = batch
            output = self.model(x)
            found = self.loss(output, target), None, output
        if torch.is_grad_enabled() and isinstance(found[0], Tensor) and not found[0].requires_grad:
            self.refuse_frozen()
            raise TaskError("The loss has no gradient. Let it be of the model's output, not detached.")
        return found

    def refuse_frozen(self) -> None:
        """Refuse a model of which nothing can be trained.

        Raises:
            TaskError: names parameters that are frozen.
        """
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if any(p.requires_grad for p in (*self.model.parameters(), *held)):
            return
        names = [name for name, _ in self.model.named_parameters()]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise TaskError(
            f"The loss has no gradient, because all parameters are frozen: {shown}. "
            f"Unfreeze what shall be trained: model.get_parameter({names[-1]!r}).requires_grad_(True)."
        )


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
            f"build returned a {kind_of(task)}. "
            "Let it return nbtrain.Task(model=..., optimizer=..., train=...)."
        )
    return task.check()


def _read(found: Any) -> tuple[Tensor, float | None, Any]:
    """Return what `run` does of what step returned."""
    count: Any = None
    named: dict[str, Any] | None = None
    if isinstance(found, Mapping):
        if "loss" not in found:
            raise TaskError(
                f'step returned a dict without "loss": {", ".join(map(str, found)) or "an empty one"}. '
                'Give {"loss": mean, ...}, or {"loss": sum, "count": n, ...}.'
            )
        named = {name: value for name, value in found.items() if name not in ("loss", "count")}
        check_names(named)
        loss, count = found["loss"], found.get("count")
    elif isinstance(found, tuple) and len(found) == 2:
        loss, count = found
        if count is None:
            raise TaskError(f"step returned (loss, None). {RETURNS}")
    else:
        loss = found
    n = None if count is None else _count(count)
    if not isinstance(loss, Tensor):
        kind = f"a tuple of {len(loss)}" if isinstance(loss, tuple) else kind_of(loss)
        raise TaskError(f"step returned {kind} as its loss. {RETURNS}")
    if n:
        loss = loss / count
        named = None if named is None else {name: value / count for name, value in named.items()}
    return loss, n, named


def _count(count: Any) -> float:
    """Return what a sum of losses is over, as a number."""
    if isinstance(count, Tensor) and count.requires_grad:
        said = "has a gradient, as a loss or an output has"
    elif not (isinstance(count, Real) or (isinstance(count, Tensor) and count.numel() == 1)):
        shape = f" of shape {tuple(count.shape)}" if isinstance(count, Tensor) else ""
        said = f"is no number, but a {kind_of(count)}{shape}"
    elif not (n := float(count)) >= 0:
        said = f"is {n:g}, and must be 0 or above"
    else:
        return n
    raise TaskError(f"step returned a count that {said}. {RETURNS}")


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Give the tensors of a state_dict."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(value)
