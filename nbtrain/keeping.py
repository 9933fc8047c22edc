"""When a run is saved and loaded, what is said of it, and what it means that a save failed.

The loop asks for a save and goes on; here is known what was saved last, so that nothing is written
twice, and whether a failure is one to stop for: where nothing could be saved yet it is, later on the
training is worth more than its newest copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from nbtrain import grades, growth
from nbtrain.bar import goodbye, hello
from nbtrain.budget import words
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import NbtrainError, SessionError
from nbtrain.frozen import Frozen
from nbtrain.lines import Lines
from nbtrain.live import Live
from nbtrain.opening import Opened


class Keeping:
    """Saves what is alive, and loads it.

    Args:
        name: The session's.
        opened: Clock and stores.
        live: What is saved.
        lines: Where a failure that is no reason to stop is told.
        every_s: Longest time between two saves, in seconds.
    """

    def __init__(self, name: str, opened: Opened, live: Live, lines: Lines, every_s: float) -> None:
        self._name, self._opened, self._live, self._lines = name, opened, live, lines
        self._every_s, self._frozen, self._is_back = every_s, Frozen(), False

    def load(self) -> None:
        """Be what the newest whole checkpoint says, if there is one, and say so.

        Raises:
            SessionError: there is none, and what is alive is torn.
        """
        self.saver, found = self._opened.find(self._name)
        if found is None and self._live.is_torn:
            raise SessionError(
                f"{self._name!r} is half changed, and has no checkpoint to go back to. "
                "Make the session again, with a fresh model: nothing was trained yet."
            )
        self.is_fresh, self.resumed = found is None, "new"
        self._forget()
        at, notes = None, []
        if found is not None:
            notes = self._opened.put(found, self._live)
            grade = self._live.grade
            self._place, at = self._live.place, f"{self._at} ({grade})"
            self.resumed = f"resumed at step {self._live.step} ({grade})"
        self._kernel = self._opened.fingerprint(self._live)
        if self._opened.replay is not None:
            self._opened.replay.rewind(self._live.progress)
        place = self._opened.stores[0 if self.saver.is_behind else -1].place
        self._lines.say(hello(self._name, place, at, notes))

    def fall_back(self) -> None:
        """Be what was saved last, where what is alive is torn, and say what that costs.

        What was set by hand since then is set again, from there on; not after a loss that was not
        finite, of which it may be the cause.
        """
        live, name, step = self._live, self._name, self._live.step
        before, is_spoilt = live.journal.by_hand, live.is_spoilt
        self.load()
        self._is_back = True
        since = before[len(live.journal.by_hand) :]
        for changes in () if is_spoilt else since:
            live.journal.edit(live.step, live.progress, "hand", **changes)
        text = f"{name}: back from step {step} to step {live.step}; what came between is trained again"
        if since:
            words_of = ", ".join(f"{k}={v!r}" for changes in since for k, v in changes.items())
            text += f".\n  Set since then: {words_of}; "
            text += "set it again if it was not the cause" if is_spoilt else "it holds from here on"
        self._lines.say(f"{text}.")

    def regrade(self) -> None:
        """Grade how this kernel goes on from what it has trained, and say where that promises less."""
        then, live = self._kernel, self._live
        self._kernel = self._opened.fingerprint(live)
        # An edited batch size stands in the journal, where it is repeated.
        grade = grades.compare(then, self._kernel | {"micro_batch": then["micro_batch"]})
        if live.step and grade.is_worse_than(live.grade.word):
            live.grade, self.resumed = grade, f"resumed at step {live.step} ({grade})"
            self._lines.say(f"{self._name}: goes on at {self._at} ({grade}).")

    def request(self, reason: str, written: Mapping[str, float] | None = None) -> None:
        """Save what is alive, in the background; with what a validation gave it may be the best.

        Raises:
            LossError: it is spoilt.
        """
        model, tensors, state = self._live.take()
        live = self._live
        facts: dict[str, Any] = {"step": live.step, "stage": live.stage, "progress": live.progress}
        facts["at"] = time.time()
        facts |= live.judging.facts(written or {}) | {"grown": growth.count(live.journal)}
        state |= self._opened.identity(live)
        number, recipe = self.saver.next_number(), self._opened.recipe_source
        still = self._frozen.split(live.task.model, model)
        self.saver.request(Snapshot(number, model, tensors, state, recipe, facts, still))
        self._saved_at, self._place, self._reason = self._opened.clock(), live.place, reason

    def secure(self, *, waits: bool) -> None:
        """Save what somebody has set: after a kill the steps come again, but nobody sets it again.

        Args:
            waits: Whether to wait until it is on this machine: the cell that is run next may open it.
        """
        if not self._live.is_torn and not (self.is_fresh and self._saved_at == -math.inf):
            self.request("")
            if waits:
                self.saver.wait(copies=False)

    def begin(self) -> None:
        """Save before the first step: the place of a new session is tried out now, not at hour one."""
        self._is_back = False
        if self._saved_at == -math.inf:
            self.request("")
            if self.is_fresh:
                self.saver.wait(copies=False)
                self.heed()

    def catch_up(self) -> None:
        """Make up for a save that failed or was cut off, where there is nothing left to train.

        Raises:
            StoreError: the store refused.
        """
        if is_failing := self.saver.is_failing:
            self.request("")
        if is_failing or self.saver.catch_up():
            self.finish()

    def finish(self) -> None:
        """Wait for what was requested, the copy too for as long as the budget lasts.

        Raises:
            StoreError: the last save failed.
        """
        timeout_s = self.patience_s
        in_time = self.saver.wait(timeout_s=timeout_s)
        failure = self.saver.failure()
        if failure is not None and self.saver.is_failing:
            self._forget()
            raise failure
        self._heed(failure)
        if not in_time:
            self._lines.warn(
                f"The copy to {self._opened.stores[-1].place} was not done in {words(timeout_s)}; "
                "the checkpoint is on this machine. Run session.save() while it lives."
            )

    def heed(self) -> None:
        """Raise what the last save raised where nothing could be saved yet, else tell it."""
        self._heed(self.saver.failure())
        if (rival := self.saver.rival()) is not None:
            self._lines.warn(rival)

    def say_goodbye(self, reason: str, *, is_own: bool, prints: bool = True) -> None:
        """Say where the run is, why it has ended there, and how it goes on."""
        opened, live = self._opened, self._live
        saved = list(self.saver.saved.values())[-1:]
        where = "".join(f"; saved in {s.place} ({s.degree})" for s in saved)
        on = "the same cells" if is_own else opened.way_on(self._name)
        reason, at = reason if reason == "error" else live.end or reason, self._at + where
        verdict = live.judging.verdict(live.history.epochs) if reason == "early" else ""
        is_whole = not self._is_back
        said = goodbye(self._name, at, reason, on, is_own=is_own, verdict=verdict, is_whole=is_whole)
        self._lines.say(said, prints=prints)

    def say_saved(self) -> None:
        """Say what was just saved because somebody asked for it."""
        places = [f"{s.place} ({s.degree})" for s in self.saver.saved.values()]
        self._lines.say(f"{self._name}: saved at {self._at}, in {' and '.join(places)}.")

    def is_due(self, now: float) -> bool:
        """Whether the last save is too long ago."""
        return now - self._saved_at >= self._every_s

    def has(self, reason: str) -> bool:
        """Whether the place where the run is was saved, for this reason."""
        return (self._place, self._reason) == (self._live.place, reason)

    @property
    def patience_s(self) -> float | None:
        """How long a copy may be waited for, in seconds; None for ever."""
        budget = self._opened.budget
        return None if budget.limit_s is None else max(60.0, budget.left_s)

    @property
    def _at(self) -> str:
        live = self._live
        return f"epoch {live.progress:.2f}, step {live.step}, stage {live.stage}"

    def _heed(self, failure: Exception | None) -> None:
        if failure is None:
            return
        if not isinstance(failure, NbtrainError) or len(self.saver.saved) < len(self._opened.stores):
            raise failure
        self._lines.warn(f"A save failed, training goes on: {failure}")

    def _forget(self) -> None:
        self._saved_at, self._place, self._reason = -math.inf, (-1, -1, -1), ""
