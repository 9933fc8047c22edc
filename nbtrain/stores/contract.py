"""What every place promises: names, the Store protocol, and errors that say a way out.

The invariant: a name is checked before it becomes a path, so that neither a session called "../x"
nor a hostile manifest can leave the root of a store.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias, runtime_checkable

from ..errors import StoreError

MANIFEST = "manifest.json"

# Aliases, because inside the classes `list` is the method.
Names: TypeAlias = list[str]
Data: TypeAlias = bytes | bytearray | memoryview


@runtime_checkable
class Store(Protocol):
    """A place where bytes survive; files are named "<session>/<checkpoint id>/<file>"."""

    place: str  # words for people, e.g. "Google Drive (/content/drive/MyDrive/nbtrain)"
    degree: str  # what a write that returned has reached: "local", "copied", "durable", "unknown"
    is_remote: bool  # True: commit on this machine first, then copy here in the background

    def list(self, prefix: str = "") -> Names:
        """Name every file under a folder, sorted; "" is all, "cifar" is that session.

        Raises:
            ValueError: the prefix is no folder name.
            StoreError: the place did not answer; it is unknown what is there, nothing changed.
        """

    def read(self, name: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            ValueError: the name is no file name.
            StoreError: absent or unreadable; nothing changed.
        """

    def write(self, name: str, data: Data) -> None:
        """Keep the bytes under a new name, all of them or none where the place can.

        A remote place takes the same bytes again and replaces a shorter file of that name: both
        are what a copy that was cut off leaves behind.

        Raises:
            ValueError: the name is no file name.
            StoreError: the name is taken, or the place refused; files written before are intact.
        """

    def delete(self, name: str) -> None:
        """Remove one file, and its folders once they are empty; absent is fine.

        Raises:
            ValueError: the name is no file name.
            StoreError: the place refused; the file may still be there, all others are intact.
        """


def split_name(name: str) -> tuple[str, ...]:
    """Return the 1 to 3 parts of a file name, or raise ValueError."""
    parts = tuple(name.split("/"))
    if len(parts) <= _MAX_PARTS and all(is_part(part) for part in parts):
        return parts
    raise ValueError(
        f"{name!r} is not a name in a store: 1 to 3 parts with '/' between them, each of letters, "
        "digits, '.', '_' and '-', beginning with a letter or digit, at most 100 long."
    )


def split_prefix(prefix: str) -> tuple[str, ...]:
    """Return the parts of a folder name, none for "", or raise ValueError."""
    return split_name(prefix) if prefix else ()


def is_part(part: str) -> bool:
    """Tell whether this may stand between the slashes of a name."""
    return _PART.fullmatch(part) is not None


def is_below(name: str, prefix: str) -> bool:
    """Tell whether a file lies under this folder."""
    return not prefix or name.startswith(f"{prefix}/")


def num_bytes(data: Data) -> int:
    """Count bytes, also of a memoryview whose items are wider."""
    return memoryview(data).nbytes


def already_there(
    name: str, place: str, data: Data, size_bytes: int, read: Callable[[], bytes]
) -> bool:
    """Judge a file met under a name to be written: True if whole, False if torn, else refuse.

    Raises:
        StoreError: the name holds other bytes; they are intact.
    """
    if size_bytes < num_bytes(data):
        return False
    if size_bytes == num_bytes(data) and read() == bytes(data):
        return True
    raise taken(name, place)


def taken(name: str, place: str) -> StoreError:
    """Word the refusal to overwrite."""
    return StoreError(
        f"{name} exists already, and nothing in a store is overwritten.\n  in: {place}\n"
        "It is intact. Delete it first, or write under a new checkpoint id."
    )


@contextmanager
def explained(doing: str, place: str) -> Iterator[None]:
    """Turn an OSError into a StoreError: what failed, where, what still holds, one way out."""
    try:
        yield
    except OSError as error:
        raise refused(doing, place, error) from error


def refused(doing: str, place: str, error: BaseException) -> StoreError:
    """Word the failure of a place."""
    number = error.errno if isinstance(error, OSError) else None
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return StoreError(
        f"{doing} failed: {reason}.\n  in: {place}\n"
        f"What was committed there before is intact.\n{_WAYS_OUT.get(number, _WAY_OUT)}"
    )


REMOUNT = 'from google.colab import drive; drive.mount("/content/drive", force_remount=True)'

_MAX_PARTS = 3
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_FREE = "Free space there, or choose another place with store=..., and save again."
_CHOOSE = "It cannot be written: choose another place with store=..."
_MOUNT = f"The mount is gone. Mount it again, then go on:\n  {REMOUNT}"
_WAY_OUT = "Try again, or choose another place with store=..."
_WAYS_OUT: dict[int | None, str] = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EROFS: _CHOOSE,
    errno.EACCES: _CHOOSE,
    errno.EPERM: _CHOOSE,
    errno.ENOTCONN: _MOUNT,
    # What a call in flight gets at the moment the server of the mount dies.
    errno.ECONNABORTED: _MOUNT,
    errno.ENOENT: "Bring the file back, or check the path; another place is given with store=...",
}
