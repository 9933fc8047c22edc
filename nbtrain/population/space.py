"""What a hyperparameter may be: drawn from where, moved how far.

A space is a dict of names and domains. Nothing ever leaves its domain: what is drawn is in it, what is
moved is clipped to it, and an integer stays an integer. All drawing is by `rng.random()` alone, the one
method of python's generators whose numbers are the same in every version.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TAKEN = ("round", "member", "source", "progress", "step", "score", "error", "valid_loss")
KINDS = ("uniform", "loguniform", "randint")


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both of them included.

    Args:
        kind: "uniform", "loguniform" or "randint".
        low, high: The bounds.

    Raises:
        ValueError: the range is empty or inverted, or has a logarithm that is none.
    """

    kind: str
    low: float
    high: float

    def __post_init__(self) -> None:
        shown = f"{self.kind}({self.low!r}, {self.high!r})"
        wanted, words = (int, "whole numbers") if self.is_whole else ((int, float), "numbers")
        for bound in (self.low, self.high):
            if type(bound) is bool or not isinstance(bound, wanted) or not math.isfinite(bound):
                raise ValueError(f"{shown}: the bounds must be {words}, and {bound!r} is none.")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"{shown} is too wide to draw from: nothing is known of so large numbers.")
        if self.low >= self.high:
            what = "is empty" if self.low == self.high else "is inverted"
            raise ValueError(f"{shown} {what}: give the smaller bound first, then a larger one.")
        if self.kind == "loguniform" and self.low <= 0:
            raise ValueError(f"{shown}: a bound of {self.low!r} has no logarithm. Give one above 0.")

    @property
    def is_whole(self) -> bool:
        """Whether its values are integers."""
        return self.kind == "randint"

    def sample(self, rng: random.Random) -> float:
        """Draw a value."""
        part = rng.random()
        if self.is_whole:
            return self.low + int(part * (self.high - self.low + 1))
        if self.kind == "loguniform":
            low, high = math.log(self.low), math.log(self.high)
            return self._clipped(math.exp(low + part * (high - low)))
        return self._clipped(self.low + part * (self.high - self.low))

    def perturb(self, value: float, factor: float) -> float:
        """Return a value times a factor, in the bounds; an integer moves by one at least."""
        if not self.is_whole:
            return self._clipped(value * factor)
        moved = round(value * factor)
        if moved == value and factor != 1:  # 2 * 1.2 would be 2 for ever
            moved += 1 if factor > 1 else -1
        return self._clipped(moved)

    def edges(self) -> tuple[Any, ...]:
        """Return the values that differ most."""
        return self.low, self.high

    def plain(self) -> list[Any]:
        """Return it as plain values."""
        return [self.kind, self.low, self.high]

    def _clipped(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return value if self.is_whole else float(value)


@dataclass(frozen=True)
class Choice:
    """One of some values, in the order in which they are neighbours.

    Raises:
        ValueError: there are fewer than two, one is there twice, or one is no plain value.
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError(
                f"choice({list(self.values)!r}) leaves nothing to choose. Give two values or more, "
                "or make the one the default of build's argument."
            )
        for number, value in enumerate(self.values):
            if type(value) not in (bool, int, float, str) or _is_odd(value):
                raise ValueError(
                    f"choice(...) has {value!r}, which a checkpoint cannot hold. "
                    "Give numbers, words, True or False, and let build make the rest of them."
                )
            if _place(self.values, value) != number:
                raise ValueError(f"choice(...) has {value!r} twice. Leave one of them out.")

    def sample(self, rng: random.Random) -> Any:
        """Draw a value."""
        return self.values[int(rng.random() * len(self.values))]

    def perturb(self, value: Any, factor: float) -> Any:
        """Return the neighbour: the next one for a factor above 1, else the one before."""
        place = _place(self.values, value) + (1 if factor > 1 else -1)
        return self.values[min(max(place, 0), len(self.values) - 1)]

    def edges(self) -> tuple[Any, ...]:
        """Return the values that differ most, which are all of them."""
        return self.values

    def plain(self) -> list[Any]:
        """Return it as plain values."""
        return ["choice", *self.values]


Domain = Range | Choice


def uniform(low: float, high: float) -> Range:
    """Any number from low to high, each as likely."""
    return Range("uniform", low, high)


def loguniform(low: float, high: float) -> Range:
    """Any number from low to high, each factor as likely: for learning rates."""
    return Range("loguniform", low, high)


def randint(low: int, high: int) -> Range:
    """Any whole number from low to high, both of them included."""
    return Range("randint", low, high)


def choice(values: Sequence[Any]) -> Choice:
    """One of some values; a list in a space is the same."""
    # An array's numbers are numpy's, which JSON does not know.
    plain = values.tolist() if hasattr(values, "tolist") else values
    return Choice(tuple(v.item() if hasattr(v, "item") else v for v in plain))


def read(space: Mapping[str, Any]) -> dict[str, Domain]:
    """Return a space with its lists as choices.

    Raises:
        ValueError: it is empty, or a name or a domain is none.
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError(
            f"space={space!r} has no hyperparameter to search. "
            'Name one: space={"lr": nbtrain.loguniform(1e-3, 1e-1)}.'
        )
    found: dict[str, Domain] = {}
    for name, domain in space.items():
        if not isinstance(name, str):
            raise ValueError(f"space has {name!r} where the name of a hyperparameter should be.")
        if name in TAKEN:
            raise ValueError(
                f"space has {name!r}, a column of the history. Rename the argument of build."
            )
        if not isinstance(domain, (Range, Choice)):
            if not hasattr(domain, "tolist") and not isinstance(domain, (list, tuple)):
                raise ValueError(
                    f"space[{name!r}]={domain!r} is no domain. Give uniform(), loguniform(), "
                    "randint() or a list of values."
                )
            if isinstance(domain, tuple) and len(domain) == 2 and {*map(type, domain)} <= {int, float}:
                raise ValueError(
                    f"space[{name!r}]={domain!r} can be bounds or a choice. Write uniform{domain!r} or "
                    f"loguniform{domain!r} for all between, a list [...] for these values alone."
                )
            domain = choice(domain)
        found[name] = domain
    return found


def plain(space: Mapping[str, Domain]) -> dict[str, list[Any]]:
    """Return a space as plain values, for a checkpoint."""
    return {name: domain.plain() for name, domain in space.items()}


def from_plain(space: Mapping[str, list[Any]]) -> dict[str, Domain]:
    """Undo `plain`."""
    return {
        name: Range(kind, *rest) if kind in KINDS else Choice(tuple(rest))
        for name, (kind, *rest) in space.items()
    }


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _place(values: tuple[Any, ...], value: Any) -> int:
    """Return where a value stands: True is not 1 here, nor 1.0 the number 1."""
    return next(n for n, v in enumerate(values) if type(v) is type(value) and v == value)
