"""The learning rate as a pure function of progress: warmup, decay, and edits made on the way.

Progress is samples seen, counted in epochs, so the curve stays where it is when the batch size
changes. A schedule is written before each step and never read back from the optimizer; an edit gives
another schedule, so the curve of a run is the first schedule folded with its journal.

    factor 1.0        ________              warmup reaches 1, decay starts there
                    /         \\___
           0.01  __/              \\___
                 0  warmup_epochs     epochs
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

WARMUP_START = 0.01  # where a warmup begins; from 0 the first update would be wasted
WARMUPS = ("linear", "exponential")
DECAYS = ("constant", "multistep", "cosine", "exponential")


@dataclass(frozen=True)
class Schedule:
    """A factor on every group's learning rate, for a given progress.

    Args:
        epochs: Length of the run; only the cosine needs it.
        warmup_epochs: Where the warmup ends.
        warmup: "linear", or "exponential": linear on a log scale.
        decay: "constant"; "multistep": times gamma at each milestone; "cosine": to 0 at `epochs`;
            "exponential": times gamma an epoch, from the end of the warmup on.
        milestones: Epochs, for "multistep".
        gamma: The factor of "multistep" and "exponential".
        ramp_from: Where the warmup began: (progress, factor). An edit moves it; with a factor of 1 it
            is where the warmup ended.

    Source: gradual warmup as in Goyal et al. 2017, arXiv:1706.02677, section 2.2; the cosine from
    Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts.
    """

    epochs: float | None = None
    warmup_epochs: float = 0.0
    warmup: str = "linear"
    decay: str = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    ramp_from: tuple[float, float] = (0.0, WARMUP_START)

    def __post_init__(self) -> None:
        _one_of("warmup", self.warmup, WARMUPS)
        _one_of("decay", self.decay, DECAYS)
        if not (_is_number(self.warmup_epochs) and 0 <= self.warmup_epochs < math.inf):
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r} is not a length; use 0 or more.")
        if not (_is_number(self.gamma) and 0 < self.gamma < math.inf):
            raise ValueError(f"gamma={self.gamma!r} must be a number above 0, for example 0.1.")
        if self.decay == "multistep" and not self.milestones:
            raise ValueError('decay="multistep" needs milestones, for example (30, 60, 80).')
        if self.decay == "cosine":
            if self.epochs is None:
                raise ValueError('decay="cosine" needs epochs: it ends there.')
            if self.epochs <= self.warmup_epochs:
                raise ValueError(
                    f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs} "
                    "for the cosine. Shorten the warmup."
                )

    def __call__(self, progress: float) -> float:
        """Return the factor at a progress in epochs."""
        return self.ramp(progress) * self.fall(progress)

    @property
    def end(self) -> float:
        """Where the warmup ends and the decay starts."""
        begin, low = self.ramp_from
        return begin if low == 1.0 else max(begin, self.warmup_epochs)

    def ramp(self, progress: float) -> float:
        """Return the warmup's part of the factor: 1 from its end on."""
        begin, low = self.ramp_from
        progress = max(progress, begin)
        if progress >= self.end:
            return 1.0
        done = (progress - begin) / (self.end - begin)
        if self.warmup == "exponential":
            return float(low ** (1.0 - done))
        return low + (1.0 - low) * done

    def fall(self, progress: float) -> float:
        """Return the decay's part of the factor: 1 until the warmup ends or a milestone comes."""
        if self.decay == "multistep":
            return float(self.gamma ** sum(progress >= m for m in self.milestones))
        beyond = progress - self.end
        if self.decay == "constant" or beyond <= 0:
            return 1.0
        if self.decay == "exponential":
            return float(self.gamma**beyond)
        assert self.epochs is not None
        done = 1.0 if progress >= self.epochs else beyond / (self.epochs - self.end)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    def edited(self, progress: float, **changes: Any) -> Schedule:
        """Return the schedule that goes on from here with some fields changed.

        A warmup that is still going on keeps the factor it has reached and climbs from there to its
        new end; one that has ended stays ended where it did, so that the decay stays where it is; and
        one shortened to before now ends now.
        """
        if {"warmup", "warmup_epochs"} & changes.keys():
            changes["ramp_from"] = (min(progress, self.end), self.ramp(progress))
        return replace(self, **changes)


def linear_scaling(base_lr: float, base_batch: int, batch: int) -> float:
    """Return the learning rate for a batch: k times the batch, k times the rate.

    Args:
        base_lr: A rate known to be good.
        base_batch: The batch size, in samples, that it was good for.
        batch: The effective batch size: samples in one optimizer step.

    Source: the linear scaling rule, Goyal et al. 2017, arXiv:1706.02677, section 2.1.
    """
    return base_lr * batch / base_batch


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known. Use one of: {', '.join(allowed)}.")
