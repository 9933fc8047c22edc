"""A folder on this machine.

The invariant: a file has its name only when all its bytes are on the disk. It is written and synced
under a temp name, renamed, and the folder is synced too::

    <root>/cifar/000004-ab12cd/.model.safetensors.tmp   <- never listed; a crash may leave it
    <root>/cifar/000004-ab12cd/model.safetensors

Every change goes through `os` and nothing else, so that the crash test can die at each of them.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import StoreError
from .contract import MANIFEST, Data, Names, explained, is_part, split_name, split_prefix, taken


class FolderStore:
    """Files below one folder, each there as a whole or not at all.

    Args:
        root: Made by the first write, with the folders above it.
        degree: What a finished write has reached: "durable" unless the disk goes with the machine.
    """

    degree: str = "durable"
    is_remote: bool = False

    def __init__(self, root: str | os.PathLike[str], *, degree: str = "durable") -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(root)))
        self.place = f"folder {self.root}"
        self.degree = degree

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r})"

    def list(self, prefix: str = "") -> Names:
        parts = split_prefix(prefix)
        with explained(f"Listing {prefix or 'everything'}", self.place):
            folder, links = self._inside((*parts, MANIFEST)).parent, list[Path]()
            names = sorted(_walk(folder, parts, links))
            if parts:
                self._refuse_moved(links)
            return names

    def read(self, name: str) -> bytes:
        parts = split_name(name)
        with explained(f"Reading {name}", self.place):
            return read_file(self._inside(parts))

    def write(self, name: str, data: Data) -> None:
        parts = split_name(name)
        with explained(f"Writing {name}", self.place):
            path = self._inside(parts)
            if os.path.lexists(path):
                raise taken(name, self.place)
            if make_folders(path.parent) and len(parts) == 3:
                _sweep(path.parent.parent)
            temp = _temp_of(path)
            try:
                write_file(temp, data, os.O_TRUNC)
                os.replace(temp, path)
            except BaseException:
                # The disk may be full or gone: what has to be told is why the write failed.
                with suppress(OSError):
                    os.unlink(temp)
                raise
            sync_folder(path.parent)

    def delete(self, name: str) -> None:
        parts = split_name(name)
        with explained(f"Deleting {name}", self.place):
            path = self._inside(parts)
            with suppress(FileNotFoundError, NotADirectoryError):
                self._remove(path)
            for folder in path.parents[: len(parts) - 1]:
                if not _remove_empty(folder):
                    break

    def _remove(self, path: Path) -> None:
        os.unlink(path)

    def _refuse_moved(self, links: Iterable[Path]) -> None:
        """Refuse a listing that lacks what somebody has moved elsewhere and linked back."""
        root = Path(os.path.realpath(self.root))
        for path in links:
            target = Path(os.path.realpath(path))
            # One that leads nowhere may be of a disk that is not mounted today.
            is_ours = path.name == MANIFEST or (target / MANIFEST).exists() or not target.exists()
            if is_ours and not target.is_relative_to(root):
                raise StoreError(
                    f"{path} leads to {target} through a link, and links are not followed: what lies "
                    f"there would be missing.\n  in: {self.place}\nNothing was changed. Move it back; "
                    "or move the whole store, and give store= where it is then."
                )

    def _inside(self, parts: tuple[str, ...]) -> Path:
        """Return the path of these checked parts, or refuse if a link leads elsewhere."""
        path = Path(os.path.realpath(self.root), *parts)
        if parts and os.path.realpath(path.parent) != str(path.parent):
            raise StoreError(
                f"{path.parent} leads elsewhere through a link, and links are not followed.\n"
                f"  in: {self.place}\nNothing was changed. Remove the link, or choose store=..."
            )
        return path


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file, following no link."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(os.open(path, os.O_RDONLY | _FLAGS), "rb") as file:
        return file.read()


def write_file(path: Path, data: Data, flag: int) -> None:
    """Create a file with these bytes, synced; `flag` is O_EXCL or O_TRUNC."""
    view = memoryview(data).cast("B")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag | _FLAGS, 0o666)
    try:
        done = 0
        while done < len(view):
            written = os.write(descriptor, view[done : done + _CHUNK_BYTES])
            if not written:
                raise OSError(errno.EIO, "the file takes no more bytes", str(path))
            done += written
        os.fsync(descriptor)
    finally:
        # A mount may report a failed write only here, so the error of close counts as well.
        os.close(descriptor)


def make_folders(folder: Path) -> bool:
    """Make a folder and those above it, each synced into its parent; True if it was new."""
    if folder.is_dir():
        return False
    make_folders(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if folder.is_dir():
            return False
        raise
    sync_folder(folder.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder survive a power cut, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Many network and FUSE mounts know no sync of a folder; there is nothing more to do there.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_CHUNK_BYTES = 1 << 26  # macOS refuses a single write of 2 GiB
_STALE_S = 3600.0


def _walk(folder: Path, parts: tuple[str, ...], links: list[Path]) -> Iterator[str]:
    """Give the names of files, and put links, which are not followed, into a list."""
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            inner = (*parts, entry.name)
            if not is_part(entry.name):
                continue
            if entry.is_symlink():
                links.append(folder / entry.name)
            elif entry.is_file(follow_symlinks=False):
                yield "/".join(inner)
            elif len(inner) < 3 and entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, inner, links)


def _temp_of(path: Path) -> Path:
    # A leading dot is no part of a name, so it is never listed; always the same, so that the next
    # write of the name goes over what a crash has left.
    return path.with_name(f".{path.name}.tmp")


def _is_temp(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _remove_empty(folder: Path) -> bool:
    """Remove a folder that holds nothing or only temp files; False if it has to stay."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return True
    if not all(_is_temp(name) for name in names):
        sync_folder(folder)
        return False
    for name in names:
        os.unlink(folder / name)
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False  # somebody has just written there
        raise
    sync_folder(folder.parent)
    return True


def _sweep(session: Path) -> None:
    """Remove checkpoint folders in which a crash left nothing but temp files.

    Nobody else ever would: they are never listed, and their ids are never used again.
    """
    for folder in sorted(entry for entry in session.iterdir() if not entry.is_symlink()):
        if not folder.is_dir():
            continue
        # One written to in the last hour may belong to another notebook of the same session.
        # What vanishes meanwhile was theirs, and no concern of ours.
        with suppress(FileNotFoundError):
            if (temps := os.listdir(folder)) and all(
                _is_temp(name) and os.lstat(folder / name).st_mtime < time.time() - _STALE_S
                for name in temps
            ):
                _remove_empty(folder)
