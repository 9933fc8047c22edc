"""From one round's scores to the next round's turns: who goes on, who copies whom, with what.

A plan is a function of the scores and hyperparameters of a round that is over, of the seed, and of
nothing else: it is never kept, and comes out the same in every process. Members are ordered by (score,
number), so that there are no ties; a score that is not finite is worst.

    pbt        the worst copy one of the best, and explore: each hyperparameter is drawn anew or moved
    random     nobody copies: random search, with the same first draw
    halving    the worst end, and what they would have cost is not spent

Source: truncation selection and perturb-or-resample as in Jaderberg et al. 2017, arXiv:1711.09846; as
many in the quantile as Ray Tune counts, ceil(members * quantile). Unlike there a member that failed is
always replaced, and no value leaves its bounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbtrain import randomness
from nbtrain.population.space import Domain

MODES = ("pbt", "random", "halving")


@dataclass(frozen=True)
class Change:
    """One hyperparameter that a member explores: how is "perturb" or "resample"."""

    what: str
    how: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Turn:
    """What a member does in a round.

    Args:
        round: Counted from 0.
        member: Who.
        source: From whose state at the end of the round before; None begins afresh.
        hyperparameters: With what.
        changes: What is other than the source's.
    """

    round: int
    member: int
    source: int | None
    hyperparameters: Mapping[str, Any]
    changes: tuple[Change, ...] = ()

    @property
    def key(self) -> tuple[int, int]:
        """Name the slice, and the state that it ends in."""
        return self.round, self.member

    @property
    def is_exploit(self) -> bool:
        """Whether the member goes on from another one's state."""
        return self.source not in (None, self.member)


@dataclass(frozen=True)
class Evolution:
    """How a population goes from round to round.

    Args:
        space: The hyperparameters' domains.
        members: How many.
        seed: Of every draw.
        mode: One of `MODES`.
        quantile: The part that is replaced in a round, and the part that is copied; or that ends.
        factors: What a value is multiplied by when it is moved.
        resample: How likely a value is drawn anew instead.
        direction: "max" or "min": which scores are better.
        fixed: Names that shape the model: they travel with its weights and are not explored.

    Raises:
        ValueError: an argument makes no sense.
    """

    space: Mapping[str, Domain]
    members: int
    seed: int
    mode: str = "pbt"
    quantile: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.2)
    resample: float = 0.25
    direction: str = "max"
    fixed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if type(self.members) is not int or self.members < 2:
            raise ValueError(f"members={self.members!r} must be a whole number from 2 up.")
        for name, words in (("mode", MODES), ("direction", ("max", "min"))):
            if (word := getattr(self, name)) not in words:
                raise ValueError(f"{name}={word!r} is not known. Use one of: {', '.join(words)}.")
        if not (_is_number(self.quantile) and 0 < self.quantile <= 0.5):
            raise ValueError(
                f"quantile={self.quantile!r} must be above 0 and at most 0.5: "
                "nobody is both replaced and copied."
            )
        if not (_is_number(self.resample) and 0 <= self.resample <= 1):
            raise ValueError(f"resample={self.resample!r} must be a probability, from 0 to 1.")
        good = [_is_number(f) and 0 < f < math.inf and f != 1 for f in self.factors]
        if not good or not all(good):
            raise ValueError(f"factors={self.factors!r} must be numbers above 0 and not 1: (0.8, 1.2).")

    def first(self) -> list[Turn]:
        """Return the turns of round 0: every member afresh, with hyperparameters of its own draw."""
        return [
            Turn(0, member, None, {name: self._drawn(name, 0, member) for name in self.space})
            for member in range(self.members)
        ]

    def plan(
        self,
        round: int,
        scores: Mapping[int, float | None],
        hyperparameters: Mapping[int, Mapping[str, Any]],
    ) -> list[Turn]:
        """Return a round's turns, by member.

        Args:
            round: The one to plan.
            scores: By member, of the round before; None for one that failed.
            hyperparameters: By member, those it had there.
        """
        order = self.order(scores)
        good = [member for member in order if _is_finite(scores[member])]
        count = min(max(1, math.ceil(round_off(len(order) * self.quantile))), len(order) // 2)
        stays = {member: Turn(round, member, member, hyperparameters[member]) for member in good}
        if self.mode == "halving":
            alive = good[: max(len(order) - count, 1)]
            return [stays[member] for member in sorted(alive)]
        if self.mode == "pbt" and good:
            donors = good[:count] or good[:1]
            for member in [*order[len(order) - count :], *(m for m in order if m not in stays)]:
                if member not in donors:
                    stays[member] = self._exploit(round, member, donors, hyperparameters)
        return [stays[member] for member in sorted(stays)]

    def order(self, scores: Mapping[int, float | None]) -> list[int]:
        """Return the members from the best to the worst."""
        sign = -1.0 if self.direction == "max" else 1.0

        def rank(member: int) -> tuple[bool, float, int]:
            score = scores[member]
            if score is None or not math.isfinite(score):
                return True, 0.0, member
            return False, sign * score, member

        return sorted(scores, key=rank)

    def _exploit(
        self,
        round: int,
        member: int,
        donors: list[int],
        hyperparameters: Mapping[int, Mapping[str, Any]],
    ) -> Turn:
        rng = self._rng("donor", round, member)
        donor = donors[int(rng.random() * len(donors))]
        values = dict(hyperparameters[donor])
        changes = []
        for name, domain in self.space.items():
            if name in self.fixed:
                continue
            # A generator for each, so that one more hyperparameter moves none of the others.
            rng = self._rng(name, round, member)
            old = values[name]
            if rng.random() < self.resample:
                how, new = "resample", self._drawn(name, round, member)
            else:
                factor = self.factors[int(rng.random() * len(self.factors))]
                how, new = "perturb", domain.perturb(old, factor)
            values[name] = new
            if new != old:
                changes.append(Change(name, how, old, new))
        return Turn(round, member, donor, values, tuple(changes))

    def _drawn(self, name: str, round: int, member: int) -> Any:
        return self.space[name].sample(self._rng("draw", round, member, name))

    def _rng(self, *words: int | str) -> random.Random:
        return random.Random(randomness.key(self.seed, "pbt", *words))


def round_off(value: float) -> float:
    """Return 7 for the 7.000000000000001 that 100 * 0.07 is."""
    return round(value, 9)


def _is_finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
