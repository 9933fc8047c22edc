"""The learning rate is a pure function of progress, and an edit bends it only from there on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from nbtrain.schedule import DECAYS, WARMUP_START, Schedule, linear_scaling

DECAYING: dict[str, dict[str, Any]] = {
    "constant": {"decay": "constant"},
    "multistep": {"decay": "multistep", "milestones": (8, 12)},
    "cosine": {"decay": "cosine", "epochs": 20},
    "exponential": {"decay": "exponential", "gamma": 0.9},
    "linear": {"decay": "linear", "epochs": 20},
    "polynomial": {"decay": "polynomial", "epochs": 20, "power": 2},
    "onecycle": {"decay": "onecycle", "epochs": 20},
    "restarts": {"decay": "restarts", "period": 40},
    "plateau": {"decay": "plateau"},
}
SMOOTH = [name for name in DECAYS if name != "multistep"]


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
@pytest.mark.parametrize("warmup", ["linear", "exponential", "cosine"])
def test_only_a_milestone_makes_the_curve_jump(warmup: str, decay: str) -> None:
    schedule = Schedule(warmup_epochs=5, warmup=warmup, **DECAYING[decay])
    curve = [schedule(i / 100) for i in range(2001)]
    jumps = [i for i in range(2000) if abs(curve[i + 1] - curve[i]) > 0.02]
    assert jumps == ([799, 1199] if decay == "multistep" else [])[: len(jumps)]
    assert len(jumps) == 2 * (decay == "multistep")
    assert max(curve) == 1.0


@pytest.mark.parametrize("changes", [{"warmup_epochs": 10}, {"warmup_epochs": 4}, {"warmup": "linear"}])
@pytest.mark.parametrize("warmup", ["linear", "exponential", "cosine"])
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


def test_a_cosine_warmup_is_half_a_wave() -> None:
    warmup = Schedule(warmup_epochs=4, warmup="cosine", warmup_from=0.2)
    assert [warmup(p) for p in (0, 2, 4)] == [0.2, pytest.approx(0.6, abs=1e-15), 1.0]
    assert warmup(1) - warmup(0) == pytest.approx(warmup(4) - warmup(3), abs=1e-15)
    assert warmup(1) - warmup(0) < warmup(2) - warmup(1)


def test_a_constant_warmup_stays_at_a_tenth_and_then_jumps() -> None:
    warmup = Schedule(warmup_epochs=2, warmup="constant", decay="exponential", gamma=0.5)
    assert [warmup(p) for p in (0, 1.999, 2, 3)] == [0.1, 0.1, 1.0, 0.5]
    assert Schedule(warmup_epochs=2, warmup="constant", warmup_from=0.3)(1) == 0.3
    assert Schedule(warmup_epochs=2, decay="constant")(0) == WARMUP_START


def test_a_warmup_that_becomes_another_in_its_middle_makes_no_jump() -> None:
    for one in ("linear", "exponential", "cosine", "constant"):
        for other in ("linear", "exponential", "cosine", "constant"):
            before = Schedule(warmup_epochs=5, warmup=one)
            after = before.edited(2.0, warmup=other, warmup_from=0.5)
            assert after(2.0) == pytest.approx(before(2.0), rel=1e-15)
            assert after(5.0) == 1.0


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


@pytest.mark.parametrize("decay", ["cosine", "exponential", "linear", "polynomial", "restarts"])
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


def test_before_anything_is_trained_an_edit_is_as_if_it_had_been_so_from_the_start() -> None:
    changes: dict[str, Any] = {"warmup_epochs": 5, "decay": "cosine", "epochs": 20, "floor": 0.1}
    assert Schedule().edited(0.0, **changes) == Schedule(**changes)


FLOORED: list[dict[str, Any]] = [
    *({**DECAYING[name], "floor": 0.25} for name in ("cosine", "linear", "polynomial", "onecycle")),
    {"decay": "multistep", "milestones": (3, 6), "floor": 0.25},
    {"decay": "exponential", "gamma": 0.5, "floor": 0.25},
    {"decay": "restarts", "period": 7, "floor": 0.25},
]


@pytest.mark.parametrize("fields", FLOORED, ids=lambda fields: fields["decay"])
def test_no_decay_falls_below_its_floor(fields: dict[str, Any]) -> None:
    schedule = Schedule(warmup_epochs=2, **fields)
    curve = [schedule(2 + i / 50) for i in range(1800)]
    assert max(curve) == 1.0
    lowest = pytest.approx(0.25, rel=1e-3) if fields["decay"] == "restarts" else 0.25
    assert min(curve) == lowest
    assert min(curve) >= 0.25


def test_a_polynomial_is_a_power_of_what_is_left_and_a_linear_decay_its_first() -> None:
    line = Schedule(epochs=10, decay="linear")
    assert [line(p) for p in (0, 2.5, 5, 10, 12)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    square = Schedule(epochs=10, decay="polynomial", power=2)
    assert [square(p) for p in (0, 5, 10)] == [1.0, 0.25, 0.0]
    assert Schedule(epochs=10, decay="polynomial")(5) == 0.5**0.9


def test_restarts_begin_again_at_one_each_cycle_longer_than_the_last() -> None:
    even = Schedule(decay="restarts", period=4)
    assert [even(p) for p in (0, 4, 8, 2, 10)] == [1.0] * 3 + [pytest.approx(0.5, abs=1e-15)] * 2
    longer = Schedule(warmup_epochs=1, decay="restarts", period=2, multiplier=2)
    assert [longer(p) for p in (1, 3, 7, 15)] == [1.0] * 4
    assert [longer(p) for p in (2, 5, 11)] == [pytest.approx(0.5, abs=1e-15)] * 3
    assert longer(math.nextafter(3, 0)) < 1e-15
    assert longer.corners(0, 20) == [1.0, 3.0, 7.0, 15.0]


def test_one_cycle_rises_over_three_tenths_unless_a_warmup_is_given() -> None:
    cycle = Schedule(epochs=20, decay="onecycle")
    assert (cycle.end, cycle(0), cycle(6), cycle(20)) == (6.0, 0.04, 1.0, 1 / 25 / 1e4)
    assert Schedule(epochs=20, decay="onecycle", warmup_epochs=2).end == 2


def torchs(make: Any, num_steps: int) -> list[float]:
    """Return the rates that a scheduler of torch's gives a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


TORCHS: dict[str, tuple[Schedule, Any]] = {
    "cosine": (
        Schedule(epochs=40, decay="cosine", floor=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.1),
    ),
    "polynomial": (
        Schedule(epochs=40, decay="polynomial", power=3),
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=40, power=3),
    ),
    "restarts": (
        Schedule(decay="restarts", period=5, multiplier=2, floor=0.01),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2, eta_min=0.01),
    ),
    "onecycle": (
        Schedule(epochs=40, warmup_epochs=12, warmup="cosine", decay="onecycle"),
        # Its own phases end at pct_start * total_steps - 1 and total_steps - 1.
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=41, pct_start=13 / 41),
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_the_shapes_are_those_of_torchs_schedulers(name: str) -> None:
    schedule, make = TORCHS[name]
    assert [schedule(p) for p in range(40)] == pytest.approx(torchs(make, 40), rel=1e-9)


@pytest.mark.parametrize("other", SMOOTH)
@pytest.mark.parametrize("one", SMOOTH)
def test_a_decay_that_becomes_another_goes_on_from_the_factor_reached(one: str, other: str) -> None:
    common = {"warmup_epochs": 5, "epochs": 20, "period": 8}
    before = Schedule(**common | DECAYING[one])
    after = before.edited(11.0, **{"period": 9} | DECAYING[other])
    assert after(11.0) == pytest.approx(before(11.0), rel=1e-14)
    if one != other and other in ("cosine", "linear", "polynomial", "onecycle"):
        assert after(20) == after._floor, "and still ends at its floor"
    for name, change in (("gamma", 0.7), ("power", 3.0), ("floor", 0.05), ("multiplier", 3)):
        edited = before.edited(11.0, **{name: change})
        assert edited(11.0) == pytest.approx(before(11.0), rel=1e-14), name


def test_what_does_not_concern_a_decay_leaves_it_alone() -> None:
    before = Schedule(epochs=20, decay="cosine", warmup_epochs=5)
    after = before.edited(9.0, gamma=0.3, power=2.0, milestones=(7,), period=3.0)
    assert [after(i / 9) for i in range(200)] == [before(i / 9) for i in range(200)]


def test_a_milestone_that_is_behind_stays_behind() -> None:
    before = Schedule(decay="multistep", milestones=(3, 6, 9), gamma=0.1)
    after = before.edited(4.0, gamma=0.5)
    assert [after(p) for p in (4, 5.9, 6, 9)] == [0.1, 0.1, 0.05, 0.025]
    moved = before.edited(4.0, milestones=(2, 8))
    assert [moved(p) for p in (4, 7.9)] == [0.1, 0.1]
    assert moved(8) == pytest.approx(0.01)


@pytest.mark.parametrize("decay", ["cosine", "linear", "polynomial", "onecycle"])
@pytest.mark.parametrize("epochs", [14, 30])
def test_another_length_spreads_what_is_left_over_the_epochs_that_are_left(
    decay: str, epochs: int
) -> None:
    before = Schedule(warmup_epochs=5, **DECAYING[decay])
    after = before.edited(11.0, epochs=epochs)
    assert after(11.0) == pytest.approx(before(11.0), rel=1e-14)
    assert after(epochs) == before(20)
    middle = 11 + (epochs - 11) / 2
    assert after(middle) == pytest.approx(before(15.5), rel=1e-13)
    assert after.edited(12.0, epochs=25)(12.0) == pytest.approx(after(12.0), rel=1e-13)


def test_a_run_made_longer_after_its_end_trains_on_the_longer_curve() -> None:
    longer = Schedule(epochs=20, decay="cosine").edited(20.0, epochs=40)
    assert longer == Schedule(epochs=40, decay="cosine")
    assert longer(20) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("at", [20.0, 26.0])
@pytest.mark.parametrize("other", [*SMOOTH, "constant", "multistep"])
@pytest.mark.parametrize("ended", ["cosine", "linear", "polynomial"])
def test_after_a_decay_that_ended_at_zero_another_is_as_if_so_from_its_start(
    ended: str, other: str, at: float
) -> None:
    before = Schedule(epochs=20, warmup_epochs=5, decay=ended)
    fields: dict[str, Any] = {"floor": 0.1} if other == ended else DECAYING.get(other, {})
    changes = {"decay": other} | fields | {"epochs": 40}
    after = before.edited(at, **changes)
    assert after(at) > 0
    fresh = replace(before, **changes)
    assert [after(at + i / 7) for i in range(200)] == [fresh(at + i / 7) for i in range(200)]
    apart = before.edited(at, epochs=30).edited(at, **changes)
    assert apart(at) > 0, "and edit by edit"


def test_a_decay_that_ended_at_a_floor_hands_it_over() -> None:
    before = Schedule(epochs=20, decay="cosine", floor=0.01)
    assert before.edited(20.0, epochs=40, decay="constant")(30) == 0.01


def test_a_one_cycle_made_longer_in_its_rise_keeps_what_it_has_reached() -> None:
    before = Schedule(epochs=20, decay="onecycle")
    after = before.edited(4.0, epochs=40)
    assert after(4.0) == pytest.approx(before(4.0), rel=1e-15)
    assert (after.end, after(12.0)) == (12.0, 1.0)


def test_a_plateau_lowers_by_gamma_down_to_the_floor() -> None:
    schedule = Schedule(decay="plateau", gamma=0.5, floor=0.2)
    found = []
    for at in (3.0, 5.0, 8.0, 9.0):
        schedule = schedule.lowered(at)
        found.append(schedule(at + 0.1))
    assert found == [0.5, 0.25, 0.2, 0.2]
    assert schedule.edited(10.0, decay="cosine", epochs=20, floor=None)(10.0) == 0.2


def test_a_function_is_the_factor_after_the_warmup_and_before_it() -> None:
    schedule = Schedule(warmup_epochs=2, decay="function", function=lambda at: 1 / (1 + at))
    assert [schedule(p) for p in (1, 2, 4)] == [pytest.approx(0.505 / 2), 1 / 3, 0.2]
    assert schedule.edited(4.0, decay="linear", epochs=8)(6.0) == 0.1


@pytest.mark.parametrize("gives", [math.nan, math.inf, -0.1, None, "1", True])
def test_a_function_that_gives_no_factor_is_refused(gives: Any) -> None:
    with pytest.raises(
        ValueError, match=r"decay gave .* at progress 3\. Let it return a number from 0"
    ):
        Schedule(decay="function", function=lambda at: gives)(3.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": "sine"}, "linear, exponential, cosine, constant"),
        ({"decay": "step"}, "constant, multistep, cosine, exponential"),
        ({"warmup_epochs": -1}, "use 0 or more"),
        ({"warmup_epochs": math.nan}, "use 0 or more"),
        ({"warmup_epochs": math.inf}, "use 0 or more"),
        ({"warmup_epochs": "5"}, "use 0 or more"),
        ({"gamma": 0}, "for example 0.1"),
        ({"gamma": math.nan}, "for example 0.1"),
        ({"gamma": None}, "for example 0.1"),
        ({"decay": "multistep"}, r"for example \(30, 60, 80\)"),
        ({"milestones": 30}, "must be a list of epochs"),
        ({"milestones": (30, "60")}, "must be a list of epochs"),
        ({"milestones": (math.nan,)}, "must be a list of epochs"),
        ({"decay": "cosine"}, "needs epochs"),
        ({"decay": "cosine", "epochs": 5, "warmup_epochs": 5}, "Shorten the warmup"),
        ({"decay": "onecycle"}, "needs epochs"),
        ({"decay": "linear", "epochs": 5, "warmup_epochs": 6}, "for the linear. Shorten the warmup"),
        ({"decay": "restarts"}, "needs period"),
        ({"decay": "plateau", "gamma": 1}, "use less than 1"),
        ({"period": 0}, "epochs above 0"),
        ({"multiplier": 0.5}, "from 1 up"),
        ({"power": -1}, "above 0"),
        ({"floor": 1}, "below 1"),
        ({"floor": "0.1"}, "below 1"),
        ({"warmup_from": 0}, "between 0 and 1"),
        ({"warmup_from": math.nan}, "between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_way_out(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_k_times_the_batch_has_k_times_the_rate() -> None:
    assert linear_scaling(0.1, 256, 8192) == 0.1 * 32
    assert linear_scaling(0.1, 256, 64) == 0.1 / 4
