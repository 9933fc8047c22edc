"""Where bytes survive: the Store protocol and one short class a place.

A package, because six places outgrow one file; each place is read on its own::

    contract.py   the Store protocol, names, and how an OSError becomes a StoreError
    folder.py     FolderStore   a folder on this machine: temp file, fsync, rename
    drive.py      DriveStore    a Google Drive mount: final names at once, nothing renamed
    kaggle.py     KaggleStore   Kaggle's output folder, and every attached input
    memory.py     MemoryStore   a dict, the reference for tests
    remote.py     FsspecStore   any fsspec URL
    find.py       find_store    what the user wrote, and the host -> a store

The invariant: a name is written once and whole; what was committed is never touched by a later
write. On every place the picture is the same::

    <root>/cifar/000004-ab12cd/model.safetensors
                               manifest.json        <- written last: with it the checkpoint exists
"""

from .contract import MANIFEST, Store
from .drive import DriveStore
from .find import find_store
from .folder import FolderStore
from .kaggle import KaggleStore
from .memory import MemoryStore
from .remote import FsspecStore

__all__ = [
    "MANIFEST",
    "DriveStore",
    "FolderStore",
    "FsspecStore",
    "KaggleStore",
    "MemoryStore",
    "Store",
    "find_store",
]
