"""The learning rate is a pure function of progress, and an edit bends it only from there on."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from nbtrain.schedule import DECAYS, WARMUP_START, Schedule, linear_scaling

DECAYING: dict[str, dict[str, Any]] = {
    "constant": {"decay": "constant"},
    "multistep": {"decay": "multistep", "milestones": (8, 12)},
    "cosine": {"decay": "cosine", "epochs": 20},
    "exponential": {"decay": "exponential", "gamma": 0.9},
}


def test_a_linear_warmup_climbs_in_equal_steps_from_a_hundredth_to_one() -> None:
    warmup = Schedule(warmup_epochs=5)
    assert warmup(0) == WARMUP_START == 0.01
    assert warmup(2.5) == pytest.approx(0.505, abs=1e-15)
    steps = [warmup(i + 1) - warmup(i) for i in range(5)]
    assert max(steps) - min(steps) < 1e-15
    assert warmup(5) == 1.0


def test_an_exponential_warmup_is_linear_on_a_log_scale() -> None:
    warmup = Schedule(warmup_epochs=5, warmup="exponential")
    assert warmup(0) == pytest.approx(0.01, abs=1e-17)
    assert warmup(2.5) == pytest.approx(0.1, abs=1e-15)
    ratios = [warmup(i + 1) / warmup(i) for i in range(5)]
    assert max(ratios) - min(ratios) < 1e-14
    assert warmup(5) == 1.0


def test_without_warmup_the_first_factor_is_one() -> None:
    assert [Schedule()(p) for p in (0, 0.5, 100)] == [1.0, 1.0, 1.0]


def test_a_multistep_decay_falls_at_each_milestone() -> None:
    steps = Schedule(decay="multistep", milestones=(3, 6), gamma=0.5)
    assert [steps(p) for p in (0, 2.999, 3, 5.999, 6, 50)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_a_cosine_begins_at_the_warmups_end_and_ends_at_zero() -> None:
    cosine = Schedule(epochs=25, warmup_epochs=5, decay="cosine")
    assert cosine(5) == 1.0
    assert cosine(15) == pytest.approx(0.5, abs=1e-15)
    assert cosine(20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.75)), abs=1e-15)
    assert cosine(25) == 0.0
    assert cosine(26) == 0.0


def test_an_exponential_decay_multiplies_by_gamma_an_epoch_from_the_warmups_end() -> None:
    decay = Schedule(warmup_epochs=2, decay="exponential", gamma=0.5)
    assert [decay(p) for p in (2, 3, 5, 2.5)] == [1.0, 0.5, 0.125, 0.5**0.5]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", ["linear", "exponential"])
def test_only_a_milestone_makes_the_curve_jump(warmup: str, decay: str) -> None:
    schedule = Schedule(warmup_epochs=5, warmup=warmup, **DECAYING[decay])
    curve = [schedule(i / 100) for i in range(2001)]
    jumps = [i for i in range(2000) if abs(curve[i + 1] - curve[i]) > 0.02]
    assert jumps == ([799, 1199] if decay == "multistep" else [])[: len(jumps)]
    assert len(jumps) <= 2
    assert max(curve) == 1.0


@pytest.mark.parametrize("changes", [{"warmup_epochs": 10}, {"warmup_epochs": 4}, {"warmup": "linear"}])
@pytest.mark.parametrize("warmup", ["linear", "exponential"])
def test_an_edit_inside_the_warmup_goes_on_from_the_factor_reached(
    warmup: str, changes: dict[str, Any]
) -> None:
    before = Schedule(warmup_epochs=5, warmup=warmup)
    after = before.edited(3.0, **changes)
    assert after(3.0) == pytest.approx(before(3.0), rel=1e-15)
    assert after.end == changes.get("warmup_epochs", 5)
    assert after(after.end) == 1.0
    climb = [after(3.0 + i / 50) for i in range(400)]
    assert climb == sorted(climb)
    assert max(b - a for a, b in pairwise(climb)) < 0.04


def test_a_second_edit_inside_the_warmup_goes_on_from_the_first() -> None:
    once = Schedule(warmup_epochs=5).edited(2.0, warmup_epochs=8)
    twice = once.edited(4.0, warmup_epochs=6)
    assert twice(4.0) == once(4.0)
    assert twice(5.0) == pytest.approx((once(4.0) + 1) / 2, abs=1e-15)
    assert twice(6.0) == 1.0


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "changes", [{"warmup_epochs": 12}, {"warmup_epochs": 0}, {"warmup": "exponential"}]
)
def test_an_edit_after_the_warmup_changes_nothing(decay: str, changes: dict[str, Any]) -> None:
    before = Schedule(warmup_epochs=5, **DECAYING[decay])
    places = [7 + i / 10 for i in range(150)]
    once = before.edited(7.0, **changes)
    twice = once.edited(9.0, warmup_epochs=11)
    assert [once(p) for p in places] == [before(p) for p in places]
    assert [twice(p) for p in places] == [before(p) for p in places]


@pytest.mark.parametrize("decay", ["cosine", "exponential"])
def test_a_warmup_shortened_to_before_now_ends_now_and_the_decay_starts_there(decay: str) -> None:
    after = Schedule(warmup_epochs=5, **DECAYING[decay]).edited(3.0, warmup_epochs=1)
    assert after.end == 3.0
    assert after(3.0) == 1.0
    fresh = Schedule(warmup_epochs=3, **DECAYING[decay])
    assert [after(3 + i / 7) for i in range(100)] == [fresh(3 + i / 7) for i in range(100)]


def test_an_edit_of_the_decay_leaves_the_warmup_where_it_is() -> None:
    before = Schedule(warmup_epochs=5)
    after = before.edited(2.0, decay="cosine", epochs=20)
    assert [after(i / 10) for i in range(50)] == [before(i / 10) for i in range(50)]
    assert after(20) == 0.0


def test_a_run_shortened_to_before_its_cosine_began_stays_at_zero() -> None:
    ended = Schedule(epochs=20, warmup_epochs=5, decay="cosine").edited(5.5, warmup_epochs=1)
    short = ended.edited(5.5, epochs=4)
    assert [short(p) for p in (5.5, 6, 20)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": "cosine"}, "linear, exponential"),
        ({"decay": "step"}, "constant, multistep, cosine, exponential"),
        ({"warmup_epochs": -1}, "use 0 or more"),
        ({"warmup_epochs": math.nan}, "use 0 or more"),
        ({"warmup_epochs": math.inf}, "use 0 or more"),
        ({"warmup_epochs": "5"}, "use 0 or more"),
        ({"gamma": 0}, "for example 0.1"),
        ({"gamma": math.nan}, "for example 0.1"),
        ({"gamma": None}, "for example 0.1"),
        ({"decay": "multistep"}, r"for example \(30, 60, 80\)"),
        ({"decay": "cosine"}, "needs epochs"),
        ({"decay": "cosine", "epochs": 5, "warmup_epochs": 5}, "Shorten the warmup"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_way_out(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_k_times_the_batch_has_k_times_the_rate() -> None:
    assert linear_scaling(0.1, 256, 8192) == 0.1 * 32
    assert linear_scaling(0.1, 256, 64) == 0.1 / 4
