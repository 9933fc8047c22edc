"""What stands around the lines of a figure: axes, marks, texts and the legend, in one look.

Every colour is given: a user's style may ask for light texts, and may change while a run is drawn. The
face is white and opaque, for no grey of a transparent one reads well on both white and black.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from nbtrain.scales import Scale

TEXT, FAINT, GRID = "#374151", "#6b7280", "#e5e7eb"
# Okabe and Ito's colours, which stay apart for the colour-blind; the last is darker, to be read.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#8b3a7a"
WIDTH = 1.7
DOTS: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white", "clip_on": False}
MAX_LETTERS = 32  # of the text of a mark
TITLE_LETTERS = 24  # the legend is beside it
LETTER = 0.0095  # width of a mark's letter, as a share of the axes'


def panels(figure: Figure, title: str) -> tuple[Any, Any]:
    """Return the axes for losses and, under them, those for learning rates.

    They are placed by hand: a layout that is computed costs as much as all the rest of a picture.
    """
    figure.set_facecolor("white")
    top = placed(figure, (0.095, 0.425, 0.885, 0.45))
    bottom = placed(figure, (0.095, 0.105, 0.885, 0.195))
    for one, label in ((top, "loss"), (bottom, "learning rate")):
        one.set_ylabel(label, color=TEXT, fontsize=9)
        one.yaxis.set_label_coords(-0.075, 0.5)
    bottom.set_xlabel("epochs", color=TEXT, fontsize=9, labelpad=2)
    title_of(figure, title)
    return top, bottom


def placed(figure: Figure, place: tuple[float, float, float, float]) -> Any:
    """Return axes at a place of a figure: left, bottom, width and height as shares of it."""
    one = figure.add_axes(place, facecolor="white")
    one.set_autoscale_on(False)
    one.spines[["top", "right"]].set_visible(False)
    one.spines[["left", "bottom"]].set_color(FAINT)
    one.tick_params(color=FAINT, labelcolor=TEXT, labelsize=8, length=3)
    one.grid(visible=False)
    one.grid(axis="y", color=GRID, linestyle="-", linewidth=0.7)
    one.set_axisbelow(True)
    return one


def title_of(figure: Figure, title: str) -> None:
    """Write the name of what is drawn in the upper left corner."""
    words = short(title, TITLE_LETTERS)
    figure.text(0.012, 0.985, words, color=TEXT, fontsize=10, weight="bold", va="top")


def fit(axes: Any, x: Scale, y: Scale) -> None:
    """Give axes their limits and ticks."""
    axes.set_yscale("log" if y.is_log else "linear")
    for axis, scale in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_ticks(scale.ticks, [f"{at:g}" for at in scale.ticks])
        axis.set_minor_locator(NullLocator())
    axes.set_xlim(x.low, x.high)
    axes.set_ylim(y.low, y.high)


def verticals(panels: Sequence[Any], at: Sequence[float], color: str, style: str) -> Iterator[Any]:
    """Draw marks, however many, as one thing in each of the axes."""
    for axes in panels if at else ():
        lines = LineCollection(
            [[(x, 0.0), (x, 1.0)] for x in at],
            transform=axes.get_xaxis_transform(),
            colors=color,
            linestyles=style,
            linewidths=0.9,
            alpha=0.7,
        )
        yield axes.add_collection(lines, autolim=False)


def texts(
    axes: Any, x: Scale, marks: Sequence[tuple[float, str]], color: str, num_rows: int
) -> Iterator[Any]:
    """Write above the axes what marks mean, those that have room."""
    taken = [-math.inf] * num_rows
    for at, text in marks:
        if not x.low <= at <= x.high:
            continue
        words = short(text)
        width = LETTER * (len(words) + 1.5)
        left = min((at - x.low) / (x.high - x.low), 1.0 - width)
        row = next((row for row, right in enumerate(taken) if left >= right), None)
        if row is None:
            continue
        taken[row] = left + width
        height = 1.03 if row == 0 else 1.17
        yield axes.text(left, height, words, transform=axes.transAxes, color=color, fontsize=7.5)


def note(axes: Any, text: str) -> Any:
    """Write in the middle of empty axes."""
    middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
    return axes.text(0.5, 0.5, text, color=FAINT, fontsize=10, **middle)


def legend(where: Any, lines: Sequence[Any], num_columns: int) -> Any:
    """Name the lines in the upper right corner of a figure or axes, those that have a name."""
    samples = []
    for line in lines:
        if not line.get_label().startswith("_"):
            sample = Line2D([], [])
            sample.update_from(line)
            sample.set(label=line.get_label(), animated=False)
            if line.get_markevery() is not None:  # it marks the newest point, not the line
                sample.set_marker("")
            samples.append(sample)
    return where.legend(
        handles=samples,
        loc="upper right",
        bbox_to_anchor=(0.995, 1.0),
        ncols=num_columns,
        fontsize=8.5,
        labelcolor=TEXT,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.4,
    )


def looks() -> Iterator[dict[str, Any]]:
    """Give looks that stay apart, for session after session."""
    for dashes in cycle(("-", "--", ":", "-.")):
        for color in (BLUE, ORANGE, GREEN, PURPLE, RED, SKY):
            yield {"color": color, "linestyle": dashes}


def short(text: str, num_letters: int = MAX_LETTERS) -> str:
    """Cut a text that would run into another."""
    return text if len(text) <= num_letters else text[: num_letters - 1] + "…"
