"""Figures of a session: loss, and learning rate past and planned, with the boundaries of stages.

Figures of their own and never pyplot: pyplot's are global, and two threads drawing with it were seen
to mix their pictures.

A live picture is drawn beside the training, in the same process, and takes the interpreter's lock
from it. So its figure is made once; a line has about a thousand points, the lowest and the highest of
each stretch, so that no spike is lost; and all but the lines (axes, marks, texts: most of the work) is
kept as pixels under them until it changes, for which axes change seldom.

The loss is shown over what is trained so far, up to a half, a quarter, ... of the run, and the learning
rate over the whole of it: over 100 epochs the first hour's losses would be an upright line.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Mapping, Sequence
from itertools import compress, groupby
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from nbtrain import frames, scales
from nbtrain.bar import number
from nbtrain.frames import BLUE, DOTS, FAINT, GREEN, ORANGE, PURPLE, RED, WIDTH
from nbtrain.journal import Journal
from nbtrain.scales import Floats, Scale, smooth, thinned
from nbtrain.schedule import FUNCTION

ENDLESS_EPOCHS = 1.0  # how far ahead is planned where a run has no end
PLAN_POINTS = 240
SWEEP_IN = (7.0, 3.3)
SIZE_IN, DPI = (7.0, 4.4), 140.0  # to be shown 700 pixels wide, and sharp on a fine screen too
NUM_COLORS = 128  # of a live picture: a third of the bytes, and sooner written

Columns = Mapping[str, Floats]
Rows = Sequence[Mapping[str, Any]]
Marks = tuple[tuple[float, str], ...]


class Picture(Figure):
    """A figure that a notebook shows by itself, though pyplot was never asked."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


class Frame(NamedTuple):
    """All of a picture but its lines."""

    past: Scale
    whole: Scale
    loss: Scale
    lr: Scale
    stages: Marks
    changes: Marks
    lines: tuple[bool, ...]  # which of them have points


class Curves:
    """The curves of a session in one figure: `draw` renews what they show, `png` gives the picture.

    Any thread may call either; one waits for the other.

    Args:
        name: The title.
    """

    def __init__(self, name: str) -> None:
        self.figure = Picture(figsize=SIZE_IN, dpi=DPI)
        self._canvas: Any = FigureCanvasAgg(self.figure)
        self._lock = threading.Lock()
        self._under: Any = None  # the pixels under the lines
        self._frame: Frame | None = None
        self._furniture: list[Any] = []  # marks, texts, legend
        self._top, self._bottom = frames.panels(self.figure, name)
        newest = DOTS | {"markevery": [-1]}
        self._lines = [
            _line(self._top, BLUE, "_raw", linewidth=0.7, alpha=0.3),
            _line(self._top, BLUE, "train", **newest),
            _line(self._top, ORANGE, "validation", **DOTS),
            _line(self._bottom, GREEN, "learning rate", **newest),
            _line(self._bottom, GREEN, "planned", linestyle=":"),
            _line(self._bottom, RED, "as typed", linestyle=(0, (5, 2))),
        ]

    def draw(
        self,
        columns: Columns,
        epochs: Rows,
        journal: Journal,
        progress: float,
        typed: Journal | None = None,
    ) -> None:
        """Show this from now on.

        Args:
            columns: `History.arrays`.
            epochs: `History.epochs`.
            journal: What is planned from here on, and the changes up to here.
            progress: Here, in epochs.
            typed: The journal as it would be with the settings that are being typed: see `edited`.
        """
        with self._lock:
            x, loss, train = columns["progress"], columns["loss"], smooth(columns["loss"])
            nothing = np.zeros(0), np.zeros(0)
            points = [
                thinned(x, loss),
                thinned(x, train),
                _validation(epochs),
                thinned(x, columns["lr"]),
                _planned(journal, progress, len(x)) or nothing,
                (typed and _planned(typed, progress, len(x))) or nothing,
            ]
            for line, (across, up) in zip(self._lines, points, strict=True):
                line.set_data(across, up)
            ends = [_end(plan, progress) for plan in (journal, typed) if plan]
            is_endless = journal.settings["epochs"] is None
            whole = scales.epochs(max([*ends, *x[-1:].tolist()]), is_endless=is_endless)
            frame = Frame(
                past=scales.zoomed(whole, progress),
                whole=whole,
                loss=scales.losses(loss, np.concatenate([train, points[2][1]])),
                lr=scales.rates(up for _, up in points[3:]),
                stages=_stages(columns),
                changes=_changes(journal),
                lines=tuple(bool(len(across)) for across, _ in points),
            )
            if frame != self._frame:
                self._set(frame)

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
            return packed(self._canvas)

    def _set(self, frame: Frame) -> None:
        for one in self._furniture:
            one.remove()
        top, bottom = self._top, self._bottom
        frames.fit(top, frame.past, frame.loss)
        frames.fit(bottom, frame.whole, frame.lr)
        top.tick_params(labelbottom=frame.past != frame.whole)
        self._furniture = [
            frames.legend(self.figure, list(compress(self._lines, frame.lines)), num_columns=5),
            *frames.verticals((top, bottom), [at for at, _ in frame.stages], FAINT, "--"),
            *frames.verticals((top, bottom), [at for at, _ in frame.changes], PURPLE, "-"),
            *frames.texts(top, frame.past, frame.stages, FAINT, num_rows=1),
            *frames.texts(bottom, frame.whole, frame.changes, PURPLE, num_rows=2),
        ]
        if not frame.lines[0]:
            self._furniture.append(frames.note(top, "no step yet"))
        self._frame, self._under = frame, None


def packed(canvas: Any) -> bytes:
    """Return the PNG of what a canvas shows, in few colours."""
    # Pillow gives the interpreter's lock away, matplotlib keeps it: this costs the training nothing.
    seen = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    file = io.BytesIO()
    seen.convert("RGB").quantize(NUM_COLORS, Image.Quantize.FASTOCTREE).save(file, "PNG")
    return file.getvalue()


def curves(name: str, rows: Rows, journal: Journal, progress: float) -> Figure:
    """Draw training loss, its running mean and validation loss, and the learning rate.

    Args:
        name: The title.
        rows: Of the history.
        journal: What is planned from here on, and the changes up to here.
        progress: Here, in epochs.
    """
    made = Curves(name)
    used = ("stage", "progress", "loss", "lr")
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in used}
    made.draw(columns, rows, journal, progress)
    for axes in made.figure.axes:
        for line in axes.lines:
            line.set_animated(False)
    return made.figure


def compared(sessions: Sequence[tuple[str, Columns, Rows]]) -> Figure:
    """Draw the running means of several sessions over each other, with validations and rates.

    Args:
        sessions: Of each the name, `History.arrays`, and `History.epochs`.
    """
    figure = Picture(figsize=SIZE_IN, dpi=DPI)
    top, bottom = frames.panels(figure, f"{len(sessions)} sessions")
    means, lrs, ends = [np.zeros(0)], [], [0.0]
    for num_after, (look, (name, columns, epochs)) in zip(
        range(len(sessions) - 1, -1, -1), zip(frames.looks(), sessions, strict=False), strict=True
    ):
        x, train, valid = columns["progress"], smooth(columns["loss"]), _validation(epochs)
        top.plot(*thinned(x, train), linewidth=WIDTH, label=frames.short(name), **look)
        top.plot(*valid, linewidth=0.8, label="_valid", **DOTS, **look)
        # One that is covered by later ones, as equal rates are, is seen behind them.
        bottom.plot(*thinned(x, columns["lr"]), linewidth=WIDTH + 1.2 * num_after, **look)
        means += [train, valid[1]]
        lrs.append(columns["lr"])
        ends += [*x[-1:].tolist(), *valid[0][-1:].tolist()]
    whole = scales.linear(0.0, max(ends) or 1.0, 10)
    frames.fit(top, whole, scales.losses(np.zeros(0), np.concatenate(means)))
    frames.fit(bottom, whole, scales.rates(lrs))
    top.tick_params(labelbottom=False)
    dots = Line2D([], [], color=FAINT, linewidth=0.8, label="validation", **DOTS)
    frames.legend(top, [*top.lines, dots], num_columns=1)
    return figure


def swept(
    lrs: Sequence[float], losses: Sequence[float], means: Sequence[float], suggestion: float | None
) -> Figure:
    """Draw the losses of a range test and their running mean over the learning rates.

    Args:
        lrs, losses, means: A number a step.
        suggestion: A rate to mark, or None.
    """
    figure = Picture(figsize=SWEEP_IN, dpi=DPI)
    axes = frames.placed(figure, (0.095, 0.14, 0.885, 0.69))
    frames.title_of(figure, "learning rates")
    axes.set_xlabel("learning rate", color=frames.TEXT, fontsize=9, labelpad=2)
    axes.set_ylabel("loss", color=frames.TEXT, fontsize=9)
    raw, mean = np.array(losses, np.float64), np.array(means, np.float64)
    if not len(raw):
        frames.note(axes, "no step was finite")
        return figure
    axes.set_xscale("log")
    x = scales.logarithmic(min(lrs), max(lrs))
    # The last losses, of a divergence, would leave no room for those that matter.
    frames.fit(axes, x, scales.losses(raw[raw <= 1.1 * mean.max()], mean))
    axes.plot(lrs, raw, color=BLUE, linewidth=0.7, alpha=0.3, label="_raw")
    axes.plot(lrs, mean, color=BLUE, linewidth=WIDTH, label="running mean")
    if suggestion is not None:
        at = float(np.interp(suggestion, lrs, mean))
        axes.plot([suggestion], [at], color=RED, label=f"suggestion {suggestion:.2g}", **DOTS)
        list(frames.verticals((axes,), [suggestion], RED, "--"))
    frames.legend(figure, axes.lines, num_columns=2)
    return figure


def told(session: Any) -> tuple[str, Columns, Rows]:
    """Return what `compared` takes of a session.

    Raises:
        ValueError: it is none, but a name for example.
    """
    if not hasattr(session, "history"):
        raise ValueError(f"compare= has {session!r}, no Session: nbtrain.resume(name) opens one.")
    return session.name, session.history.arrays(), session.history.epochs


def edited(journal: Journal, progress: float, **changes: Any) -> Journal:
    """Return a copy of a journal with changes made here, to draw what they would do.

    Raises:
        ValueError: a change makes no sense.
    """
    copy = Journal.from_state_dict(journal.state_dict(), journal)
    copy.edit(0, progress, "", **changes)
    return copy


def words(columns: Columns, epochs: Rows) -> str:
    """Describe the curves in a line, for who does not see them."""
    train, (_, valid) = smooth(columns["loss"]), _validation(epochs)
    if not len(train):
        return "no step yet"
    progress = f"{columns['progress'][-1]:.3g}"
    over = f"over {progress} {'epoch' if progress == '1' else 'epochs'}"
    validation = f", validation {number(float(valid[-1]))}" if len(valid) else ""
    return (
        f"loss {number(float(train[0]))} -> {number(float(train[-1]))} {over}{validation}, "
        f"learning rate {columns['lr'][-1]:.3g}"
    )


def _line(axes: Any, color: str, label: str, **style: Any) -> Any:
    # Animated ones are left out of the pixels that are kept, yet not of a file that is saved.
    style = {"linewidth": WIDTH, "animated": True} | style
    return axes.plot([], [], color=color, label=label, **style)[0]


def _validation(epochs: Rows) -> tuple[Floats, Floats]:
    found = [(row["progress"], row.get("valid_loss")) for row in epochs]
    known = [(at, loss) for at, loss in found if loss is not None and math.isfinite(loss)]
    x, y = np.array(known, np.float64).reshape(-1, 2).T
    return x, y


def _end(journal: Journal, progress: float) -> float:
    return max(float(journal.settings["epochs"] or progress + ENDLESS_EPOCHS), progress)


def _planned(journal: Journal, progress: float, num_rows: int) -> tuple[Floats, Floats] | None:
    end = _end(journal, progress)
    # Where a part of the user's makes the rates, nobody knows the ones to come.
    if end <= progress or journal.scheduler or (num_rows and not journal.writes_rates):
        return None
    schedule = journal.schedule
    # A corner stays a corner, and a jump is upright.
    corners = schedule.corners(progress, end)
    # No step begins at the end, and a function of the user's need not know it.
    last = math.nextafter(end, -math.inf) if schedule.decay == FUNCTION else end
    even = np.linspace(progress, last, PLAN_POINTS + 1).tolist()
    x = sorted({*even, *corners, *(math.nextafter(at, -math.inf) for at in corners)})
    return np.array(x), np.array([journal.rates(at)[0] for at in x])


def _stages(columns: Columns) -> Marks:
    stage, x = columns["stage"], columns["progress"]
    lasts = np.flatnonzero(np.diff(stage)).tolist()
    return tuple((float(x[i]), f"stage {stage[i + 1]:.0f}") for i in lasts)


def _changes(journal: Journal) -> Marks:
    by_place = groupby(list(journal.entries), key=lambda entry: entry.progress)
    return tuple(
        (at, ", ".join(f"{entry.what.replace('_', ' ')} {_plain(entry.new)}" for entry in entries))
        for at, entries in by_place
    )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
