"""SIGINT and SIGTERM as words that are read between two windows.

A signal may arrive in the middle of an optimizer step, where half of the parameters are new. So the
first one only leaves a word; the loop ends its window, saves, and then does what the signal would
have done. One press too many does it at once, and what was committed before remains. Jupyter may send
two within milliseconds when it shuts a kernel down: those count as one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

ONE_PRESS_S = 0.5


class Interrupted(KeyboardInterrupt):
    """An interrupt that lost nothing; in a notebook it is one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


class Interrupts:
    """While entered, `asked` is None, "interrupt" or "terminate", and `num_presses` counts the first.

    Args:
        at_once: The press that no longer leaves a word but raises, wherever the main thread is.
        one_press_s: What comes within so many seconds of a press belongs to it.
    """

    def __init__(self, at_once: int = 2, one_press_s: float | None = None) -> None:
        self.asked: str | None = None
        self.num_presses = 0
        self._at_once, self._one_press_s = at_once, one_press_s
        self._pressed_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self.asked, self.num_presses = None, 0
        # Only the main thread may set handlers; elsewhere the notebook's own do their work.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Do what the signal would have done, now that everything is saved."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        if self.asked == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.asked == "interrupt" and kind is None:
            raise Interrupted("everything is saved; run the cell again to go on.")

    def forget(self, num_presses: int) -> None:
        """Take the first presses back: what they asked was done, and undone since."""
        self.num_presses -= num_presses
        if not self.num_presses:
            self.asked = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        one_press_s = ONE_PRESS_S if self._one_press_s is None else self._one_press_s
        again = self.num_presses and now - self._pressed_at <= one_press_s
        is_new = number == signal.SIGTERM or not again
        if is_new:
            self.num_presses, self._pressed_at = self.num_presses + 1, now
        if number == signal.SIGTERM:
            self.asked = "terminate"
            return
        self.asked = self.asked or "interrupt"
        if is_new and self.num_presses >= self._at_once:
            raise KeyboardInterrupt
