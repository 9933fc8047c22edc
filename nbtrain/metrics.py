"""What a validation gives, batch by batch: means over all samples, and metrics that keep count.

A metric is a function of a batch, averaged over the samples; or an object with `update`, `compute` and
`reset`, as those of torchmetrics are, for what is no mean of batches: F1, AUROC, a confusion. Such an
object begins empty in each validation, so that nothing of it has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nbtrain.errors import TaskError
from nbtrain.task import METHODS


class Measuring:
    """One validation.

    Args:
        metrics: By name, functions and objects.
        device: Where their arguments are.
    """

    def __init__(self, metrics: Mapping[str, Any], device: torch.device) -> None:
        self._sums: dict[str, list[tuple[Any, float]]] = {}
        self._functions: dict[str, Callable[[Any, Any], Any]] = {}
        self._counting: dict[str, Any] = {}
        for name, metric in metrics.items():
            counts = all(callable(getattr(metric, method, None)) for method in METHODS)
            (self._counting if counts else self._functions)[name] = metric
        for metric in self._counting.values():
            if hasattr(metric, "to"):
                metric.to(device)
            metric.reset()

    def add(self, name: str, mean: Any, n: float) -> None:
        """Add a batch's mean over n; over 0 it weighs nothing, whatever it is."""
        self._sums.setdefault(name, []).append((mean, n))

    def see(self, output: Any, target: Any, num_samples: int) -> None:
        """Add what the metrics say of a batch."""
        for name, function in self._functions.items():
            self.add(name, _mean(name, function(output, target)), num_samples)
        for metric in self._counting.values():
            metric.update(output, target)

    def read(self) -> dict[str, float]:
        """Return what was measured, by name.

        Raises:
            TaskError: a metric gave something that is no number.
        """
        means = {}
        for name, found in self._sums.items():
            weight = sum(n for _, n in found)  # of 0 there is no mean
            total = sum(float(value) * n for value, n in found if n)
            means[name] = total / weight if weight else math.nan
        for name, metric in self._counting.items():
            value = metric.compute()
            if isinstance(value, Mapping):
                means |= {
                    f"{name}_{key}": _number(f"{name}_{key}", each) for key, each in value.items()
                }
            else:
                means[name] = _number(name, value)
        return means

    def close(self) -> None:
        """Let go of what the objects have kept."""
        for metric in self._counting.values():
            metric.reset()


def _mean(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double().mean() if value.ndim else value
    if isinstance(value, Real):  # numpy's scalars too
        return value
    raise TaskError(
        f"The metric {name!r} gave a {type(value).__name__}. "
        "Let it return a number or a tensor: the batch's mean, or a value for each sample."
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TaskError(
        f"The metric {name!r} computes a value of {what}. Let it be one number: average='macro', "
        "say, or leave it out."
    )
