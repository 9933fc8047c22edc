"""What the user wrote, and the notebook it was written in -> a store. Opening writes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from pathlib import Path
from typing import Protocol

from ..errors import StoreError
from .contract import Store
from .drive import DriveStore, drive_top
from .folder import FolderStore
from .kaggle import KaggleStore
from .remote import FsspecStore


class HostPlaces(Protocol):
    """What is asked of a host here."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> Path: ...
    @property
    def inputs(self) -> tuple[Path, ...]: ...
    @property
    def drive_mounted(self) -> bool: ...


def find_store(store: Store | str | os.PathLike[str] | None, host: HostPlaces) -> Store:
    """Open the place that was asked for, or the best that this host has.

    Args:
        store: A store, a folder, a URL with "://", or None: Kaggle's output, Drive, this disk.
        host: The facts of this notebook.

    Raises:
        ValueError: the argument is none of these.
        StoreError: Drive is not mounted and nobody is there to say yes; nothing was written.
    """
    if isinstance(store, str) and "://" in store:
        return FsspecStore(store)
    if store is None:
        return _open_folder(host.output, host)
    if isinstance(store, (str, os.PathLike)) and os.fspath(store):
        return _open_folder(Path(os.path.abspath(os.path.expanduser(store))), host)
    if isinstance(store, Store):
        return store
    raise ValueError(f"store is a folder, a URL such as 's3://bucket/run', or None; not {store!r}.")


def _open_folder(path: Path, host: HostPlaces) -> Store:
    if _is_on_drive(path):
        if host.name == "colab" and not host.drive_mounted:
            _mount_drive()
        return DriveStore(path)
    if host.name == "kaggle" and path.is_relative_to(host.output.parent):
        return KaggleStore(path, host.inputs)
    if path.is_relative_to(_KAGGLE_OUTPUT):
        return KaggleStore(path, host.inputs)
    # Any other disk of a rented machine goes with the machine.
    return FolderStore(path, degree="durable" if host.name == "local" else "local")


def _is_on_drive(path: Path) -> bool:
    real = Path(os.path.realpath(path))
    return any(drive_top(way) or way.is_relative_to(_DRIVE) for way in (path, real))


def _mount_drive() -> None:
    """Ask for the Drive as the user's own cell would; this writes nothing."""
    if not _somebody_can_answer():
        raise StoreError(
            "Google Drive is not mounted, and only you can allow it. Nothing was written.\n"
            "Run this line in a cell, then this cell again (or choose store=...):\n"
            f"  {_MOUNT}"
        )
    try:
        importlib.import_module("google.colab.drive").mount(str(_DRIVE))
    except Exception as error:
        # Colab's own errors are ValueErrors, and what the browser answers can be anything.
        raise StoreError(
            f"Google Drive could not be mounted: {error}. Nothing was written.\n"
            f"Run this line in a cell to see why (or choose store=...):\n  {_MOUNT}"
        ) from error


def _somebody_can_answer() -> bool:
    """Tell whether a browser can be asked: a kernel's main thread, on a Colab that has Drive."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return (
        getattr(shell, "kernel", None) is not None
        # Colab's request to the browser is not thread-safe.
        and threading.current_thread() is threading.main_thread()
        # Colab Enterprise and local runtimes have no such file, and no Drive.
        and _COLAB_HOSTNAME.exists()
        and _has_colab()
    )


def _has_colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        return False


_DRIVE = Path("/content/drive")
_MOUNT = f'from google.colab import drive; drive.mount("{_DRIVE}")'
_KAGGLE_OUTPUT = Path("/kaggle/working")
_COLAB_HOSTNAME = Path("/var/colab/hostname")
