"""Kaggle: the output folder of this run, and what earlier runs left in the attached inputs.

The invariant: a checkpoint is served from one copy, never mixed from two, and from a whole copy if
there is any. A copy is known by its manifest alone, because two layouts of the inputs live side by
side, copies keep no times, and people unpack into any folder::

    /kaggle/working/nbtrain/cifar/000005-ab12cd/...                      written here
    /kaggle/input/<slug>/nbtrain/cifar/000004-ab12cd/...                 read, old layout
    /kaggle/input/notebooks/<owner>/<slug>/nbtrain/cifar/000004-ab12cd/  read, new layout

What several checkpoints share lies beside them, and is read from there. It is not listed: the next
checkpoint gets it into the output too, which is all that the next notebook may have.

Kaggle keeps the output only when the version is saved, so the degree is "local".
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import NbtrainWarning
from .contract import MANIFEST, Names, explained, is_below, is_part, split_name
from .folder import FolderStore, read_file


class KaggleStore(FolderStore):
    """Files in the output folder, and every checkpoint found below the inputs.

    The inputs are searched once, at the first use. They are read only: a checkpoint that lives only
    there cannot be deleted, and deleting it is no error.
    """

    degree = "local"

    def __init__(
        self,
        output: str | os.PathLike[str],
        inputs: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        super().__init__(output, degree="local")
        self.inputs = tuple(Path(root) for root in inputs)
        self.place = f"Kaggle's output folder ({self.root})"

    @cached_property
    def output(self) -> FolderStore:
        """The output alone: all that the next notebook has, if nothing else is attached to it."""
        return FolderStore(self.root, degree="local")

    def list(self, prefix: str = "") -> Names:
        names = {name for name in super().list(prefix) if self._copy_of(name) is None}
        with explained(f"Listing {prefix or 'everything'}", "Kaggle's inputs"):
            for key, copy in self._copies.items():
                inner = (f"{key}/{file}" for file in _files(copy.folder))
                names |= {name for name in inner if is_below(name, prefix) and self._copy_of(name)}
        return sorted(names)

    def read(self, name: str) -> bytes:
        copy = self._copy_of(name)
        if copy is None:
            beside = self._beside(name)
            if beside is None:
                return super().read(name)
            with explained(f"Reading {name}", f"Kaggle's input ({beside.parent})"):
                return read_file(beside)
        file = split_name(name)[-1]
        with explained(f"Reading {name}", f"Kaggle's input ({copy.folder})"):
            return read_file(copy.folder / file)

    def _copy_of(self, name: str) -> _Copy | None:
        """Return the input copy that serves a name, None where the output does."""
        key = name.rpartition("/")[0]
        copy = self._copies.get(key)
        if copy is None:
            return None
        mine = _read_manifest(self.root / key)
        if mine is not None and (_is_whole(self.root / key, mine) or not copy.is_whole):
            return None
        return copy

    def _beside(self, name: str) -> Path | None:
        """Return where a file that checkpoints share lies in an input; None where the output has it."""
        session, _, file = name.rpartition("/")
        if not _SHARED.fullmatch(file) or os.path.lexists(self.root / name):
            return None
        mine = [copy for key, copy in self._copies.items() if key.rpartition("/")[0] == session]
        for copy in sorted(mine, key=lambda copy: not copy.is_whole):
            if os.path.isfile(path := copy.folder.parent / file):
                return path
        return None

    @cached_property
    def _copies(self) -> dict[str, _Copy]:
        """The best copy of each checkpoint in the inputs, by "<session>/<id>"."""
        found: dict[str, _Copy] = {}
        for folder in (folder for root in self.inputs for folder in _folders(root, _MAX_DEPTH)):
            manifest = _read_manifest(folder)
            if manifest is None:
                continue
            session, id_ = manifest.get("session"), manifest.get("id")
            if not (_is_name(session) and _is_name(id_)):
                warnings.warn(
                    f"{folder / MANIFEST} names no session and id that could be: it is left out.",
                    NbtrainWarning,
                    stacklevel=3,
                )
                continue
            key = f"{session}/{id_}"
            copy = _Copy(folder, _is_whole(folder, manifest))
            if key not in found or (copy.is_whole and not found[key].is_whole):
                found[key] = copy
        return found


class _Copy(NamedTuple):
    folder: Path
    is_whole: bool


_SHARED = re.compile(r"frozen-[0-9a-f]{16}(-copy)?\.safetensors")
_MAX_DEPTH = 8
_MAX_ENTRIES = 1000  # a folder of images: nobody's checkpoints lie in or below it
_MAX_MANIFEST_BYTES = 1 << 24


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Walk to the folders that hold a manifest, in an order that depends on names alone."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(islice(scan, _MAX_ENTRIES + 1), key=lambda entry: entry.name)
    except FileNotFoundError:
        return  # nothing is attached
    except OSError as error:
        warnings.warn(f"{folder} is not searched: {error}", NbtrainWarning, stacklevel=4)
        return
    if len(entries) > _MAX_ENTRIES:
        return
    if any(entry.name == MANIFEST and entry.is_file(follow_symlinks=False) for entry in entries):
        yield folder
    if depth:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _folders(folder / entry.name, depth - 1)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of one of our checkpoints, None for anything else of that name."""
    path = folder / MANIFEST
    try:
        if os.lstat(path).st_size > _MAX_MANIFEST_BYTES:
            return None
        manifest = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        # Many data sets have a manifest.json of their own: what does not read as ours is not ours.
        return None
    if isinstance(manifest, dict) and str(manifest.get("format", "")).startswith("nbtrain"):
        return manifest
    return None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and is_part(value)


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Tell whether every file has the size that the manifest gives it."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_name(file) for file in files):
        return False
    there = _files(folder)
    if any(_SHARED.fullmatch(file) for file in files):  # either of its two places will do
        beside = _files(folder.parent)
        first = {name.replace("-copy.", "."): size for name, size in beside.items()}
        there |= {name: size for name, size in (first | beside).items() if _SHARED.fullmatch(name)}
    return all(
        isinstance(entry, dict) and there.get(file) == entry.get("bytes")
        for file, entry in files.items()
    )


def _files(folder: Path) -> dict[str, int]:
    """Return the size of each file of a checkpoint, as far as it has a name that may be."""
    sizes: dict[str, int] = {}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if is_part(entry.name) and entry.is_file(follow_symlinks=False):
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    return sizes
