"""The clock belongs to the machine, and what would run into the reserve is not begun."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

from nbtrain.budget import MARGIN, SLACK_S, Budget, seconds, size, words

HOUR_S = 3600.0


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("9h", 9 * HOUR_S),
        ("8h30m", 8.5 * HOUR_S),
        ("8h 30m", 8.5 * HOUR_S),
        ("45s", 45.0),
        ("1.5H", 1.5 * HOUR_S),
        ("1d2h3m4s", 93784.0),
        (3600, HOUR_S),
        (0.5, 0.5),
        (timedelta(hours=9), 9 * HOUR_S),
        (None, None),
        (math.inf, math.inf),
    ],
)
def test_a_duration_is_read_as_people_write_it(duration: Any, expected: float | None) -> None:
    assert seconds(duration) == expected


@pytest.mark.parametrize(
    "duration",
    ["", "9", "h", "9x", "9h-1m", "nine hours", "0s", 0, -3, math.nan, True, [9], timedelta(0)],
)
def test_what_is_no_duration_is_refused_with_one_that_is(duration: Any) -> None:
    with pytest.raises(ValueError, match='Write "9h"'):
        seconds(duration)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (None, "no limit"),
        (math.inf, "no limit"),
        (8.5 * HOUR_S, "8h30m"),
        (27 * HOUR_S, "27h00m"),
        (245, "4m05s"),
        (59.6, "1m00s"),
        (3599.7, "1h00m"),
        (12.2, "12s"),
        (0, "0s"),
        (-7, "0s"),
    ],
)
def test_seconds_are_written_as_people_do(duration: float | None, expected: str) -> None:
    assert words(duration) == expected


def test_time_counts_from_the_machines_start(clock: Clock) -> None:
    budget = Budget(9 * HOUR_S, 2 * HOUR_S, clock)
    assert budget.elapsed_s == 2 * HOUR_S
    assert budget.left_s == 7 * HOUR_S
    clock.advance(8 * HOUR_S)
    assert budget.left_s == -HOUR_S
    assert not budget.fits("window")


def test_time_in_which_the_machine_was_suspended_counts_as_the_clock_says(clock: Clock) -> None:
    budget = Budget(9 * HOUR_S, 0.0, clock)
    budget.observe("window", 1.0)
    assert budget.fits("window")
    clock.advance(8.99 * HOUR_S)  # one jump, in which this process did nothing
    assert not budget.fits("window")


def test_without_a_limit_everything_fits(clock: Clock) -> None:
    budget = Budget(None, 100 * HOUR_S, clock)
    budget.observe("save", 1e9)
    assert budget.left_s == math.inf
    assert budget.fits("validation")


def test_the_reserve_is_the_worst_save_and_copy_seen_with_a_margin(clock: Clock) -> None:
    budget = Budget(9 * HOUR_S, 0.0, clock)
    assert budget.reserve_s() == SLACK_S
    for cost in (3.0, 20.0, 5.0):
        budget.observe("save", cost)
    budget.observe("mirror", 100.0)
    budget.observe("validation", 40.0)
    assert budget.reserve_s() == MARGIN * 120.0 + SLACK_S
    assert budget.reserve_s(validation=True) == MARGIN * 160.0 + SLACK_S


def test_the_slack_of_a_short_budget_is_a_part_of_it(clock: Clock) -> None:
    assert Budget(100.0, 0.0, clock).reserve_s() == 2.0


@pytest.mark.parametrize("what", ["window", "validation"])
def test_what_would_run_into_the_reserve_is_not_begun(clock: Clock, what: str) -> None:
    budget = Budget(HOUR_S, 0.0, clock)
    budget.observe("save", 10.0)
    budget.observe(what, 300.0)
    last_start_s = HOUR_S - budget.reserve_s() - 300.0
    clock.advance(last_start_s - 0.5)
    assert budget.fits(what)
    clock.advance(1.0)
    assert not budget.fits(what)
    assert budget.fits("a thing that costs nothing")
    clock.advance(299.5)
    assert budget.left_s == budget.reserve_s(), "all of the reserve is left"


def test_only_the_last_64_costs_count(clock: Clock) -> None:
    budget = Budget(HOUR_S, 0.0, clock)
    budget.observe("window", 500.0)
    for _ in range(63):
        budget.observe("window", 1.0)
    assert budget.cost_s("window") == 500.0
    budget.observe("window", 1.0)
    assert budget.cost_s("window") == 1.0
    assert budget.cost_s("save") == 0.0


def test_a_limit_may_change_while_the_clock_goes_on(clock: Clock) -> None:
    budget = Budget(HOUR_S, 0.0, clock)
    clock.advance(1800.0)
    budget.limit_s = 2 * HOUR_S
    assert budget.left_s == 5400.0
    budget.limit_s = None
    assert budget.left_s == math.inf


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (48_300, "48 kB"),
        (999_600, "1.0 MB"),
        (1_240_000_000, "1.2 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_bytes_are_written_as_disks_are_sold(num_bytes: int, words: str) -> None:
    assert size(num_bytes) == words
