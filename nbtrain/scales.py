"""The numbers of a figure: a running mean, fewer points, and where axes begin and end.

Limits stand on halves of ticks, so that an axis stays as it is while its curve grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_POINTS = 1000  # of a line; a screen is hardly wider
MIN_MEAN_ROWS, MEAN_SHARE = 10.0, 0.01  # how long the running mean is: rows at least, and of all rows
LOG_RANGE = 20.0  # highest by lowest loss; above it a linear axis shows the first minutes only
LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)  # of an axis of epochs, times a power of ten
LOG_DEPTH = 1e-6  # lowest by highest loss; a log axis goes no deeper, for a loss may be 0

Floats = npt.NDArray[np.float64]


class Scale(NamedTuple):
    """Where an axis begins and ends, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False


def smooth(values: Floats, smoothing: float | None = None) -> Floats:
    """Return the running mean, corrected for its start as Adam's are (arXiv:1412.6980).

    The mean over the last 2k values is the one over the last k, and the one before that, faded: so it
    takes a handful of passes over the array instead of a step for each value.

    Args:
        values: Of shape (rows,).
        smoothing: What is left of a value one row later; None fits it to the number of rows, so that
            a long run is no band of noise.
    """
    if smoothing is None:
        smoothing = 1 - 1 / max(MIN_MEAN_ROWS, MEAN_SHARE * len(values))
    mean = (1 - smoothing) * values
    reach, faded = 1, smoothing
    while reach < len(mean) and faded > 1e-16:
        mean[reach:] += faded * mean[:-reach]
        reach, faded = 2 * reach, faded * faded
    counts = np.arange(1, len(mean) + 1)
    return np.asarray(mean / -np.expm1(counts * math.log(smoothing)), np.float64)


def thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return at most `MAX_POINTS`: the ends, and the lowest and highest of each stretch, in order."""
    if len(y) <= MAX_POINTS:
        return x, y
    size = -(-len(y) // (MAX_POINTS // 2 - 2))
    starts = np.arange(0, len(y) - size + 1, size)
    stretches = y[: len(starts) * size].reshape(-1, size)
    last = y[len(y) - size :]  # what is left over is in it
    ends = [0, len(y) - size + last.argmin(), len(y) - size + last.argmax(), len(y) - 1]
    index = np.unique(
        np.concatenate([starts + stretches.argmin(1), starts + stretches.argmax(1), ends])
    )
    return x[index], y[index]


def linear(low: float, high: float, num_ticks: int) -> Scale:
    """Return an axis that holds both, with about so many round ticks."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / num_ticks
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    low, high = math.floor(low / step * 2) / 2 * step, math.ceil(high / step * 2) / 2 * step
    return Scale(low, high, _multiples(step, low, high))


def logarithmic(low: float, high: float) -> Scale:
    """Return a log axis that holds both, with at most seven ticks where decades allow."""
    low = float(10 ** (math.floor(math.log10(low) * 10) / 10))
    high = float(10 ** (math.ceil(math.log10(high) * 10) / 10))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: tuple[float, ...] = ()
    for each in ((1, 2, 5), (1, 3), (1,)):
        ticks = tuple(m * 10.0**k for k in decades for m in each if low <= m * 10.0**k <= high)
        if len(ticks) <= 7:
            break
    return Scale(low, high, ticks, is_log=True)


def losses(raw: Floats, means: Floats) -> Scale:
    """Return an axis for losses: linear, or logarithmic where they range far and are above 0.

    It holds every loss, but for the noise under the means on a log axis, which would fill it.
    """
    if not len(means):
        return linear(0.0, 1.0, 4)
    low, high = float(means.min()), float(max(means.max(), raw.max(initial=-math.inf)))
    lowest = float(min(low, raw.min(initial=math.inf)))
    if low > 0 and high / low > LOG_RANGE:
        return logarithmic(max(lowest, low / 2, high * LOG_DEPTH), high)
    return linear(0.0 if 0 < lowest < high / 3 else lowest, high, 4)


def rates(drawn: Iterable[Floats]) -> Scale:
    """Return an axis from 0 that holds learning rates, with a little room above the highest."""
    highest = max((float(each.max(initial=0.0)) for each in drawn), default=0.0)
    return linear(0.0, 1.04 * highest or 1.0, 3)


def epochs(end: float, *, is_endless: bool) -> Scale:
    """Return an axis from 0 to the end of the run, or to a length that stays a while."""
    end = end or 1.0
    if is_endless:  # each new axis costs as much as four pictures
        unit = 10.0 ** math.floor(math.log10(end))
        end = next(m * unit for m in LENGTHS if m * unit >= 0.999 * end)
    return _upto(end)


def zoomed(scale: Scale, reached: float) -> Scale:
    """Return an axis halved as long as it holds what is reached: else a run's start is a line."""
    high = scale.high
    while 0 < 2.2 * reached < high:
        high /= 2
    return scale if high == scale.high else _upto(high)


def _upto(high: float) -> Scale:
    ticks = linear(0.0, high, 10).ticks
    return Scale(0.0, high, tuple(tick for tick in ticks if tick <= high))


def _multiples(step: float, low: float, high: float) -> tuple[float, ...]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))
