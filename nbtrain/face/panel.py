"""The panel: widgets that show a session's facts and call its verbs, and own no state of the run.

    ● running  cifar  stage 2, resumed at step 120 (exact)        told by `status()`, every two seconds
    epoch, run and budget as bars
    [Resume] [Pause] [Checkpoint now] [Stop]              labels follow the state, never the click
    Checkpoint: step 1,200, 48 MB, 2m10s ago, in ...
    accumulate [4] now 2     batch size [32] now 32  ...  what is typed is a draft until applied
    loss and learning rate, with what the draft would plan
    the last lines of the log

A click may come on any thread: it calls a verb, which only queues, and sets `touched`; whoever draws
waits for that. Core widgets only, those that ipywidgets 7.7 and 8 have in common.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from nbtrain import plots, poll
from nbtrain.errors import NbtrainError
from nbtrain.face import markup
from nbtrain.face.fields import Fields
from nbtrain.face.markup import Facts, Run

STATUS_EVERY_S = 2.0  # a screen reader reads every change
NUM_LINES = 8
TYPING_S = 0.3  # between two pictures while somebody types: the planned curve follows the fingers


class Panel:
    """The widgets of one session, made once; showing `widget` again makes another view of it.

    Args:
        session: What is shown and steered.
        curves: Draws the picture.
        touched: Set whenever somebody clicked or typed.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        session: Run,
        curves: plots.Curves,
        touched: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._curves = session, curves
        self._touched, self._clock = touched, clock
        self._said = ""
        self.is_late = False  # whether there is a picture to draw that came too soon
        self._status_due = self._drawn_at = -math.inf
        self._told: object = None
        self._drawn: object = None
        self._draft: object = None
        self._make()
        self.refresh()
        self.draw()

    def _make(self) -> None:
        self._status, self._bars, self._alert, self._saved = (widgets.HTML() for _ in range(4))
        self._words, self._log = widgets.HTML(), widgets.HTML()
        self._start = self._button("Start", "play", lambda: self._session.start(), style="primary")
        self._pause = self._button("Pause", "pause", lambda: self._session.pause())
        self._save = self._button("Checkpoint now", "save", lambda: self._session.save())
        self._stop = self._button("Stop", "stop", lambda: self._session.stop())
        self._fields = Fields(self._touched)
        # What is in force is no longer typed, so a draft that was applied goes by itself.
        self._listen(self._fields.apply, lambda: self._session.set(**self._fields.changes))
        poll.answer_where_asked(self._fields.undo)
        self._picture = widgets.Image(format="png", layout=widgets.Layout(width="100%", margin="0"))
        buttons = [self._start, self._pause, self._save, self._stop]
        rows = [
            widgets.HTML(markup.STYLE, layout=widgets.Layout(display="none")),
            self._status,
            self._bars,
            widgets.HBox(buttons, layout=widgets.Layout(flex_flow="row wrap", margin="4px 0")),
            self._alert,
            self._fields.widget,
            self._saved,
            self._picture,
            self._words,
            self._log,
        ]
        self.widget = widgets.VBox(rows)
        self.widget.add_class("nbt-panel")

    def _button(self, label: str, icon: str, verb: Callable[[], Any], style: str = "") -> Any:
        button = widgets.Button(
            description=label, icon=icon, button_style=style, layout=widgets.Layout(width="auto")
        )
        self._listen(button, verb)
        return button

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
        without = (
            f"The panel of {self._session.name!r} was here, with a kernel. Its last word is below."
        )
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
        for button in (self._start, self._pause, self._save, self._stop, *self._fields.buttons):
            button.disabled = True

    def refresh(self, *, at_once: bool = False) -> None:
        """Show the facts as they are now; the numbers every two seconds, or when they must."""
        facts, now = self._session.status(), self._clock()
        told = (facts["state"], facts["reason"], facts["asked"], facts["resumed"])
        if at_once or told != self._told or now >= self._status_due:
            self._told, self._status_due = told, now + STATUS_EVERY_S
            self._status.value = markup.status(facts)
            # With it, so that no two numbers are of different moments.
            self._bars.value = markup.bars(facts, time.time())
            self._saved.value = markup.saved(facts, time.time())
        self._alert.value = markup.alert("\n".join(filter(None, (facts["error"], self._said))))
        self._log.value = markup.log(self._session.lines[-NUM_LINES:])
        self._fields.refresh(facts, self._session.journal)
        self._label(facts)

    def _label(self, facts: Facts) -> None:
        runs, state, asked = facts["state"] == "running", facts["state"], facts["asked"]
        self._start.description = "Resume" if facts["step"] else "Start"
        self._start.disabled = runs or state == "done" or facts["own_loop"]
        by_itself = "Train from where it is, in the background"
        self._start.tooltip = {
            "running": "It trains already",
            "done": "All epochs are trained; for more: session.set(epochs=...)",
        }.get(state, "Your own loop trains it: run its cell" if facts["own_loop"] else by_itself)
        ends = asked in ("pause", "stop")
        self._pause.disabled = not runs or ends
        self._pause.tooltip = "Save, and hold after this window" if runs else "Nothing trains"
        self._save.disabled = bool(asked) or not (runs or facts["step"])
        self._save.tooltip = "Save after this window and train on" if runs else "Save once more"
        self._stop.disabled = asked == "stop" or state not in ("running", "paused")
        self._stop.tooltip = "Save, and end after this window; Resume goes on"

    def draw(self, *, at_once: bool = False) -> None:
        """Draw the picture, if it is time and something in it would be other than it was."""
        facts, session = self._session.status(), self._session
        history, journal = session.history, session.journal
        draft = self._fields.changes
        place = (facts["step"], facts["progress"], len(history.epochs), len(journal.entries))
        rest_s = self._curves.interval_s if draft == self._draft else TYPING_S
        is_new = (place, draft) != self._drawn
        self.is_late = is_new and not at_once and self._clock() < self._drawn_at + rest_s
        if not is_new or self.is_late:
            return
        arrays, epochs = history.arrays(), list(history.epochs)
        typed = self._fields.planned(facts, journal)
        if typed is not None and (typed.schedule, typed.peak_lr) == (journal.schedule, journal.peak_lr):
            typed = None  # the same curve twice tells nothing
        self._curves.draw(arrays, epochs, journal, facts["progress"], typed)
        self._picture.value = self._curves.png()
        self._words.value = markup.small(plots.words(arrays, epochs))
        self._drawn, self._draft, self._drawn_at = (place, draft), draft, self._clock()


def in_words(error: Exception) -> str:
    """Return what an error says, with its notes; its kind too where it is not one of ours."""
    if isinstance(error, (NbtrainError, ValueError)):
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return "".join(traceback.format_exception_only(error)).strip()
