"""The panel: widgets that show a session's facts and call its verbs, and own no state of the run.

    ● running  cifar  stage 2, resumed at step 120 (exact)        told by `status()`, every two seconds
    epoch, run and budget as bars
    [Resume] [Pause] [Checkpoint now] [Stop]              labels follow the state, never the click
    Checkpoint: step 1,200, 48 MB, 2m10s ago, in ...
    accumulate [4] now 2     batch size [32] now 32  ...  what is typed is a draft until applied
    loss and learning rate, with what the draft would plan
    the last lines of the log

What every panel has, and how a click acts, is in `board`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from nbtrain import plots, poll
from nbtrain.face import markup
from nbtrain.face.board import STATUS_EVERY_S, Board, in_words
from nbtrain.face.fields import Fields
from nbtrain.face.markup import Facts, Run

__all__ = ["STATUS_EVERY_S", "Panel", "in_words"]

TYPING_S = 0.3  # between two pictures while somebody types: the planned curve follows the fingers


class Panel(Board):
    """The widgets of one session.

    Args:
        session: What is shown and steered.
        curves: Draws the picture.
        touched: Set whenever somebody clicked or typed.
        clock: Monotonic seconds.
    """

    _more = "All epochs are trained; for more: session.set(epochs=...)"

    def __init__(
        self,
        session: Run,
        curves: plots.Curves,
        touched: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._curves = session, curves
        self._draft: object = None
        super().__init__(session, touched, clock)

    def _rows(self) -> list[Any]:
        self._save = self._button("Checkpoint now", "save", lambda: self._session.save())
        self._fields = Fields(self._touched)
        # What is in force is no longer typed, so a draft that was applied goes by itself.
        self._listen(self._fields.apply, lambda: self._session.set(**self._fields.changes))
        poll.answer_where_asked(self._fields.undo)
        return [
            self._status,
            self._bars,
            self._line([self._start, self._pause, self._save, self._stop]),
            self._alert,
            self._fields.widget,
            self._saved,
            self._picture,
            self._words,
            self._log,
        ]

    @property
    def _buttons(self) -> list[Any]:
        return [self._start, self._pause, self._save, self._stop, *self._fields.buttons]

    def _status_of(self, facts: Facts) -> str:
        return markup.status(facts)

    def _numbers(self, facts: Facts) -> None:
        self._bars.value = markup.bars(facts, time.time())
        self._saved.value = markup.saved(facts, time.time())

    def _tell(self, facts: Facts) -> None:
        self._fields.refresh(facts, self._session.journal)
        self._label(facts, has_begun=bool(facts["step"]), is_own=facts["own_loop"])
        runs = facts["state"] == "running"
        self._save.disabled = bool(facts["asked"]) or not (runs or facts["step"])
        self._save.tooltip = "Save after this window and train on" if runs else "Save once more"

    def draw(self, *, at_once: bool = False) -> None:
        """Draw the picture, if it is time and something in it would be other than it was."""
        facts, session = self._session.status(), self._session
        history, journal = session.history, session.journal
        draft = self._fields.changes
        place = (facts["step"], facts["progress"], len(history.epochs), len(journal.entries))
        rest_s = self._rest_s if draft == self._draft else TYPING_S
        if not self._is_due((place, draft), rest_s, at_once=at_once):
            return
        began = self._clock()
        arrays, epochs = history.arrays(), list(history.epochs)
        typed = self._fields.planned(facts, journal)
        if typed is not None and (typed.schedule, typed.peak_lr) == (journal.schedule, journal.peak_lr):
            typed = None  # the same curve twice tells nothing
        self._curves.draw(arrays, epochs, journal, facts["progress"], typed)
        self._picture.value = self._curves.png()
        self._words.value = markup.small(plots.words(arrays, epochs))
        self._draft = draft
        self._drew((place, draft), began)
