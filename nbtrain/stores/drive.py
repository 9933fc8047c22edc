"""A Google Drive mount, as Colab has it.

The invariant: a finished write has reached the mount's cache on this machine and no more; the
upload comes later, in no promised order, and nothing here can see it. So the degree is "copied".

What a mount does badly is not done: a file gets its final name at once and is never renamed,
appended to or overwritten (files that change may never be uploaded: googlecolab/colabtools#287).
A crash may therefore leave a torn file under its real name; the manifest tells it from a whole one.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from .contract import Data, already_there, explained, split_name
from .folder import FolderStore, make_folders, read_file, write_file


class DriveStore(FolderStore):
    """Files below one folder of a mounted Google Drive.

    Args:
        root: Made by the first write. The Drive above it is not: where that is missing, nothing is
            mounted, and a write would end on the machine's own disk.
    """

    degree = "copied"
    is_remote = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root, degree="copied")
        self.place = f"Google Drive ({self.root})"
        self._top = drive_top(self.root) or self.root.parent

    def write(self, name: str, data: Data) -> None:
        parts = split_name(name)
        with explained(f"Writing {name}", self.place):
            path = self._inside(parts)
            if os.path.lexists(path):
                size_bytes = os.lstat(path).st_size
                if already_there(name, self.place, data, size_bytes, lambda: read_file(path)):
                    return
                self._remove(path)
            make_folders(path.parent)
            try:
                write_file(path, data, os.O_EXCL)
            except FileExistsError:
                # Somebody else's, who came between: it is not ours to remove.
                raise
            except BaseException:
                # The mount may be gone: what has to be told is why the write failed.
                with suppress(OSError):
                    self._remove(path)
                raise

    def _remove(self, path: Path) -> None:
        # Drive's trash counts against the quota for 30 days, so what goes there goes empty.
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)
        os.unlink(path)

    def _inside(self, parts: tuple[str, ...]) -> Path:
        try:
            os.stat(self._top)
        except OSError as error:
            # An unmounted Drive would otherwise read as an empty one, and look like a fresh start.
            raise OSError(errno.ENOTCONN, f"{self._top} does not answer") from error
        return super()._inside(parts)


def drive_top(path: Path) -> Path | None:
    """Return the folder of a path that only a mounted Drive has, None if it is on no Drive."""
    for num, part in enumerate(path.parts, start=1):
        if part in _TOPS:
            return Path(*path.parts[:num])
    return None


_TOPS = ("MyDrive", "My Drive", "Shareddrives", "Shared drives")
