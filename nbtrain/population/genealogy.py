"""Who copied whom, as a picture: a row for each member, rounds from left to right, an arrow a copy.

The darker a slice, the better its score among all that there are; the winner's ancestry is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from nbtrain import frames, plots
from nbtrain.bar import number
from nbtrain.frames import BLUE, FAINT, ORANGE, RED, TEXT
from nbtrain.population import ancestry
from nbtrain.population.evolution import Evolution
from nbtrain.population.table import Row
from nbtrain.scales import Scale

WIDTH_IN, ROW_IN, HEAD_IN, FOOT_IN, MAX_ROWS_IN = 7.0, 0.36, 0.5, 0.46, 9.0
LEFT, RIGHT = 0.06, 0.875  # behind it stand the last scores
NUM_TICKS = 12
COLORS = LinearSegmentedColormap.from_list("scores", ["#dbe7f0", "#7fb0d3", BLUE, "#00304d"])
MEMBER, COPY = "#9ca3af", "#a89a86"


def picture(name: str, evolution: Evolution, rows: Sequence[Row], best: Row | None) -> Figure:
    """Draw the genealogy.

    Args:
        name: The title.
        evolution: How many members, and which scores are better.
        rows: The slices that are over.
        best: The winner's, or None.
    """
    rows_in = min(max(evolution.members, 3) * ROW_IN, MAX_ROWS_IN)
    height = HEAD_IN + rows_in + FOOT_IN
    num_rounds = max((row.round for row in rows), default=0) + 1
    figure = plots.Picture(figsize=(WIDTH_IN, height), dpi=plots.DPI)
    figure.set_facecolor("white")
    place = (LEFT, FOOT_IN / height, RIGHT - LEFT, rows_in / height)
    axes = frames.placed(figure, place)
    frames.title_of(figure, name)
    axes.set_xlabel("round", color=TEXT, fontsize=9, labelpad=2)
    frames.fit(axes, _rounds(num_rounds), _members(evolution.members))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[["left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if not rows:
        frames.note(axes, "no round yet")
        return figure
    winners = {row.key for row in ancestry.of(best, ancestry.by_key(rows))}
    size = min(200 / num_rounds, 60 * rows_in / max(evolution.members, 3), 11.0)
    _lines(axes, rows, winners, size)
    _slices(axes, rows, evolution, winners, size)
    _last(axes, rows, best)
    frames.legend(figure, _samples(rows), num_columns=4)
    return figure


def _rounds(num_rounds: int) -> Scale:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if num_rounds / s <= 2 * NUM_TICKS)
    ticks = tuple(float(n) for n in range(1, num_rounds + 1) if n % step == 0 or step == 1)
    return Scale(0.5, num_rounds + 0.5, ticks)


def _members(members: int) -> Scale:
    every = -(-members // 40)
    return Scale(-0.6, members - 0.4, tuple(map(float, range(0, members, every))))


def _place(key: tuple[int, int]) -> tuple[float, float]:
    return key[0] + 1.0, float(key[1])


def _lines(axes: Any, rows: Sequence[Row], winners: set[Any], size: float) -> None:
    """Draw each slice's way from the state it began with: a line, or an arrow where it is a copy."""
    own: list[list[tuple[float, float]]] = []
    wide: list[list[tuple[float, float]]] = []
    for row in rows:
        if row.source_key is None:
            continue
        ends = [_place(row.source_key), _place(row.key)]
        leads = row.key in winners
        if row.source == row.member:
            (wide if leads else own).append(ends)
            continue
        look: dict[str, Any] = {"color": ORANGE, "linewidth": 2.2} if leads else {"color": COPY}
        axes.add_patch(
            FancyArrowPatch(
                *ends,
                arrowstyle="-|>",
                mutation_scale=5 + 0.3 * size,
                shrinkA=size / 2,
                shrinkB=size / 2,
                **({"linewidth": 0.8, "zorder": 2} | look | ({"zorder": 4} if leads else {})),
            )
        )
    axes.add_collection(LineCollection(own, color=MEMBER, linewidth=0.9, zorder=1), autolim=False)
    axes.add_collection(LineCollection(wide, color=ORANGE, linewidth=2.2, zorder=3), autolim=False)


def _slices(
    axes: Any, rows: Sequence[Row], evolution: Evolution, winners: set[Any], size: float
) -> None:
    scored = [row for row in rows if row.score is not None]
    scores = np.array([row.score for row in scored])
    sign = 1 if evolution.direction == "max" else -1
    # By order and not by value: the first rounds' scores would make all later ones one colour.
    order = np.searchsorted(np.sort(sign * scores), sign * scores) / max(len(scores) - 1, 1)
    edges = [ORANGE if row.key in winners else "white" for row in scored]
    x, y = zip(*[_place(row.key) for row in scored], strict=True) if scored else ((), ())
    look = {"cmap": COLORS, "vmin": 0, "vmax": 1, "linewidths": 1.2, "zorder": 5}
    axes.scatter(x, y, s=size**2, c=order, edgecolors=edges, **look)
    failed = [_place(row.key) for row in rows if row.score is None]
    if failed:
        axes.plot(*zip(*failed, strict=True), "x", color=RED, markersize=0.8 * size, zorder=6)


def _last(axes: Any, rows: Sequence[Row], best: Row | None) -> None:
    """Write each member's last score behind its row."""
    newest = {row.member: row for row in rows}
    for member, row in newest.items():
        wins = best is not None and row.key == best.key
        axes.text(
            1.012,
            member,
            "failed" if row.score is None else number(row.score) + (" best" if wins else ""),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=TEXT if wins else FAINT,
            weight="bold" if wins else "normal",
        )


def _samples(rows: Sequence[Row]) -> list[Line2D]:
    dot: dict[str, Any] = {"linewidth": 0, "marker": "o", "markersize": 6}
    samples = [
        Line2D([], [], color=ORANGE, linewidth=2.2, label="leads to the best"),
        Line2D([], [], color=COLORS(1.0), label="high score", **dot),
        Line2D([], [], color=COLORS(0.0), label="low", **dot),
    ]
    if any(row.source not in (None, row.member) for row in rows):
        samples.insert(1, Line2D([], [], color=COPY, linewidth=1.2, label="copied, at the arrow"))
    return samples
