"""A running mean that is the usual one, a curve that keeps its spikes, axes that hold their curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nbtrain import scales
from nbtrain.scales import Floats, smooth, thinned


def running_mean(values: Floats, smoothing: float) -> list[float]:
    """Return the mean as it is defined, one value after the other."""
    mean, found = 0.0, []
    for count, value in enumerate(values.tolist(), 1):
        mean = smoothing * mean + (1 - smoothing) * value
        found.append(mean / (1 - math.pow(smoothing, count)))
    return found


@pytest.mark.parametrize("smoothing", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 1000, 65_536])
def test_the_mean_is_the_one_of_its_definition(num_rows: int, smoothing: float) -> None:
    values = np.random.default_rng(0).normal(3, 1, num_rows)
    assert smooth(values, smoothing).tolist() == pytest.approx(
        running_mean(values, smoothing), rel=1e-9
    )


def test_a_longer_run_has_a_longer_mean() -> None:
    values = np.random.default_rng(0).normal(3, 1, 65_536)
    assert smooth(values[:900]).tolist() == smooth(values[:900], 0.9).tolist()
    assert np.std(smooth(values)[10_000:]) < 0.2 * np.std(smooth(values, 0.9)[10_000:])


@pytest.mark.parametrize("num_rows", [0, 1, 999, 1000, 1001, 1499, 1500, 65_535, 65_536])
def test_a_thinned_curve_keeps_its_ends_and_extremes_in_order(num_rows: int) -> None:
    x = np.arange(num_rows, dtype=np.float64)
    y = np.random.default_rng(num_rows).normal(0, 1, num_rows)
    few_x, few_y = thinned(x, y)
    assert len(few_x) == len(few_y) <= scales.MAX_POINTS
    assert few_y.tolist() == y[few_x.astype(int)].tolist()
    assert (np.diff(few_x) > 0).all()
    if num_rows:
        assert (few_x[0], few_x[-1]) == (0, num_rows - 1)
        assert (few_y.min(), few_y.max()) == (y.min(), y.max())


@pytest.mark.parametrize("at", [0, 1, 31_234, 65_401, 65_534, 65_535])
def test_no_spike_is_thinned_out(at: int) -> None:
    x, y = np.arange(65_536, dtype=np.float64), np.ones(65_536)
    y[at] = 9.0
    few_x, few_y = thinned(x, y)
    assert few_x[few_y == 9.0].tolist() == [at]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.3, 0.3), (0, 0), (-5, 3), (1e-9, 3e-9), (2, 2e9), (-7.1, -7.1)]
)
def test_an_axis_holds_its_curve_between_round_ticks(low: float, high: float) -> None:
    axis = scales.linear(low, high, 4)
    assert axis.low <= low <= high <= axis.high
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 7
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.5), (0.01, 9), (1e-6, 1), (3e-12, 7e5)])
def test_a_log_axis_holds_its_curve_between_round_ticks(low: float, high: float) -> None:
    axis = scales.logarithmic(low, high)
    assert axis.is_log
    assert axis.low <= low < high <= axis.high
    assert len(axis.ticks) >= 3
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


def test_a_run_without_end_gets_a_new_axis_a_few_times_for_each_ten_times_of_its_length() -> None:
    ends = np.linspace(1.0, 100.0, 2000)
    axes = [scales.epochs(end, is_endless=True) for end in ends]
    assert all(
        end <= axis.high * 1.001 and axis.high <= 1.55 * end
        for end, axis in zip(ends, axes, strict=True)
    )
    assert len(set(axes)) <= 16


def test_an_axis_stays_while_its_curve_grows_a_little() -> None:
    assert scales.linear(0.31, 2.2, 4) == scales.linear(0.3, 2.24, 4)
    assert scales.epochs(3.3, is_endless=True) == scales.epochs(3.45, is_endless=True)
    assert scales.zoomed(scales.epochs(20, is_endless=False), 3.0) == scales.zoomed(
        scales.epochs(20, is_endless=False), 4.4
    )


def test_losses_that_range_far_are_logarithmic_and_others_from_zero_or_from_where_they_are() -> None:
    def axis(*means: float) -> scales.Scale:
        return scales.losses(np.array(means), np.array(means))

    assert not axis(2.3, 0.4).is_log
    assert axis(2.3, 0.4).low == 0.0
    assert axis(2.3, 2.1).low > 1.0
    assert axis(2.3, 0.01).is_log
    assert not axis(2.3, 0.0).is_log
    assert axis(-30.0, 2.0).low <= -30.0


def test_a_loss_of_zero_does_not_draw_a_log_axis_down_for_ever() -> None:
    means = smooth(np.array([1.0] * 100 + [0.0] * 300), 0.9)
    axis = scales.losses(np.zeros(1), means)
    assert axis.is_log
    assert axis.low > 1e-7


def test_noise_under_the_means_does_not_fill_a_log_axis_but_a_spike_above_is_held() -> None:
    axis = scales.losses(np.array([1e-9, 400.0]), np.array([1.0, 0.1]))
    assert axis.low > 0.03
    assert axis.high >= 400.0


def test_the_start_of_a_run_is_zoomed_until_half_of_it_is_seen() -> None:
    whole = scales.epochs(20, is_endless=False)
    assert (whole.high, whole.ticks[-1]) == (20, 20)
    assert scales.zoomed(whole, 0.0) is scales.zoomed(whole, 12.0) is whole
    for reached in (1e-6, 0.04, 1.0, 4.0, 8.9):
        axis = scales.zoomed(whole, reached)
        assert 1.1 * reached <= axis.high <= max(2.2 * reached, 0)
        assert 2 <= len(axis.ticks) <= 11
        assert axis.ticks[-1] <= axis.high
