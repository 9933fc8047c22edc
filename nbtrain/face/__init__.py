"""The face of a session or a population: one thread draws panel and static twin, beside the training.

It looks twice a second while there is training, and at once where somebody clicked or typed. It
holds what it shows only weakly: a panel that still stands in a page keeps no model in the memory.
"""

from __future__ import annotations

import atexit
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

from IPython import get_ipython

from nbtrain import plots
from nbtrain.errors import NbtrainWarning
from nbtrain.face.board import Board, in_words
from nbtrain.face.markup import Run, Trained
from nbtrain.face.panel import Panel
from nbtrain.face.twin import Outputs, Twin

TICK_S = 0.5  # each look takes the interpreter's lock from the training; a click wakes at once
IDLE_S = 1.0  # between two looks at whether it trains again
EXIT_PATIENCE_S = 5.0  # for a picture that is being drawn
TWIN_EVERY_S = 30.0  # a picture in the saved notebook; short epochs must not draw without end
GONE = (
    "What this panel steers is no longer in this kernel. Run its cell again, or nbtrain.resume({!r})."
)


class Drawn(ABC):
    """What a notebook shows of a session or a population.

    Args:
        session: Is drawn, and takes the orders.
        clock: Monotonic seconds.
    """

    def __init__(self, session: Trained, clock: Callable[[], float]) -> None:
        self._session: Trained = weakref.proxy(session)
        self._name, self._clock = session.name, clock
        self._twin = self._new_twin()
        self._touched = threading.Event()
        self._is_over = False
        self._drawing = threading.RLock()
        self._thread: threading.Thread | None = None
        self._shown: tuple[object, bool] | None = None
        self._twin_due = 0.0
        self._state = self._last_problem = ""
        self.panel: Board | None = None
        self.problem = ""

    @abstractmethod
    def _new_twin(self) -> Outputs:
        """Make what stays without a kernel."""

    @abstractmethod
    def _new_panel(self) -> Board:
        """Make what acts."""

    def show(self, *, panel: bool) -> None:
        """Show panel and twin in the cell that runs, or the twin alone; once in a cell.

        Args:
            panel: Whether somebody watches.
        """
        with self._drawing:
            cell = _cell()
            before = self._shown if self._shown is not None and self._shown[0] == cell else None
            self._shown = (cell, panel or (before is not None and before[1]))
            try:
                if panel and (before is None or not before[1]):
                    if self.panel is None:
                        self.panel = self._new_panel()
                    self.panel.show()
                if before is None:
                    self._twin.show()
                    self._twin_due = self._clock() + TWIN_EVERY_S
            except Exception as error:  # the training must not end with its picture: it is told
                self._tell(in_words(error))
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._watch, name="nbtrain face", daemon=True)
            self._thread.start()
        self.wake()
        self._warn()

    def wake(self) -> None:
        """Draw soon, as something has changed."""
        self._touched.set()

    def settle(self) -> None:
        """Draw and renew everything now, in this thread, and warn of what could not be drawn.

        Does nothing where nothing is shown.
        """
        if self._shown is None:
            return
        self._draw(at_once=True)
        self._warn()

    def _watch(self) -> None:
        # A process that ends while this thread is inside matplotlib is aborted.
        atexit.register(self._end)
        try:
            while not self._is_over:
                is_late = self.panel is not None and self.panel.is_late
                touched = self._touched.wait(TICK_S if is_late or self._state == "running" else IDLE_S)
                self._touched.clear()
                state = self._session.state
                due = touched or is_late or state == "running" or state != self._state
                if due and not self._is_over:
                    self._draw(touched=touched)
        except ReferenceError:
            if self.panel is not None:
                self.panel.leave(GONE.format(self._name))
        finally:
            atexit.unregister(self._end)

    def _end(self) -> None:
        self._is_over = True
        self._touched.set()
        if self._thread is not None:
            self._thread.join(EXIT_PATIENCE_S)

    def _draw(self, *, at_once: bool = False, touched: bool = True) -> None:
        with self._drawing:
            state, now = self._session.state, self._clock()
            at_once = at_once or state != self._state
            self._state = state
            try:
                if self.panel is not None:
                    self.panel.refresh(at_once=at_once, touched=touched)
                    self.panel.draw(at_once=at_once)
                if self._twin.is_stale and (at_once or now >= self._twin_due):
                    self._twin.renew()
                    self._twin_due = self._clock() + TWIN_EVERY_S
            except ReferenceError:
                raise
            except Exception as error:  # the training must not end with its picture: it is told
                self._tell(in_words(error))

    def _tell(self, problem: str) -> None:
        if problem == self._last_problem:
            return
        self._last_problem = self.problem = problem
        if self.panel is not None:
            self.panel.say(f"Not all was drawn: {problem}")

    def _warn(self) -> None:
        if self.problem:
            problem, self.problem = self.problem, ""
            warnings.warn(f"Not all was drawn: {problem}", NbtrainWarning, stacklevel=4)


class Face(Drawn):
    """What a notebook shows of a session.

    Args:
        session: Is drawn, and takes the orders.
        clock: Monotonic seconds.
    """

    _session: Run

    def __init__(self, session: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self._curves = plots.Curves(session.name)
        super().__init__(session, clock)

    def _new_twin(self) -> Outputs:
        return Twin(self._session, self._curves)

    def _new_panel(self) -> Board:
        return Panel(self._session, self._curves, self._touched, self._clock)


def _cell() -> object:
    """Return what two calls in one run of a cell have in common."""
    shell = get_ipython()
    return None if shell is None else shell.execution_count
