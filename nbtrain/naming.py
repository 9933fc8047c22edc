"""What may be logged by which name, and how a value that may not is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from nbtrain.errors import TaskError
from nbtrain.history import COLUMNS

TAKEN = (*COLUMNS, "n", "count")


def check_names(named: Mapping[str, Any]) -> None:
    """Refuse what cannot be logged by its name.

    Raises:
        TaskError: says which, and why.
    """
    for name, value in named.items():
        _refuse_taken(name)
        if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise TaskError(f"{name!r} is a {kind_of(value)}. Give a number, or a tensor of one.")


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


def kind_of(value: object) -> str:
    """Write what a value is, for an error."""
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
