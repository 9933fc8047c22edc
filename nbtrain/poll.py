"""Widget messages, handled while a cell is busy: so a button acts during the cell that trains.

A kernel reads its next message when the running cell ends. A `Poller` reads the kernel's own socket
from inside the cell. What belongs to widgets goes through the kernel's own dispatch at once; all else,
the next cell above all, is put aside and given back in its order when the cell ends, to the very
callback that the kernel has set for it. One path serves ipykernel 6.17.1 to 7.4:

    stream              the ZMQStream that feeds the main thread: `kernel.shell_stream` up to 6,
                        since 7 the main thread's end of `kernel.shell_channel_thread.manager`
    stream.socket       read without the event loop, which the cell holds; wakes who sleeps on it
    stream._recv_callback   what the kernel does with a message: it gets back what was put aside
    kernel.dispatch_shell   a coroutine that never really waits for widgets: driven by hand
    pre_handler_hook, post_handler_hook   set and reset SIGINT around a message. They remember one
                        handler only, so that nested they lose the kernel's own, and the next interrupt
                        of the idle kernel would end it: they stand still meanwhile
    set_parent, _parent_ident   whose output it is: put back, so that a later print stays in its cell
    _publish_status     "busy" again, because the dispatch has told the front end "idle"
    _shutdown_message   set once the kernel is to end: then nothing is given back

None of this is promised by ipykernel. Where a part is missing, nothing is read, and `problem` says so.
"""

from __future__ import annotations

import asyncio
import inspect
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nbtrain import host

WIDGETS = frozenset({"comm_open", "comm_msg", "comm_close", "comm_info_request"})

# A slider that is dragged for ever must not keep the cell from looking at its worker.
MAX_AT_ONCE = 100

# An inner poller would give its messages back before the outer one gives the older ones.
_only_one = threading.Lock()


class Poller:
    """Handles widget messages whenever it is called, while it is entered on the main thread.

        with Poller() as poll:
            while worker.is_alive():
                poll()
                poll.wait(0.25, worker.ended)

    Outside a kernel, in another thread and inside another poller it handles nothing.

    Attributes:
        problem: "" or the sentence for the user that says why buttons act only when the cell ends.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._kernel: Any = None
        self._stream: Any = None
        self._works = False
        self._is_inside = False
        self._aside: list[list[Any]] = []
        self._given: list[asyncio.Future[Any]] = []

    def __enter__(self) -> Poller:
        self.problem = ""
        kernel = host.kernel() if _is_main() else None
        if kernel is None or not _only_one.acquire(blocking=False):
            return self
        try:
            self._stream = _main_stream(kernel)
            _probe(kernel, self._stream)
        except Exception as error:  # whatever an unknown kernel raises, the cell goes on without it
            self._stream = None
            self._give_up(error)
            _only_one.release()
        else:
            self._kernel, self._works = kernel, True
        return self

    def __exit__(self, *_: object) -> None:
        """Give all that was put aside back to the kernel, in its order, unless that is shut down.

        At once, because an error in the cell stops what the kernel has in its queue by then.
        """
        if self._stream is None:
            return
        with _interrupts_wait():
            stream, self._stream, self._works = self._stream, None, False
            _only_one.release()
            aside, self._aside = self._aside, []
            # Up to ipykernel 6 a queued cell would begin before a shutdown takes effect.
            if stream.closed() or getattr(self._kernel, "_shutdown_message", None) is not None:
                return
            for frames in aside:
                self._give(stream, frames)
            # The socket tells its event loop once only that there is something to read.
            stream.flush()

    def __call__(self) -> int:
        """Handle the widget messages that have come; never raises for the kernel's sake.

        An interrupt that comes meanwhile acts afterwards, so that it is neither swallowed by the
        kernel nor tears a message; a second one, for a callback that hangs, acts at once.

        Returns:
            How many were handled.
        """
        if not self._works or self._is_inside or not _is_main():
            return 0
        num_handled = 0
        self._is_inside = True
        try:
            with _interrupts_wait():
                try:
                    num_handled = self._poll()
                except Exception as error:  # an unknown kernel; errors of callbacks never get here
                    self._give_up(error)
        finally:
            self._is_inside = False
        return num_handled

    @property
    def is_handling(self) -> bool:
        """Whether a message is being handled right now."""
        return self._is_inside

    def wait(self, timeout_s: float, *others: socket.socket) -> None:
        """Sleep until a message has come, or another socket has something, or it is time."""
        # Each waking takes the interpreter's lock from the training: none that brings nothing.
        with selectors.DefaultSelector() as ears:
            for one in others:
                ears.register(one, selectors.EVENT_READ)
            if self._works and not self._stream.closed():
                # Its file is readable once for all that has come, and asking takes that away. So ask:
                # what lies there already will not wake anybody, and after a "no" the next one will.
                if self._stream.socket.poll(0):
                    return
                ears.register(self._stream.socket.fileno(), selectors.EVENT_READ)
            ears.select(timeout_s)

    def _poll(self) -> int:
        num_handled = 0
        for _ in range(MAX_AT_ONCE):
            if self._stream.closed() or not self._stream.socket.poll(0):
                break
            frames = self._stream.socket.recv_multipart(copy=False)
            if _kind(self._kernel, frames) not in WIDGETS:
                self._aside.append(frames)
                continue
            try:
                _dispatch(self._kernel, frames)
            except Exception:
                self._aside.append(frames)
                raise
            num_handled += 1
        if num_handled:
            self._kernel._publish_status("busy", "shell")
        return num_handled

    def _give(self, stream: Any, frames: list[Any]) -> None:
        given = stream._recv_callback(frames)
        # Made a task here, not by `add_callback`: what the stream has yet to read must come later.
        if inspect.isawaitable(given):
            self._given.append(asyncio.ensure_future(given, loop=self._kernel.io_loop.asyncio_loop))

    def _give_up(self, error: Exception) -> None:
        self._works = False
        version = getattr(sys.modules.get("ipykernel"), "__version__", "?")
        self.problem = (
            f"Buttons act only when the cell ends, because ipykernel {version} is built in an unknown "
            f"way ({type(error).__name__}: {error}); until then a file named PAUSE or STOP in the "
            "session's folder, or the interrupt button, acts at once."
        )


def answer_where_asked(widget: Any) -> None:
    """Let a widget's messages go to the thread that the front end has chosen for them.

    JupyterLab asks for a thread of their own, which a busy cell does not block. ipykernel 7.4 sends
    them all to the thread that spoke last, which is the cell's. Elsewhere this does nothing.
    """
    comm: Any = getattr(widget, "comm", None)
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _main_stream(kernel: Any) -> Any:
    thread = getattr(kernel, "shell_channel_thread", None)
    if thread is None:
        return kernel.shell_stream
    return thread.manager.get_shell_channel_to_subshell_pair(None).to_stream


def _probe(kernel: Any, stream: Any) -> None:
    """Touch everything that is needed later, before the first message is in hand."""
    for function in (
        *(
            stream._recv_callback,
            stream.flush,
            stream.closed,
            stream.socket.poll,
            stream.socket.fileno,
            stream.socket.recv_multipart,
        ),
        *(kernel.dispatch_shell, kernel.set_parent, kernel._publish_status),
        *(kernel.pre_handler_hook, kernel.post_handler_hook),
        *(kernel.session.feed_identities, kernel.session.unpack),
    ):
        if not callable(function):
            raise TypeError(f"{function!r} is no function")
    if not isinstance(stream.socket.poll(0), int):
        raise TypeError("the socket belongs to an event loop")
    kernel.get_parent("shell"), kernel._parent_ident["shell"], kernel.io_loop.asyncio_loop


def _kind(kernel: Any, frames: list[Any]) -> str:
    try:
        _, parts = kernel.session.feed_identities(frames, copy=False)
        return str(kernel.session.unpack(parts[1].bytes)["msg_type"])
    except (ValueError, LookupError, TypeError):
        # The kernel sends itself notes that are no messages, and has its own word for broken ones.
        return ""


def _dispatch(kernel: Any, frames: list[Any]) -> None:
    """Let the kernel handle one message as if it were idle, and leave no trace of that."""
    parent, ident = kernel.get_parent("shell"), kernel._parent_ident["shell"]
    # What the cell has printed goes out under the parent of the moment, so before it changes.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    kernel.pre_handler_hook = kernel.post_handler_hook = _stand_still
    try:
        _drive(kernel.dispatch_shell(frames))
    finally:
        del kernel.pre_handler_hook, kernel.post_handler_hook
        kernel.set_parent(ident, parent, channel="shell")


def _stand_still() -> None:
    pass


def _drive(coroutine: Any) -> None:
    """Run a coroutine to its end without an event loop; a bare `yield` only lets others run first."""
    try:
        for _ in range(1000):
            if coroutine.send(None) is not None:
                break
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("a widget message waits for the event loop")


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if held:
            signal.raise_signal(signal.SIGINT)
