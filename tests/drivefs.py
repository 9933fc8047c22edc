"""A Drive-like mount for tests: a FUSE server that keeps what it is given and uploads when told.

Run as a process of its own: `python drivefs.py CACHE MOUNT CLOUD`, with the right to mount. What is
written below MOUNT lies in CACHE at once, and in CLOUD only after the word "upload" on stdin. Every
line on stdin is answered with one line of JSON on stdout::

    mounted              (the first line, unasked)
    upload        ->     the files that went to CLOUD just now
    trash         ->     the bytes that deleted files still had, as Drive counts them

Like Drive it says yes to fsync at once. Unlike Drive it knows no rename at all, so that a store that
renames is caught. Killed, it leaves what a dead DriveFS leaves: errno 107 on every touch.

The numbers and layouts are the kernel's: include/uapi/linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import shutil
import stat
import struct
import sys
from pathlib import Path

HEADER = struct.Struct("<IIQQIIII")  # length, operation, unique, node, uid, gid, pid, padding
FORGET, BATCH_FORGET = 2, 42  # the two that want no answer
ROOT = 1


class Drive:
    """Answers the kernel's requests from a folder, and remembers what was not uploaded yet."""

    def __init__(self, cache: Path, cloud: Path) -> None:
        self.cache, self.cloud = cache, cloud
        self.pending: set[Path] = set()
        self.trash_bytes = 0
        self._paths = {ROOT: cache}
        self._files: dict[int, tuple[int, Path]] = {}
        self._next = ROOT
        self._operations = {
            1: self.lookup,
            3: self.get_attributes,
            4: self.set_attributes,
            9: self.make_folder,
            10: self.unlink,
            11: self.remove_folder,
            14: self.open,
            15: self.read,
            16: self.write,
            17: self.statistics,
            18: self.release,
            20: self.agree,  # fsync
            25: self.agree,  # flush
            26: self.start,
            27: self.agree_to_open,  # opendir
            28: self.list_folder,
            29: self.agree,  # releasedir
            30: self.agree,  # fsyncdir
            35: self.create,
        }

    def answer(self, request: bytes) -> bytes | None:
        length, operation, unique, node, *_ = HEADER.unpack_from(request)
        if operation in (FORGET, BATCH_FORGET):
            return None
        error, body = 0, b""
        try:
            if operation not in self._operations:
                raise OSError(errno.ENOSYS, "no such operation")
            body = self._operations[operation](node, request[HEADER.size : length])
        except OSError as failure:
            error = -(failure.errno or errno.EIO)
        except KeyError:  # a file that is deleted by now
            error = -errno.ESTALE
        return struct.pack("<IiQ", 16 + len(body), error, unique) + body

    def command(self, word: str) -> object:
        if word == "trash":
            return self.trash_bytes
        uploaded = sorted(path.relative_to(self.cache) for path in self.pending if path.exists())
        for path in uploaded:
            (self.cloud / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.cache / path, self.cloud / path)
        self.pending.clear()
        return [str(path) for path in uploaded]

    def start(self, node: int, body: bytes) -> bytes:
        max_write = 1 << 17
        return struct.pack("<4I2H2I2H8I", 7, 31, max_write, 0, 16, 12, max_write, 1, 32, *[0] * 9)

    def lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(self._child(node, body))

    def get_attributes(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + _attributes(self._paths[node])

    def set_attributes(self, node: int, body: bytes) -> bytes:
        valid, size = struct.unpack_from("<I12xQ", body)
        if valid & 8:
            os.truncate(self._paths[node], size)
        return self.get_attributes(node, body)

    def make_folder(self, node: int, body: bytes) -> bytes:
        path = self._child(node, body[8:])
        path.mkdir()
        return self._entry(path)

    def unlink(self, node: int, body: bytes) -> bytes:
        path = self._child(node, body)
        self.trash_bytes += path.stat().st_size
        path.unlink()
        self._forget(path)
        return b""

    def remove_folder(self, node: int, body: bytes) -> bytes:
        path = self._child(node, body)
        path.rmdir()
        self._forget(path)
        return b""

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<2I", body)
        path = self._child(node, body[16:])
        return self._entry_after(self._open(path, flags | os.O_CREAT, mode), path)

    def open(self, node: int, body: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        return self._open(self._paths[node], flags)

    def read(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(self._files[handle][0], size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        descriptor, path = self._files[handle]
        self.pending.add(path)
        return struct.pack("<II", os.pwrite(descriptor, body[40 : 40 + size], offset), 0)

    def release(self, node: int, body: bytes) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        os.close(self._files.pop(handle)[0])
        return b""

    def list_folder(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        found = b""
        names = sorted(path.name for path in self._paths[node].iterdir())
        for index, name in enumerate(names[offset:], start=offset + 1):
            raw = name.encode()
            entry = struct.pack("<QQII", index, index, len(raw), 0) + raw
            entry += b"\0" * (-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found

    def statistics(self, node: int, body: bytes) -> bytes:
        blocks = 1 << 20
        return struct.pack("<5Q10I", blocks, blocks, blocks, blocks, blocks, 4096, 255, 4096, *[0] * 7)

    def agree(self, node: int, body: bytes) -> bytes:
        return b""

    def agree_to_open(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0)

    def _open(self, path: Path, flags: int, mode: int = 0) -> bytes:
        kept = flags & (os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_TRUNC)
        self._next += 1
        self._files[self._next] = os.open(path, kept, mode & 0o777), path
        return struct.pack("<QII", self._next, 0, 0)

    def _child(self, node: int, body: bytes) -> Path:
        return self._paths[node] / body.partition(b"\0")[0].decode()

    def _entry(self, path: Path) -> bytes:
        attributes = _attributes(path)
        node = next((node for node, known in self._paths.items() if known == path), None)
        if node is None:
            self._next += 1
            node = self._next
            self._paths[node] = path
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + attributes

    def _entry_after(self, opened: bytes, path: Path) -> bytes:
        return self._entry(path) + opened

    def _forget(self, path: Path) -> None:
        self._paths = {node: known for node, known in self._paths.items() if known != path}


def _attributes(path: Path) -> bytes:
    found = path.lstat()
    times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
    whole, rest = zip(*(divmod(time, 10**9) for time in times), strict=True)
    owner = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid)
    size = (found.st_ino, found.st_size, found.st_blocks)
    return struct.pack("<6Q10I", *size, *whole, *rest, *owner, 0, 4096, 0)


def _mount(mount: Path) -> int:
    """Mount as Colab does, as "fuse.drive", and return the line to the kernel."""
    kernel = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={kernel},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"drive", bytes(mount), b"fuse.drive", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount", str(mount))
    return kernel


def main(cache: Path, mount: Path, cloud: Path) -> None:
    kernel = _mount(mount)
    drive = Drive(cache, cloud)
    print(json.dumps("mounted"), flush=True)
    while True:
        ready, _, _ = select.select([kernel, sys.stdin], [], [])
        if kernel in ready:
            try:
                request = os.read(kernel, 1 << 20)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # taken back
                    continue
                raise
            reply = drive.answer(request)
            if reply is not None:
                os.write(kernel, reply)
        elif sys.stdin in ready:
            word = sys.stdin.readline().strip()
            if not word:
                return
            print(json.dumps(drive.command(word)), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
