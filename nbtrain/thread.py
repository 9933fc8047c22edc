"""The thread that trains: it computes as the cell that started it would, and keeps what it raises.

Torch has settings that belong to a thread, and a `with torch.autocast(...)` around `session.run()` is
meant for the training. They are taken over at the start; the rest of torch's settings is the process's.
"""

from __future__ import annotations

import atexit
import contextvars
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST = ("cpu", "cuda")
EXIT_PATIENCE_S = 60.0  # for the window that is under way and the save; hosts wait far less


class TrainingThread(threading.Thread):
    """Runs some work once; ends with the process, so that a kernel can always be shut down.

    Args:
        name: Of the session.
        work: What to do.
        end: Asks the work to end soon, for when the process does and nobody waits.
    """

    def __init__(self, name: str, work: Callable[[], None], end: Callable[[], None]) -> None:
        super().__init__(name=f"nbtrain {name}", daemon=True)
        self.goes = threading.Event()
        self.ended, self._ends = socket.socketpair()  # readable once it has ended
        weakref.finalize(self, self.ended.close)
        weakref.finalize(self, self._ends.close)
        self._end = end
        self.error: BaseException | None = None
        self.problem = ""  # the error in words, also when it has been raised
        self._work = work
        self._settings = Settings()
        # With it, newer kernels show what the user's code prints where the run was started.
        self._context = contextvars.copy_context()

    def run(self) -> None:
        """Do the work, once `goes` is set: by then everybody knows of this thread."""
        self.goes.wait()
        atexit.register(self._end_in_time)
        try:
            with self._settings.applied():
                self._context.run(self._work)
        except BaseException as error:  # raised again by who waits
            self.error, self.problem = error, f"{type(error).__name__}: {error}"
        finally:
            atexit.unregister(self._end_in_time)
            del self._work, self._end  # they hold the session, and who waits may keep this thread
            self._ends.send(b".")

    def _end_in_time(self) -> None:
        self._end()
        self.join(EXIT_PATIENCE_S)


class Settings:
    """Those of torch's settings that are the calling thread's own."""

    def __init__(self) -> None:
        self._grad, self._device = torch.is_grad_enabled(), torch.get_default_device()
        has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.cuda = torch.cuda.current_device() if has_cuda else None
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
            for kind in AUTOCAST
            if torch.is_autocast_enabled(kind)
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let them be the current thread's, for as long as this is entered."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._grad))
            if self.cuda is not None:
                stack.enter_context(torch.cuda.device(self.cuda))
            if self._device != torch.get_default_device():
                stack.enter_context(self._device)
            for kind, dtype, has_cache in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=has_cache))
            yield
