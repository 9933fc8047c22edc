"""Anything fsspec can reach by a URL: s3://, gs://, hf://, sftp://, file://, memory://.

The invariant: a finished write in an object store is durable, because the service has acknowledged
the whole object; of any other protocol that is unknown, and the degree says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import StoreError
from .contract import Data, Names, already_there, is_below, refused, split_name, split_prefix


class FsspecStore:
    """Files below a URL.

    Args:
        url: For example "s3://bucket/nbtrain"; keys come from the environment, as fsspec has it.

    Raises:
        ValueError: no such protocol.
        StoreError: the package for this protocol is missing; nothing was touched.
    """

    degree: str
    is_remote: bool = True

    def __init__(self, url: str) -> None:
        # Errors and panels show the place, so it must not carry a password or a signed query.
        self.place = re.sub(r"//[^/@]*@", "//", url).partition("?")[0]
        protocol = url.partition("://")[0].partition("::")[0]
        self._has_folders = protocol not in _OBJECT_STORES
        self.degree = "unknown" if self._has_folders else "durable"
        self._fs, root = _open(url, protocol, self.place)
        self._root = root.rstrip("/")

    def __repr__(self) -> str:
        return f"FsspecStore({self.place!r})"

    def list(self, prefix: str = "") -> Names:
        parts = split_prefix(prefix)
        with self._answering(f"Listing {prefix or 'everything'}"):
            # A cached listing would hide what another notebook has written.
            self._fs.invalidate_cache()
            found: list[str] = []
            with suppress(FileNotFoundError):
                found = self._fs.find("/".join((self._root, *parts)))
            names = (path.removeprefix(self._root).lstrip("/") for path in found)
            return sorted(name for name in names if is_below(name, prefix) and _is_name(name))

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with self._answering(f"Reading {name}"):
            return bytes(self._fs.cat_file(path))

    def write(self, name: str, data: Data) -> None:
        path = self._path(name)
        with self._answering(f"Writing {name}"):
            self._fs.invalidate_cache()
            if self._fs.exists(path):
                size_bytes = int(self._fs.size(path))
                if already_there(name, self.place, data, size_bytes, lambda: self.read(name)):
                    return
            if self._has_folders:
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, bytes(data))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with self._answering(f"Deleting {name}"):
            with suppress(FileNotFoundError):
                self._fs.rm_file(path)
            for _ in range(name.count("/") if self._has_folders else 0):
                path = path.rpartition("/")[0]
                self._fs.invalidate_cache()
                if self._fs.isdir(path):
                    if self._fs.ls(path, detail=False):
                        break
                    self._fs.rmdir(path)

    def _path(self, name: str) -> str:
        return "/".join((self._root, *split_name(name)))

    @contextmanager
    def _answering(self, doing: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            # Each protocol raises errors of its own: botocore's, aiohttp's, paramiko's.
            raise refused(doing, self.place, error) from error


_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "hf", "abfs", "abfss", "az")
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "webdav": "webdav4",
    "dropbox": "dropboxdrivefs",
}


def _open(url: str, protocol: str, place: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "the package that the line above names")
        raise StoreError(
            f"{protocol}:// cannot be reached: {error}.\nNothing was touched.\n"
            f"Install it and run the cell again:\n  %pip install {package}"
        ) from error
    except ValueError:
        raise  # a bad argument, such as a protocol that does not exist
    except Exception as error:
        raise refused(f"Opening {protocol}://", place, error) from error
    return fs, str(root)


def _is_name(name: str) -> bool:
    try:
        split_name(name)
    except ValueError:
        return False
    return True
