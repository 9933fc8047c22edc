"""The learning rate as a pure function of progress: warmup, decay, and edits made on the way.

Progress is samples seen, counted in epochs, so the curve stays where it is when the batch size
changes. A schedule is written before each step and never read back from the optimizer; an edit gives
another schedule, so the curve of a run is the first schedule folded with its journal.

    factor 1.0        ________              warmup reaches 1, decay starts there
                    /         \\___
           0.01  __/              \\___
                 0  warmup_epochs     epochs

An edit bends the curve only from there on, and without a jump: what is behind stays behind, a milestone
too, and what comes begins at the factor that was reached. Only from a factor of 0, where a decay has
ended, nothing could begin: there the new curve is taken as if it had been so from its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

WARMUP_START = 0.01  # where a warmup begins; from 0 the first update would be wasted
CONSTANT_START = 0.1  # where a constant one stays
ONECYCLE_START, ONECYCLE_FLOOR = 1 / 25, 1 / 25 / 1e4  # shares of the peak
ONECYCLE_RISE = 0.3  # share of the run
POWER = 0.9
MAX_CORNERS = 200  # that are worth drawing
WARMUPS = ("linear", "exponential", "cosine", "constant")
DECAYS = (
    *("constant", "multistep", "cosine", "exponential", "linear", "polynomial", "onecycle"),
    *("restarts", "plateau"),
)
FUNCTION = "function"  # a decay that a task brings
# What each decay is made of; one that is not here is made of nothing.
MADE_OF = {
    "multistep": {"milestones", "gamma", "floor"},
    "cosine": {"floor"},
    "exponential": {"gamma", "floor"},
    "linear": {"floor"},
    "polynomial": {"power", "floor"},
    "onecycle": {"floor"},
    "restarts": {"period", "multiplier", "floor"},
}
ENDING = ("cosine", "linear", "polynomial", "onecycle")  # these reach their floor at `epochs`


@dataclass(frozen=True)
class Schedule:
    """A factor on every group's learning rate, for a given progress.

    Args:
        epochs: Length of the run; for the decays that end there.
        warmup_epochs: Where the warmup ends.
        warmup: "linear"; "exponential": linear on a log scale; "cosine": half a wave; "constant": at
            `warmup_from` until it ends.
        decay: After the warmup. Down to `floor` at `epochs`: "cosine", "linear", and "polynomial", the
            `power` of what is left. "multistep": times gamma at each milestone; "exponential": times
            gamma an epoch; "restarts": a cosine over `period` epochs, again from 1, each cycle
            `multiplier` times as long as the one before; "plateau": times gamma where the journal says
            so; "onecycle": a warmup of 30 % of the run where no other is given, then a cosine.
        milestones: Epochs, for "multistep".
        gamma: The factor of "multistep", "exponential" and "plateau".
        warmup_from: The factor that a warmup begins with; None is 0.01, for "constant" 0.1 and for
            "onecycle" 1/25.
        power: Of "polynomial"; None is 0.9.
        floor: The least factor of the decay; None is 0, for "onecycle" 1/250,000.
        period: Epochs of the first cycle of "restarts".
        multiplier: None is 1, cycles of one length.
        function: Of progress, for decay "function": what a task brings.
        ramp_from: Where the warmup began: (progress, factor). An edit moves it; with a factor of 1 it
            is where the warmup ended.
        fall_from: Where the decay began: (progress, factor, share of it that is done), once an edit
            or a plateau has moved that from the end of the warmup.

    Source: gradual warmup as in Goyal et al. 2017, arXiv:1706.02677, section 2.2, the constant one as
    He et al. 2015, arXiv:1512.03385, section 4.2; cosine and restarts from Loshchilov and Hutter 2016,
    arXiv:1608.03983, equation 5; polynomial from Chen et al. 2016, arXiv:1606.00915, section 4.1; one
    cycle from Smith and Topin 2017, arXiv:1708.07120, with the numbers of torch's OneCycleLR, whose
    shape it has with warmup="cosine". Momentum is not cycled: torch's own as the task's scheduler does.
    """

    epochs: float | None = None
    warmup_epochs: float = 0.0
    warmup: str = "linear"
    decay: str = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup_from: float | None = None
    power: float | None = None
    floor: float | None = None
    period: float | None = None
    multiplier: float | None = None
    function: Callable[[float], float] | None = field(default=None, compare=False)
    ramp_from: tuple[float, float] | None = None
    fall_from: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        _one_of("warmup", self.warmup, WARMUPS)
        if self.decay != FUNCTION:
            _one_of("decay", self.decay, DECAYS)
        if not (_is_number(self.warmup_epochs) and 0 <= self.warmup_epochs < math.inf):
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r} is not a length; use 0 or more.")
        if not (_is_number(self.gamma) and 0 < self.gamma < math.inf):
            raise ValueError(f"gamma={self.gamma!r} must be a number above 0, for example 0.1.")
        _check_options(self)
        if not isinstance(self.milestones, (list, tuple)) or not all(
            _is_number(at) and math.isfinite(at) for at in self.milestones
        ):
            raise ValueError(f"milestones={self.milestones!r} must be a list of epochs: (30, 60, 80).")
        if self.decay == "multistep" and not self.milestones:
            raise ValueError('decay="multistep" needs milestones, for example (30, 60, 80).')
        if self.decay == "restarts" and self.period is None:
            raise ValueError('decay="restarts" needs period, in epochs, for example 10.')
        if self.decay == "plateau" and not self.gamma < 1:
            raise ValueError(f"gamma={self.gamma!r} lowers no rate at a plateau; use less than 1.")
        if self.decay in ENDING:
            if self.epochs is None:
                raise ValueError(f'decay="{self.decay}" needs epochs: it ends there.')
            if self.epochs <= self.warmup_epochs:
                raise ValueError(
                    f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs} "
                    f"for the {self.decay}. Shorten the warmup."
                )

    def __call__(self, progress: float) -> float:
        """Return the factor at a progress in epochs."""
        return self.ramp(progress) * self.fall(progress)

    @property
    def end(self) -> float:
        """Where the warmup ends and the decay starts."""
        begin, low = self._ramp_from
        return begin if low == 1.0 else max(begin, self._warmup_until)

    def ramp(self, progress: float) -> float:
        """Return the warmup's part of the factor: 1 from its end on."""
        begin, low = self._ramp_from
        progress = max(progress, begin)
        if progress >= self.end:
            return 1.0
        if self.warmup == "constant":
            return low
        done = (progress - begin) / (self.end - begin)
        if self.warmup == "exponential":
            return float(low ** (1.0 - done))
        if self.warmup == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return low + (1.0 - low) * done

    def fall(self, progress: float) -> float:
        """Return the decay's part of the factor: 1 until the warmup ends or a milestone comes.

        Raises:
            ValueError: a function of the task's gave no number from 0 up.
        """
        if self.decay == FUNCTION:
            return self._asked(progress)
        begin, top, _ = self.fall_from or (self.end, 1.0, 0.0)
        low = min(self._floor, top)
        if self.decay == "multistep":
            since = begin if self.fall_from is not None else -math.inf
            return max(
                low, float(top * self.gamma ** sum(since < m <= progress for m in self.milestones))
            )
        beyond, is_moved = progress - begin, self.fall_from is not None
        if self.decay in ("constant", "plateau") or beyond < 0 or (beyond == 0 and not is_moved):
            return top
        if self.decay == "exponential":
            return max(low, float(top * self.gamma**beyond))
        if self.decay == "restarts":
            number, done = self._cycle(beyond)
            return low + ((top if number == 0 else 1.0) - low) * _half_wave(done)
        done = self._done(progress)
        if self.decay == "linear":
            left = 1.0 - done
        elif self.decay == "polynomial":
            left = float((1.0 - done) ** (POWER if self.power is None else self.power))
        else:
            left = _half_wave(done)
        return low + (top - low) * left

    def edited(self, progress: float, **changes: Any) -> Schedule:
        """Return the schedule that goes on from here with some fields changed.

        Before anything is trained it is as if they had been so from the start. After that, a warmup
        that is still going on keeps the factor it has reached and climbs from there to its new end; one
        that has ended stays ended where it did; and one shortened to before now ends now. A decay that
        is going on hands the factor it has reached to the one that takes its place. With other `epochs`
        it spreads what is left of it over the epochs that are left; one that was at its end already
        takes the new length as if it had been so from its start. So does a decay that follows a factor
        of 0, which would otherwise stay 0 for ever. A function is what it is, everywhere.
        """
        new = replace(self, **changes)
        if progress <= 0:
            return new
        rises = (new._ramp_from, new._warmup_until), (self._ramp_from, self._warmup_until)
        if {"warmup", "warmup_epochs"} & changes.keys() or rises[0] != rises[1]:
            new = replace(new, ramp_from=(min(progress, self.end), self.ramp(progress)))
        if progress <= self.end:
            return new
        if new.decay != self.decay or changes.keys() & MADE_OF.get(new.decay, set()):
            factor = self.fall(progress)  # of which a decay is a share: nothing rises from 0
            return replace(new, fall_from=(progress, factor, 0.0) if factor else None)
        if self.decay in ENDING and new.epochs != self.epochs and progress < (self.epochs or 0):
            top = 1.0 if self.fall_from is None else self.fall_from[1]
            return replace(new, fall_from=(progress, top, self._done(progress)))
        return new

    def lowered(self, progress: float) -> Schedule:
        """Return the schedule that goes on from here with gamma times the factor: a plateau."""
        factor = self.fall(progress)
        factor = max(min(self._floor, factor), factor * self.gamma)
        return replace(self, fall_from=(progress, factor, 0.0))

    def corners(self, begin: float, end: float) -> list[float]:
        """Return where the curve has a corner or a jump, between two places."""
        found = [self.end, *self.milestones]
        if self.decay == "restarts":
            at, length = (self.fall_from or (self.end, 1.0, 0.0))[0], self.period or 1.0
            while at < end and len(found) < MAX_CORNERS:
                at, length = at + length, length * (self.multiplier or 1.0)
                found.append(at)
        return [float(at) for at in found if begin < at < end]

    # ---- what the fields come to

    @property
    def _ramp_from(self) -> tuple[float, float]:
        if self.ramp_from is not None:
            return self.ramp_from
        if self.warmup_from is not None:
            return 0.0, self.warmup_from
        if self.warmup == "constant":
            return 0.0, CONSTANT_START
        return 0.0, ONECYCLE_START if self.decay == "onecycle" else WARMUP_START

    @property
    def _warmup_until(self) -> float:
        if self.decay == "onecycle" and not self.warmup_epochs:
            return ONECYCLE_RISE * (self.epochs or 0.0)
        return self.warmup_epochs

    @property
    def _floor(self) -> float:
        if self.floor is not None:
            return self.floor
        return ONECYCLE_FLOOR if self.decay == "onecycle" else 0.0

    def _done(self, progress: float) -> float:
        """Return how much of a decay that ends is done."""
        assert self.epochs is not None
        begin, _, done = self.fall_from or (self.end, 1.0, 0.0)
        if progress >= self.epochs:
            return 1.0
        return done + (1.0 - done) * ((progress - begin) / (self.epochs - begin))

    def _cycle(self, beyond: float) -> tuple[int, float]:
        """Return which cycle of the restarts it is, and how much of it is done."""
        assert self.period is not None
        number, length, multiplier = 0, self.period, self.multiplier or 1.0
        if multiplier == 1.0:
            number, beyond = int(beyond // length), beyond % length
        while beyond >= length:
            number, beyond, length = number + 1, beyond - length, length * multiplier
        return number, beyond / length

    def _asked(self, progress: float) -> float:
        if self.function is None:
            raise ValueError(
                'decay="function" has no function here. Let build give it: Task(schedule=function).'
            )
        factor = self.function(progress)
        if not (_is_number(factor) and 0 <= factor < math.inf):
            raise ValueError(
                f"decay gave {factor!r} at progress {progress:g}. Let it return a number from 0 up, "
                "the factor on the learning rate."
            )
        return max(self._floor, float(factor))


def linear_scaling(base_lr: float, base_batch: int, batch: int) -> float:
    """Return the learning rate for a batch: k times the batch, k times the rate.

    Args:
        base_lr: A rate known to be good.
        base_batch: The batch size, in samples, that it was good for.
        batch: The effective batch size: samples in one optimizer step.

    Source: the linear scaling rule, Goyal et al. 2017, arXiv:1706.02677, section 2.1.
    """
    return base_lr * batch / base_batch


def _half_wave(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _check_options(schedule: Schedule) -> None:
    """Refuse what is given of the options that may be None, and makes no sense."""
    bounds: dict[str, tuple[Callable[[float], bool], str]] = {
        "warmup_from": (lambda x: 0 < x < 1, "a factor between 0 and 1, for example 0.01"),
        "floor": (lambda x: 0 <= x < 1, "a factor from 0 up and below 1: a share of the peak"),
        "power": (lambda x: 0 < x < math.inf, "a number above 0, for example 0.9"),
        "period": (lambda x: 0 < x < math.inf, "a number of epochs above 0, for example 10"),
        "multiplier": (lambda x: 1 <= x < math.inf, "a number from 1 up, for example 2"),
    }
    for name, (is_good, words) in bounds.items():
        value = getattr(schedule, name)
        if value is not None and not (_is_number(value) and is_good(value)):
            raise ValueError(f"{name}={value!r} must be {words}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known. Use one of: {', '.join(allowed)}.")
