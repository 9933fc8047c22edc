"""What every panel is made of: facts that are shown, buttons that call verbs, a picture, a log.

A panel owns no state of the run. A click may come on any thread: it calls a verb, which only queues,
and sets `touched`; whoever draws waits for that. Core widgets only, those that ipywidgets 7.7 and 8
have in common.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from nbtrain import poll
from nbtrain.errors import NbtrainError
from nbtrain.face import markup
from nbtrain.face.markup import Facts, Trained

STATUS_EVERY_S = 2.0  # a screen reader reads every change
PICTURE_EVERY_S = 2.0  # at the most
COST = 100.0  # and no sooner than so many times what a picture takes: training loses 1 % at the most
MEAN_PICTURES = 8  # a picture takes the running mean of so many: one with new axes is like several
NUM_LINES = 8


class Board(ABC):
    """The widgets of one session or population, made once; `widget` shown again is another view.

    Args:
        shown: What is shown and steered.
        touched: Set whenever somebody clicked or typed.
        clock: Monotonic seconds.
    """

    def __init__(
        self, shown: Trained, touched: threading.Event, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shown, self._touched, self._clock = shown, touched, clock
        self._said = ""
        self.is_late = False  # whether there is a picture to draw that came too soon
        self._status_due = self._drawn_at = -math.inf
        self._picture_s = 0.0
        self._told: object = None
        self._drawn: object = None
        self._make()
        self.refresh()
        self.draw()

    # ---- what a kind of panel says of itself

    @abstractmethod
    def _rows(self) -> list[Any]:
        """Return the widgets from top to bottom."""

    @property
    @abstractmethod
    def _buttons(self) -> list[Any]:
        """All buttons."""

    @abstractmethod
    def _status_of(self, facts: Facts) -> str:
        """Write the status line."""

    @abstractmethod
    def _numbers(self, facts: Facts) -> None:
        """Show the numbers that run on while it trains."""

    @abstractmethod
    def _tell(self, facts: Facts) -> None:
        """Show the facts that change at any time."""

    @abstractmethod
    def draw(self, *, at_once: bool = False) -> None:
        """Draw the picture, if it is time and something in it would be other than it was."""

    # ---- made once

    def _make(self) -> None:
        self._status, self._bars, self._alert, self._saved = (widgets.HTML() for _ in range(4))
        self._words, self._log = widgets.HTML(), widgets.HTML()
        self._start = self._button("Start", "play", lambda: self._shown.start(), style="primary")
        self._pause = self._button("Pause", "pause", lambda: self._shown.pause())
        self._stop = self._button("Stop", "stop", lambda: self._shown.stop())
        self._picture = widgets.Image(format="png", layout=widgets.Layout(width="100%", margin="0"))
        style = widgets.HTML(markup.STYLE, layout=widgets.Layout(display="none"))
        self.widget = widgets.VBox([style, *self._rows()])
        self.widget.add_class("nbt-panel")

    def _button(self, label: str, icon: str, verb: Callable[[], Any], style: str = "") -> Any:
        button = widgets.Button(
            description=label, icon=icon, button_style=style, layout=widgets.Layout(width="auto")
        )
        self._listen(button, verb)
        return button

    def _line(self, buttons: list[Any]) -> Any:
        return widgets.HBox(buttons, layout=widgets.Layout(flex_flow="row wrap", margin="4px 0"))

    def _listen(self, button: Any, verb: Callable[[], Any]) -> None:
        button.on_click(lambda _: self._call(verb))
        poll.answer_where_asked(button)

    def _call(self, verb: Callable[[], Any]) -> None:
        try:
            verb()
            self._said = ""
        except Exception as error:  # there is no cell it could be raised in
            self._said = in_words(error)
        self._touched.set()

    def show(self) -> None:
        """Show the widgets in the cell that runs; without a kernel a line stands there instead."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        without = f"The panel of {self._shown.name!r} was here, with a kernel. Its last word is below."
        bundle = {"application/vnd.jupyter.widget-view+json": view, "text/plain": without}
        display(bundle, raw=True)  # type: ignore[no-untyped-call]

    # ---- drawing, on one thread at a time

    def say(self, text: str) -> None:
        """Show a message of what went wrong, until the next click."""
        self._said = text
        self._alert.value = markup.alert(text)

    def leave(self, text: str) -> None:
        """Say why nothing acts any more, and let nothing be pressed."""
        self.say(text)
        for button in self._buttons:
            button.disabled = True

    def refresh(self, *, at_once: bool = False, touched: bool = True) -> None:
        """Show the facts as they are now: at once where the state is another, else every two seconds.

        Args:
            at_once: Whether all is shown now.
            touched: Whether somebody clicked or typed, which is answered at once too.
        """
        facts, now = self._shown.status(), self._clock()
        told = (facts["state"], facts["reason"], facts["asked"], facts["resumed"])
        is_due = at_once or told != self._told or now >= self._status_due
        if is_due:
            self._told, self._status_due = told, now + STATUS_EVERY_S
            self._status.value = self._status_of(facts)
            # With it, so that no two numbers are of different moments.
            self._numbers(facts)
        elif not touched:  # it is looked often, and each time takes the interpreter's lock
            return
        self._alert.value = markup.alert("\n".join(filter(None, (facts["error"], self._said))))
        self._log.value = markup.log(self._shown.lines[-NUM_LINES:])
        self._tell(facts)

    def _label(self, facts: Facts, *, has_begun: bool, is_own: bool = False) -> None:
        """Let the buttons say what they would do now, and be pressed only where they do something."""
        runs, state, asked = facts["state"] == "running", facts["state"], facts["asked"]
        self._start.description = "Resume" if has_begun else "Start"
        self._start.disabled = runs or state == "done" or is_own
        by_itself = "Train from where it is, in the background"
        self._start.tooltip = {"running": "It trains already", "done": self._more}.get(
            state, "Your own loop trains it: run its cell" if is_own else by_itself
        )
        ends = asked in ("pause", "stop")
        self._pause.disabled = not runs or ends
        self._pause.tooltip = "Save, and hold after this window" if runs else "Nothing trains"
        self._stop.disabled = asked == "stop" or state not in ("running", "paused")
        self._stop.tooltip = "Save, and end after this window; Resume goes on"

    _more = "All epochs are trained"

    @property
    def _rest_s(self) -> float:
        """How long to wait from one picture to the next.

        By the clock and not by the processor's time: each time that this thread asks for the
        interpreter's lock, the training loses more than what is then computed.
        """
        return max(PICTURE_EVERY_S, COST * self._picture_s)

    def _is_due(self, place: object, rest_s: float, *, at_once: bool) -> bool:
        """Tell whether there is something new to draw, and note whether it comes too soon."""
        is_new = place != self._drawn
        self.is_late = is_new and not at_once and self._clock() < self._drawn_at + rest_s
        return is_new and not self.is_late

    def _drew(self, place: object, began: float) -> None:
        """Note what was drawn, begun at a moment of the clock."""
        self._drawn, self._drawn_at = place, self._clock()
        self._picture_s += (self._drawn_at - began - self._picture_s) / MEAN_PICTURES


def in_words(error: Exception) -> str:
    """Return what an error says, with its notes; its kind too where it is not one of ours."""
    if isinstance(error, (NbtrainError, ValueError)):
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return "".join(traceback.format_exception_only(error)).strip()
