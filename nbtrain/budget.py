"""The wall clock that the host gives, what of it is left, and what still fits.

The clock belongs to the machine: it starts when the machine or container did and is never carried
over to the next one. What is kept back at the end, the reserve, is what a final save and its copy to
the store have cost on this machine, with a margin; and the validation too, when that is what comes
next. What would run into the reserve is not begun.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from nbtrain.errors import BudgetError

MARGIN = 1.5  # times the worst seen: the last save meets a fuller disk and a slower mount
SLACK_S = 60.0  # for the process to end and the host to notice, or 2 % of a short budget
UNKNOWN_LIMIT_S = 9 * 3600.0
UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def seconds(duration: str | float | timedelta | None) -> float | None:
    """Read a duration: "9h", "8h30m", "45s", a number of seconds, a timedelta, or None.

    Raises:
        ValueError: it is none of these, or not above zero.
    """
    if duration is None:
        return None
    if isinstance(duration, timedelta):
        value = duration.total_seconds()
    elif isinstance(duration, str):
        compact = duration.replace(" ", "").lower()
        if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", compact):
            raise ValueError(
                f'A duration of {duration!r} cannot be read. Write "9h", "8h30m", or seconds.'
            )
        value = sum(
            float(number) * UNITS_S[unit]
            for number, unit in re.findall(r"(\d+(?:\.\d+)?)([dhms])", compact)
        )
    elif isinstance(duration, (int, float)) and not isinstance(duration, bool):
        value = float(duration)
    else:
        raise ValueError(f'A duration of {duration!r} cannot be read. Write "9h" or seconds.')
    if not value > 0:
        raise ValueError(f'A duration of {duration!r} is not above zero. Write "9h" or None.')
    return value


def words(seconds: float | None) -> str:
    """Write seconds as people do: "8h30m", "4m05s", "12s"; "no limit" for None and infinity."""
    if seconds is None or seconds == float("inf"):
        return "no limit"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def size(num_bytes: int) -> str:
    """Write bytes as disks are sold: "48 kB", "1.2 GB"."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if value >= 10 or unit == "bytes" else f"{value:.1f} {unit}"


class Budget:
    """Seconds from the start of the machine to the planned end of training.

    Args:
        limit_s: Seconds that may pass since the machine's start; None for no limit.
        elapsed_s: Seconds that have passed already.
        clock: Monotonic seconds, counting those in which the machine was suspended.

    Attributes:
        working: Monotonic seconds for what is observed: a lid that was closed has cost neither a
            window nor a save so much.
    """

    def __init__(self, limit_s: float | None, elapsed_s: float, clock: Callable[[], float]) -> None:
        self.limit_s = limit_s
        self.clock = self.working = clock
        self._origin = clock() - elapsed_s
        self._seen: dict[str, deque[float]] = {}

    @property
    def elapsed_s(self) -> float:
        """Seconds since the machine's start."""
        return self.clock() - self._origin

    @property
    def left_s(self) -> float:
        """Seconds left, infinite without a limit, negative when over."""
        return float("inf") if self.limit_s is None else self.limit_s - self.elapsed_s

    def observe(self, what: str, seconds: float) -> None:
        """Remember what one "save", "mirror", "validation" or "window" has cost, in seconds."""
        self._seen.setdefault(what, deque(maxlen=64)).append(seconds)

    def cost_s(self, what: str) -> float:
        """The worst of the last 64 costs seen here, in seconds; 0 before the first."""
        return max(self._seen.get(what, ()), default=0.0)

    def reserve_s(self, *, validation: bool = False) -> float:
        """Seconds kept back for the final save and copy, and for a validation if one comes next."""
        cost = self.cost_s("save") + self.cost_s("mirror")
        if validation:
            cost += self.cost_s("validation")
        slack = SLACK_S if self.limit_s is None else min(SLACK_S, 0.02 * self.limit_s)
        return MARGIN * cost + slack

    def fits(self, what: str) -> bool:
        """Whether one more of this ends before the reserve begins."""
        if self.limit_s is None:
            return True
        return self.left_s - self.cost_s(what) >= self.reserve_s()


class HostClock(Protocol):
    """What is asked of a host here."""

    @property
    def name(self) -> str: ...
    @property
    def limit_s(self) -> float | None: ...
    @property
    def guard_s(self) -> float: ...
    @property
    def started_at(self) -> float: ...
    @property
    def clock(self) -> str: ...


def make_budget(
    here: HostClock,
    budget: str | float | None,
    started_at: float | None,
    clock: Callable[[], float],
) -> tuple[Budget, str]:
    """Return the budget, and in words how its start is known.

    Raises:
        BudgetError: it is over already.
    """
    limit_s: float | None
    if budget == "auto":
        known = here.limit_s is not None
        limit_s = here.limit_s - here.guard_s if here.limit_s is not None else UNKNOWN_LIMIT_S
        source = f"limit of {here.name} less a guard" if known else "9h, the host's limit is unknown"
    else:
        limit_s, source = seconds(budget), "as asked"
    elapsed_s = max(0.0, time.time() - (here.started_at if started_at is None else started_at))
    since = here.clock if started_at is None else "started_at as given"
    made = Budget(limit_s, elapsed_s, clock)
    if made.left_s <= 0:
        raise BudgetError(
            f"The budget of {words(limit_s)} is over already: "
            f"{words(elapsed_s)} have passed since {since}.\n"
            'Give a longer one, budget="12h", none with budget=None, or the true started_at=. '
            "Nothing was changed."
        )
    return made, f"{words(limit_s)} ({source}), counted from {since}"
