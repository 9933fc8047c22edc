"""The picture of a population: the scores of all members, and their hyperparameters, over progress.

Every line is a slice. In the scores a copy branches off from its donor, and what is replaced ends
there; in the hyperparameters a member jumps to what it goes on with. The slices that led to the best
state are drawn over all others: theirs is the schedule that a population finds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nbtrain import frames, plots, scales
from nbtrain.bar import number
from nbtrain.frames import BLUE, ORANGE, RED, TEXT
from nbtrain.population import ancestry
from nbtrain.population.evolution import Evolution
from nbtrain.population.space import Choice, Domain
from nbtrain.population.table import Key, Row
from nbtrain.scales import Scale

WIDTH_IN, HEAD_IN, SCORES_IN, EACH_IN, GAP_IN, FOOT_IN = 7.0, 0.52, 2.1, 0.78, 0.27, 0.42
LEFT, RIGHT = 0.095, 0.98
LIGHT = "#9db4c7"  # of members besides the best: many of them over each other are still light
NUM_TICKS, TICK_LETTERS = 5, 9
LEADING = {"color": ORANGE, "linewidth": 2.2}

Points = list[tuple[float, float]]


class Portrait:
    """The picture, made once: `draw` renews what it shows, `png` gives it.

    Any thread may call either; one waits for the other.

    Args:
        name: The title.
        evolution: Has the space, and which scores are better.
        metric: What members are judged by.
        epochs: Where they end, or None.
    """

    def __init__(self, name: str, evolution: Evolution, metric: str, epochs: int | None) -> None:
        self._space, self._epochs = evolution.space, epochs
        self._is_loss = evolution.direction == "min"
        self._lock = threading.Lock()
        height = HEAD_IN + SCORES_IN + (EACH_IN + GAP_IN) * len(self._space) + FOOT_IN
        self.figure = plots.Picture(figsize=(WIDTH_IN, height), dpi=plots.DPI)
        self.figure.set_facecolor("white")
        self._canvas: Any = FigureCanvasAgg(self.figure)
        bottom = height - HEAD_IN - SCORES_IN
        self._scores = self._axes(metric, bottom, SCORES_IN, height)
        self._hyper: dict[str, Any] = {}
        for name_of, domain in self._space.items():
            bottom -= EACH_IN + GAP_IN
            self._hyper[name_of] = self._axes(name_of, bottom, EACH_IN, height)
            _scaled(self._hyper[name_of], Scale(0.0, 1.0, ()), domain)
        lowest = [*self._hyper.values()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("epochs", color=TEXT, fontsize=9, labelpad=2)
        frames.title_of(self.figure, name)
        self._legend: Any = None
        self._lines: list[Any] = []
        self._frame: object = None  # all of the picture but its lines
        self._under: Any = None  # its pixels

    def draw(self, rows: Sequence[Row], best: Row | None) -> None:
        """Show these slices from now on, and what led to the best state."""
        with self._lock:
            for one in self._lines:
                one.remove()
            known = ancestry.by_key(rows)
            leading = ancestry.of(best, known)
            self._fit(rows)
            self._lines = _scores(self._scores, rows, leading, known)
            for name, axes in self._hyper.items():
                domain = self._space[name]
                values = {key: _height(domain, row.hyperparameters[name]) for key, row in known.items()}
                self._lines += _steps(axes, rows, leading, known, values)
            for line in self._lines:
                line.set_animated(True)

    def png(self) -> bytes:
        """Return the picture."""
        with self._lock:
            if self._under is None:
                self._canvas.draw()
                self._under = self._canvas.copy_from_bbox(self.figure.bbox)
            else:
                self._canvas.restore_region(self._under)
            for line in self._lines:
                line.axes.draw_artist(line)
            return plots.packed(self._canvas)

    def _axes(self, title: str, bottom_in: float, height_in: float, whole_in: float) -> Any:
        place = (LEFT, bottom_in / whole_in, RIGHT - LEFT, height_in / whole_in)
        axes = frames.placed(self.figure, place)
        at: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom"}
        axes.text(0.0, 1 + 0.04 / height_in, frames.short(title), color=TEXT, fontsize=8.5, **at)
        axes.tick_params(labelbottom=False)
        return axes

    def _fit(self, rows: Sequence[Row]) -> None:
        """Give the axes what these slices need, if that is other than it was."""
        end = max((row.progress for row in rows), default=0.0)
        whole = scales.epochs(max(self._epochs or 0.0, end), is_endless=self._epochs is None)
        x, heights = scales.zoomed(whole, end), [row.score for row in rows if row.score is not None]
        y = _score_scale(np.array(heights), is_loss=self._is_loss)
        copies = any(row.source not in (None, row.member) for row in rows)
        kinds = bool(rows), copies, len(heights) < len(rows)
        if (x, y, kinds) == self._frame:
            return
        self._frame, self._under = (x, y, kinds), None
        frames.fit(self._scores, x, y)
        for name, axes in self._hyper.items():
            _scaled(axes, x, self._space[name])
        if self._legend is not None:
            self._legend.remove()
        self._legend = frames.legend(self.figure, _samples(*kinds), num_columns=4)


def picture(
    name: str,
    evolution: Evolution,
    metric: str,
    epochs: int | None,
    rows: Sequence[Row],
    best: Row | None,
) -> Figure:
    """Draw the scores and hyperparameters of a population, once."""
    made = Portrait(name, evolution, metric, epochs)
    made.draw(rows, best)
    for axes in made.figure.axes:
        for line in (*axes.lines, *axes.collections, *axes.texts):
            line.set_animated(False)
    return made.figure


def words(rows: Sequence[Row], best: Row | None, metric: str) -> str:
    """Describe the picture in a line, for who does not see it."""
    if not rows:
        return "no round yet"
    members, rounds = {row.member for row in rows}, {row.round for row in rows}
    in_rounds = f"{len(rounds)} round{'s' if len(rounds) > 1 else ''}"
    told = f"{len(rows)} slices of {len(members)} members in {in_rounds}"
    if best is None or best.score is None:
        return f"{told}, no score yet"
    values = ", ".join(f"{name} {shown(value)}" for name, value in best.hyperparameters.items())
    return f"{told}, best {metric} {number(best.score)}: member {best.member} with {values}"


def shown(value: Any) -> str:
    """Write a hyperparameter in few letters."""
    is_number = isinstance(value, float) and not isinstance(value, bool)
    return f"{value:.3g}" if is_number else str(value)


def _samples(has_rows: bool, has_copies: bool, has_failed: bool) -> list[Line2D]:
    """Return what the legend names: only what is there."""
    dot: dict[str, Any] = {"linewidth": 0, "marker": "o", "markersize": 3.5, "color": BLUE}
    cross: dict[str, Any] = {"linewidth": 0, "marker": "x", "markersize": 5, "color": RED}
    kinds = [
        (has_rows, "leads to the best", LEADING),
        (has_rows, "others", {"color": LIGHT, "linewidth": 1.2}),
        (has_copies, "copied, explored", dot),
        (has_failed, "failed", cross),
    ]
    return [Line2D([], [], label=label, **look) for is_there, label, look in kinds if is_there]


def _scores(axes: Any, rows: Sequence[Row], leading: Sequence[Row], known: dict[Key, Row]) -> list[Any]:
    if not rows:
        return [frames.note(axes, "no round yet")]
    points = [(row.progress, row.score) for row in rows if row.score is not None]
    lines = LineCollection(_branches(rows, known), color=LIGHT, linewidth=1.0, alpha=0.8)
    drawn = [axes.add_collection(lines, autolim=False)]
    drawn += axes.plot(*_columns(points), "o", color=LIGHT, markersize=2.2, clip_on=False)
    path = [(row.progress, row.score) for row in leading if row.score is not None]
    drawn += axes.plot(*_columns(path), **LEADING, **{**frames.DOTS, "markersize": 5.0})
    failed = [(ancestry.begins(row, known), 0.03) for row in rows if row.score is None]
    low = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    drawn += axes.plot(*_columns(failed), "x", color=RED, markersize=5, **low)
    return drawn


def _score_scale(heights: Any, *, is_loss: bool) -> Scale:
    if not len(heights):
        return scales.linear(0.0, 1.0, 4)
    if is_loss:
        return scales.losses(np.zeros(0), heights)
    return scales.linear(float(heights.min()), float(heights.max()), 4)


def _branches(rows: Sequence[Row], known: dict[Key, Row]) -> list[Points]:
    """Return a line for each slice, from the score that its source ended with to its own."""
    pairs = [(known[row.source_key], row) for row in rows if row.source_key is not None]
    return [
        [(source.progress, source.score), (row.progress, row.score)]
        for source, row in pairs
        if source.score is not None and row.score is not None
    ]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _height(domain: Domain, value: Any) -> float:
    """Return where a value stands on its axis: one of a choice by its place."""
    if isinstance(domain, Choice):
        same = (n for n, v in enumerate(domain.values) if type(v) is type(value) and v == value)
        return float(next(same, math.nan))
    return float(value)


def _scaled(axes: Any, x: Scale, domain: Domain) -> None:
    """Give axes of a hyperparameter its bounds: they stay as they are while members move."""
    labels: list[str] | None = None
    if isinstance(domain, Choice):
        every = -(-len(domain.values) // NUM_TICKS)
        places = range(0, len(domain.values), every)
        y = Scale(-0.5, len(domain.values) - 0.5, tuple(map(float, places)))
        labels = [frames.short(str(domain.values[n]), TICK_LETTERS) for n in places]
    elif domain.kind == "loguniform":
        y = scales.logarithmic(domain.low / 1.1, domain.high * 1.1)
        decades = tuple(t for t in y.ticks if math.isclose(math.log10(t), round(math.log10(t))))
        ticks = decades if len(decades) > 1 else y.ticks
        y = y._replace(ticks=ticks[:: -(-len(ticks) // NUM_TICKS)])
    else:
        room = 0.08 * (domain.high - domain.low)
        ticks = scales.linear(domain.low, domain.high, NUM_TICKS).ticks
        inside = tuple(t for t in ticks if domain.low - room <= t <= domain.high + room)
        y = Scale(domain.low - room, domain.high + room, inside[:: -(-len(inside) // NUM_TICKS)])
    frames.fit(axes, x, y)
    axes.tick_params(axis="y", labelsize=7.5)
    if labels is not None:
        axes.yaxis.set_ticks(y.ticks, labels)


def _steps(
    axes: Any,
    rows: Sequence[Row],
    leading: Sequence[Row],
    known: dict[Key, Row],
    values: dict[Key, float],
) -> list[Any]:
    levels: list[Points] = []
    jumps: list[Points] = []
    copied: Points = []
    for row in rows:
        at, value = ancestry.begins(row, known), values[row.key]
        levels.append([(at, value), (max(row.progress, at), value)])
        before = values.get((row.round - 1, row.member))
        if row.source not in (None, row.member):
            copied.append((at, value))
        if before is not None and before != value:
            jumps.append([(at, before), (at, value)])
    look: dict[str, Any] = {"color": LIGHT, "alpha": 0.8}
    drawn = [
        axes.add_collection(LineCollection(levels, linewidth=1.0, **look), autolim=False),
        axes.add_collection(LineCollection(jumps, linewidth=0.6, **look), autolim=False),
    ]
    path = [
        (x, values[row.key]) for row in leading for x in (ancestry.begins(row, known), row.progress)
    ]
    drawn += axes.plot(*_columns(path), **LEADING)
    own = {"color": BLUE, "markersize": 2.6, "markeredgewidth": 0, "clip_on": False}
    drawn += axes.plot(*_columns(copied), "o", **own)
    return drawn
