"""Orders given from anywhere, obeyed by the loop at a boundary; and files as orders.

A click, a word and a file may come on any thread and at any moment. What they ask waits here until the
loop is between two windows, and is done at once where no loop runs.

`PAUSE` and `STOP` in a session's folder are for where no click arrives: a phone with Google Drive on it
has no kernel. Such a file is removed when it is obeyed, so that the next run is not stopped.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LOOK_EVERY_S = 2.0
FILES = ("PAUSE", "STOP")


class Orders:
    """What was asked and is not done yet.

    Attributes:
        lock: Held while it changes whether somebody trains, and so where an order goes.
        wait: Whether orders wait for a boundary; else each is done as it is given.
        asked: The newest that waits, as a word.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.wait, self.asked = False, ""
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def give(self, word: str, act: Callable[[], None]) -> None:
        """Do something at the next boundary, or now where nothing runs."""
        with self.lock:
            if not self.wait:
                act()
            else:
                self.asked = word
                self._queue.put(act)

    def obey(self) -> int:
        """Do what waits, and return how many orders that were."""
        # As many as there are now: who orders without end must not stop the training.
        num_orders = self._queue.qsize()
        for _ in range(num_orders):
            self._queue.get()()
        return num_orders

    def close(self) -> None:
        """Do what waits, and from now on each order as it is given."""
        self.obey()
        self.wait, self.asked = False, ""


class OrderFiles:
    """Looks for order files, on a thread of its own: a mount that hangs holds up nobody else.

    Args:
        folders: The session's folder in each of its stores.
        loop: Has `name`, `state`, `lines` and `halt`; held weakly, so that it can go.
    """

    def __init__(self, folders: Iterable[Path], loop: Any) -> None:
        self._folders, self._loop = list(folders), weakref.ref(loop)
        self._stuck: set[Path] = set()
        self._pause = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look from now on, unless that goes on already; what lies there from before is removed."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="nbtrain orders", daemon=True)
            self._thread.start()

    def take(self) -> list[Path]:
        """Return the files that have come, each once, and remove them."""
        found = []
        for path in (folder / name for folder in self._folders for name in FILES):
            if not os.path.isfile(path):  # False too where a mount has died
                self._stuck.discard(path)
                continue
            is_new = path not in self._stuck
            try:
                path.unlink()
            except OSError:  # it cannot be removed: one order for as long as it lies there
                self._stuck.add(path)
            if is_new:
                found.append(path)
        return found

    def _look(self) -> None:
        self.take()
        while not self._pause.wait(LOOK_EVERY_S):
            loop = self._loop()
            if loop is None or loop.state not in ("running", "paused"):
                return
            for path in self.take():
                order = path.name.lower()
                loop.lines.say(f"{loop.name}: {order} was ordered by the file {path}.")
                loop.halt(order)
            del loop
