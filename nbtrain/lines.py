"""What a session says, line by line: kept, and printed where somebody waits for it.

What a thread prints lands in whichever cell runs last. So the thread that trains only keeps its lines;
who waits for it on the main thread prints them, a panel shows the last of them, and a loop of the
user's own, which runs on the main thread, prints them at once.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from pathlib import Path

from tqdm.auto import tqdm

from nbtrain.errors import NbtrainWarning

MAX_LINES = 500
_OURS = str(Path(__file__).parent)


class Lines:
    """The last lines of a session.

    Args:
        shown: Whether lines are printed; warnings always are.
    """

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self._kept: deque[str] = deque(maxlen=MAX_LINES)
        self._to_print: deque[str] = deque(maxlen=MAX_LINES)
        self._to_warn: deque[str] = deque(maxlen=MAX_LINES)

    def say(self, text: str, *, prints: bool = True) -> None:
        """Keep a line; on the main thread print it too.

        With `prints=False` only a panel shows it.
        """
        self._kept.append(text)
        if prints:
            self._to_print.append(text)
            self.flush()

    def warn(self, text: str) -> None:
        """Keep a line as a warning; on the main thread issue it too, where the user's code called."""
        self._kept.append(f"Warning: {text}")
        self._to_warn.append(text)
        self.flush()

    def flush(self, *, prints: bool = True) -> None:
        """On the main thread print and warn what has been kept back; on another do nothing.

        With `prints=False` only the warnings come out: a panel shows the lines already.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        while self._to_print:
            text = self._to_print.popleft()
            if self.shown and prints:
                tqdm.write(text)
        while self._to_warn:
            warnings.warn(self._to_warn.popleft(), NbtrainWarning, stacklevel=_level_outside())

    def last(self, num_lines: int = MAX_LINES) -> list[str]:
        """Return the newest lines, oldest first."""
        return list(self._kept)[-num_lines:]


def _level_outside() -> int:
    """Return the stacklevel of the user's own line, which is what a warning shall point at."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    return level
