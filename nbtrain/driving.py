"""How training is started, ordered about and ended: the same for a session and for a population.

One thread trains, and everybody else gives orders that are obeyed at a boundary. Whatever ends it, an
order, the clock, a signal or an error, goes through one door, where everything is saved.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbtrain import opening
from nbtrain.bar import Bar
from nbtrain.interrupts import Interrupts
from nbtrain.lines import Lines
from nbtrain.opening import Ground
from nbtrain.orders import OrderFiles, Orders
from nbtrain.poll import Poller
from nbtrain.stores import FolderStore
from nbtrain.thread import TrainingThread

STATES = {
    "done": "done",
    "early": "done",
    "pause": "paused",
    "error": "failed",
}  # any other end is a stop


class Driven(ABC):
    """Something that trains, in a thread of its own or in the user's loop, until it is told to end.

    Args:
        name: The session's or the population's.
        opened: Clock, stores.
        shown: Whether lines are printed.
    """

    def __init__(self, name: str, opened: Ground, shown: bool) -> None:
        self.name = name
        self.state, self.reason = "ready", ""
        self.is_own = opened.recipe is None  # the user's: nobody else knows its losses
        self.is_watched = False  # whether a panel can resume it
        self.lines = Lines(shown=shown)
        self.worker: TrainingThread | None = None
        self._ground, self._budget = opened, opened.budget
        self._thread: threading.Thread | None = None
        self._orders = Orders()
        folders = [s.root / name for s in opened.stores if isinstance(s, FolderStore)]
        self._order_files = OrderFiles(folders, self)
        self._interrupts, self._poll = Interrupts(), Poller()
        self.heard: Callable[[], str | None] = lambda: None  # the signal that came where a cell waits
        self._num_loops = 0

    # ---- what a kind of training says of itself

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""

    @abstractmethod
    def bar(self, *, shown: bool = True) -> Bar:
        """Return a progress line; on another thread than the main one it draws nothing."""

    @abstractmethod
    def draw(self, bar: Bar) -> None:
        """Draw a progress line as things are now."""

    @abstractmethod
    def leave(self) -> None:
        """End a loop of this thread that an error in a cell has left behind."""

    @abstractmethod
    def _begin(self) -> None:
        """Do what comes before the first window."""

    @abstractmethod
    def _settle(self) -> None:
        """Raise what the last windows did wrong, while somebody hears it."""

    @abstractmethod
    def _end(self) -> None:
        """Save what is alive and wait for it."""

    @abstractmethod
    def _rest(self) -> None:
        """End the workers; training starts new ones."""

    @abstractmethod
    def _say_goodbye(self, *, prints: bool = True) -> None:
        """Say where it is, why it has ended there, and how it goes on."""

    # ---- what everybody may say

    def start(self, train: Callable[[], None]) -> None:
        """Train in a thread of its own, or let a loop that is held go on: the state is "running"."""
        with self._orders.lock:
            if self.is_held:
                self.state, self.reason = "running", ""
                return
            opening.claim(self.name, self._ground, self)
            self.leave()
            if self.worker is not None:  # it trains no more, and is about to end
                self.worker.join()
                self.worker = None
            if self.is_done:
                train()  # says so, and nothing else
                return
            opening.refuse_beside(self)
            self._num_loops += 1
            thread = TrainingThread(self.name, train, lambda: self.halt("terminate"))
            thread.start()
            self.worker = self._thread = thread
            self._orders.wait = True
            self.state, self.reason = "running", ""
            thread.goes.set()

    def order(self, word: str, act: Callable[[], None]) -> None:
        """Do something at the next boundary, or now where nothing runs; `asked` is its word so long."""
        self._orders.give(word, act)

    def halt(self, reason: str) -> None:
        """End the loop at the next boundary, for a reason; without a loop only a pause can be ended."""
        with self._orders.lock:
            number = self._num_loops
            if self._thread is None and self.state == "paused" and reason != "pause":
                self._rest()
                self.state, self.reason = "stopped", reason
                # Or its panel would go on promising that Resume or Stop is awaited.
                self._say_goodbye(prints=False)
            self.order(reason, lambda: self._halt(reason, number))

    def await_end(self) -> None:
        """Wait for training in another thread that was told to pause or stop; else do nothing."""
        if self.asked in ("pause", "stop") and self.runs_elsewhere and self.worker is not None:
            self.worker.join()

    def close(self) -> None:
        """End the workers, and a pause with them: a newer session takes its place."""
        self.halt("stop")
        self._rest()

    @property
    def runs_elsewhere(self) -> bool:
        """Whether another thread is in the loop."""
        return self._thread not in (None, threading.current_thread())

    @property
    def _holds(self) -> bool:
        """Whether a pause holds the user's own loop in its place: a panel is there to resume it."""
        return self.is_own and self.is_watched

    @property
    def is_held(self) -> bool:
        """Whether a loop of the user's own stands still at a boundary, to be resumed."""
        return self.state == "paused" and self._thread is not None

    @property
    def asked(self) -> str:
        """The order that waits for its boundary, as a word."""
        return self._orders.asked

    @property
    def has_time(self) -> bool:
        """Whether another window fits into the budget."""
        return self._budget.fits("window")

    # ---- what happens

    def _may_go_on(self, what: str) -> bool:
        self._orders.obey()
        if not self.reason:
            self._orders.asked = ""
        if self._interrupts.asked == "interrupt" and self._holds and not self.reason:
            self._interrupts.forget(self._interrupts.num_presses)
            self.reason = "pause"
        elif self._interrupts.asked:
            self.reason = self._interrupts.asked
        elif not self.reason and not self._budget.fits(what):
            self.reason = "budget"
        return not self.reason

    @contextmanager
    def _running(self) -> Iterator[None]:
        opening.claim(self.name, self._ground, self)
        if self._thread is None:  # else the one that `start` has made
            opening.refuse_beside(self)
            self._thread, self.worker = threading.current_thread(), None
            self._orders.wait = True
            self._num_loops += 1
        self.is_own = self._thread is not self.worker
        self.state, self.reason = "running", ""
        with self._interrupts, Poller() as self._poll:
            try:
                self._begin()
                try:
                    yield
                finally:
                    self._settle()
                self.reason = self.reason or "done"
            except GeneratorExit:
                self.reason = self.reason or "stop"
                raise
            except BaseException:
                self._note_error()
                raise
            finally:
                try:
                    self._end()
                finally:
                    self._let_go()

    def _note_error(self) -> None:
        """Note that an error ends it; after a SIGTERM that is the reason: workers had it too."""
        is_told = "terminate" in (self._interrupts.asked, self.heard())
        self.reason = "terminate" if is_told else "error"

    def _let_go(self) -> None:
        with self._orders.lock:
            self._orders.close()
            if self.reason != "pause":
                self._rest()
            self.state = STATES.get(self.reason, "stopped")
            self._thread = None

    def _halt(self, reason: str, number: int) -> None:
        # An order that came too late for its loop is not one for the next.
        if self._thread is not None and number == self._num_loops:
            self.reason = reason if self.reason in ("", "pause") else self.reason
