"""Parameters that do not change from one checkpoint to the next: kept once, and referred to.

`requires_grad=False` alone is no promise: a teacher that follows by averaging has it too. So each save
compares the copies with those of the save before; what has moved is saved with the rest from then on.
What has not lies beside the checkpoints, under a name made from its bytes, and each manifest names it::

    cifar/frozen-9f31c25d01a2b3c4.safetensors
    cifar/frozen-9f31c25d01a2b3c4-copy.safetensors    one damaged file must not be the end of them all

It is written before the first manifest that refers to it, and removed after the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from nbtrain.errors import CheckpointError, NbtrainError
from nbtrain.stores import Store

NAME = re.compile(r"frozen-[0-9a-f]{16}\.safetensors")
COPY = re.compile(r"frozen-[0-9a-f]{16}-copy\.safetensors")
WINDOWS = 3  # that show whether what is frozen moves


class Still:
    """Tensors that stay what they are, and the file that they are kept in."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def data(self) -> bytes:
        """The file's bytes; made anew each time, since they are rarely needed."""
        return save_tensors(self.tensors)

    @cached_property
    def entry(self) -> dict[str, Any]:
        """Size and hash, as a manifest has them."""
        data = self.data
        return {"bytes": len(data), "sha256": sha256(data).hexdigest()}

    @property
    def name(self) -> str:
        """The file's name in the session's folder."""
        return f"frozen-{self.entry['sha256'][:16]}.safetensors"


class Watch:
    """Which frozen parameters move from window to window, as a teacher does.

    Many a recipe moves it through `.data`, which torch does not count. So at first all are copied, and
    compared, until none has begun to move for `WINDOWS` windows; after that torch's count has to do.
    What begins to move later is found after the first window that moved it, which cannot be taken
    back; if it is moved through `.data`, it stays unseen.

    Args:
        parameters: By name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._still, self._num_windows = dict(parameters), WINDOWS
        self._versions: dict[str, int] = {}
        self._copies: dict[str, Tensor] | None = None

    @property
    def copies(self) -> Mapping[str, Tensor]:
        """Those that may move yet, as they were when `look` was called."""
        return self._copies or {}

    def look(self) -> set[str]:
        """Return the names of those that have moved since the last call; they are watched no more."""
        still, copies = self._still, self._copies
        if copies is None:  # on the CPU, where they cost nothing
            self._copies = {name: p.detach().to("cpu", copy=True) for name, p in still.items()}
            return set()
        moved = {name for name in copies if not is_same(copies[name], still[name].detach().cpu())}
        self._num_windows = WINDOWS if moved else self._num_windows - 1
        moved |= {name for name, version in self._versions.items() if version != still[name]._version}
        for name in moved:
            del still[name]
        is_over = self._num_windows <= 0
        self._copies = {} if is_over else {name: copies[name] for name in still}
        self._versions = {name: p._version for name, p in still.items()} if is_over else {}
        return moved

    def go_back(self) -> None:
        """Know that the window was not done: what has not moved in it shows nothing."""
        self._num_windows += bool(self._copies)


class Frozen:
    """What of a model has stood still so far."""

    def __init__(self) -> None:
        self._still: Still | None = None
        self._moved: set[str] = set()

    def split(self, model: nn.Module, copies: dict[str, Tensor]) -> Still | None:
        """Take what stands still out of the copies of a model's tensors.

        Args:
            model: Says which of its parameters are frozen.
            copies: By name; what stands still is removed.
        """
        held = model.named_parameters(remove_duplicate=False)
        names = {name for name, p in held if not p.requires_grad and name in copies}
        before = self._still.tensors if self._still is not None else {}
        same = {name for name in names & before.keys() if is_same(before[name], copies[name])}
        self._moved |= (names & before.keys()) - same
        found = {name: copies.pop(name) for name in sorted(names - self._moved)}
        if found.keys() != before.keys() or found.keys() != same:
            self._still = Still(found) if found else None
        return self._still


def is_same(one: Tensor, other: Tensor) -> bool:
    """Compare bits, where 0.0 is not -0.0, and a NaN is what it was."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def places(session: str, name: str) -> tuple[str, str]:
    """Return the two places of a file in a store."""
    return f"{session}/{name}", f"{session}/{name.replace('.', '-copy.')}"


def keep(store: Store, session: str, name: str, data: Any, sure: set[tuple[str, str]]) -> None:
    """See that a file is whole in both its places.

    Args:
        store: Where.
        session: Its folder.
        name: The file's.
        data: Called for its bytes where they are needed.
        sure: Places that this process has seen to be whole; added to.

    Raises:
        StoreError: the store refused; nothing that was there is less.
    """
    present = set(store.list(session))
    for place in places(session, name):
        key = (store.place, place)
        if place in present and key not in sure and not _is_whole(store, place, name):
            store.delete(place)
            present.discard(place)
        if place not in present:
            store.write(place, data())
        sure.add(key)


def _is_whole(store: Store, place: str, name: str) -> bool:
    try:
        return sha256(store.read(place)).hexdigest().startswith(name.split("-")[1].split(".")[0])
    except NbtrainError:
        return False


def read(store: Store, session: str, name: str, entry: Mapping[str, Any]) -> bytes:
    """Return a file's bytes, verified, from the first of its two places that has them whole.

    Raises:
        CheckpointError: neither has.
    """
    problems = []
    for place in places(session, name):
        try:
            data = store.read(place)
        except NbtrainError as error:
            problems.append(f"{place} cannot be read: {error}")
            continue
        if sha256(data).hexdigest() == entry["sha256"]:
            return data
        problems.append(f"{place} has changed since it was written: its sha256 differs.")
    raise CheckpointError(" ".join(problems))


def sweep(store: Store, session: str, needed: Iterable[str]) -> None:
    """Remove the files that no manifest refers to."""
    kept = {place for name in needed for place in places(session, name)}
    for found in store.list(session):
        name = found.split("/")[-1]
        is_one = found.count("/") == 1 and (NAME.fullmatch(name) or COPY.fullmatch(name))
        if is_one and found not in kept:
            store.delete(found)
