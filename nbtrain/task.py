"""What `build` returns: model, optimizer, data, loss; and what one micro-step of it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nbtrain.errors import TaskError


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
        train: A map-style data set, or a DataLoader over one.
        valid: The same, for validation after each epoch; or None.
        loss: loss(output, target), the mean over the batch, shape ().
        metrics: By name, metric(output, target): the batch's mean, shape (), or a value for each
            sample, shape (batch,). Averaged over all samples of the validation.
        step: step(model, batch), instead of the model on (x, y) and `loss`: the batch's mean loss,
            or (sum of losses, count), which then makes the window's denominator.
        collate: Makes a batch of a list of samples; torch's own by default.
        parts: By name, anything else with `state_dict` and `load_state_dict`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Any
    valid: Any = None
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    step: Callable[[nn.Module, Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)

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
        if self.train is None:
            raise TaskError("Task(train=) is None. Give a data set or a DataLoader.")
        for name, part in self.parts.items():
            if not isinstance(part, Part):
                raise TaskError(
                    f"The part {name!r}, a {_kind(part)}, has no state_dict and load_state_dict. "
                    "Give it both, or leave it out of parts."
                )
        known = {id(p) for p in self.model.parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not any(id(p) in known for p in held):
            raise TaskError(
                "The optimizer holds none of the model's parameters. "
                "Make it from this model: torch.optim.SGD(model.parameters(), lr=...)."
            )
        return self

    def run(self, batch: Any) -> tuple[Tensor, float | None, Any]:
        """Return (mean loss, what it was the mean of or None for samples, model output or None)."""
        if self.step is not None:
            result = self.step(self.model, batch)
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


def _kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
