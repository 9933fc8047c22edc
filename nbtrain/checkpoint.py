"""Parts to store and back: payload first, manifest last, every byte hashed.

A checkpoint is a folder in a session's folder::

    cifar/000004-9f31c2/
        model.safetensors     the model's state_dict, a tied weight under its first name
        parts.safetensors     tensors of the optimizer, the EMA, the history, and the user's parts
        state.json            the trees those tensors hang on, and the session's own counters
        recipe.py             the source that `build` needs
        manifest.json         sizes and hashes of the above, and of itself: written last

Parameters that stand still lie beside it, once for all (see `frozen`): state_dict is the two together.

It exists if and only if its manifest does. Numbers count commits, and the newest commit is the one to
go on from, whatever its step. Loading verifies every hash, runs no code, and falls back to the commit
before where something is damaged. Retention removes a manifest first and its payload after.
"""

from __future__ import annotations

import json
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from nbtrain import frozen, judging
from nbtrain.errors import CheckpointError, NbtrainError, NbtrainWarning
from nbtrain.frozen import Still
from nbtrain.stores import MANIFEST, Store

FORMAT, WITH_FROZEN = 1, 2  # without and with a file that lies beside the checkpoint
MODEL, PARTS, STATE, RECIPE = "model.safetensors", "parts.safetensors", "state.json", "recipe.py"
ID = re.compile(r"\d{6,}-[0-9a-f]{6}")
_WAY_OUT = "Nothing was removed. Bring an intact copy of the folder, or use another session name."


@dataclass(frozen=True)
class Manifest:
    """The receipt that makes a checkpoint exist."""

    session: str
    id: str
    facts: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    store: Store = field(repr=False, compare=False)

    @property
    def number(self) -> int:
        """How many commits the session had made with this one."""
        return number(self.id)

    @property
    def num_bytes(self) -> int:
        """Size of the payload in bytes, without what it shares with other checkpoints."""
        return sum(self.files[name]["bytes"] for name in self.files if name != self.shared)

    @property
    def shared(self) -> str | None:
        """The file that it shares with other checkpoints, if there is one."""
        return next(filter(frozen.NAME.fullmatch, self.files), None)

    def path(self, file: str) -> str:
        """Return a file's name in the store."""
        if file == self.shared:
            return f"{self.session}/{file}"
        return f"{self.session}/{self.id}/{file}"


@dataclass
class Snapshot:
    """A session as it was between two steps: nothing in it changes any more."""

    number: int
    model: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    recipe: str
    facts: dict[str, Any]
    still: Still | None = None  # what of the model is kept once


def commit(
    store: Store, session: str, snapshot: Snapshot, sure: set[tuple[str, str]] | None = None
) -> Manifest:
    """Write a snapshot as the session's next checkpoint; it exists when this returns.

    Args:
        store: Where.
        session: The name.
        snapshot: What.
        sure: Shared files that this process has seen to be whole; None looks again.

    Raises:
        StoreError: the store refused; the checkpoints before it are intact.
    """
    payload = {
        MODEL: save_tensors(snapshot.model),
        PARTS: save_tensors(snapshot.tensors),
        STATE: _json(snapshot.state),
        RECIPE: snapshot.recipe.encode(),
    }
    files = {
        name: {"bytes": len(data), "sha256": sha256(data).hexdigest()} for name, data in payload.items()
    }
    still = snapshot.still
    if still is not None:
        files[still.name] = still.entry
    id = f"{snapshot.number:06d}-{secrets.token_hex(3)}"
    manifest = Manifest(session, id, snapshot.facts, files, store)
    receipt = _manifest_bytes(manifest)
    try:
        if still is not None:
            frozen.keep(store, session, still.name, lambda: still.data, set() if sure is None else sure)
        for name, data in payload.items():
            store.write(manifest.path(name), data)
        store.write(manifest.path(MANIFEST), receipt)
    except NbtrainError:
        # On a full disk the half of a checkpoint would leave no room for the next whole one.
        with suppress(NbtrainError):  # what is told is why the write failed
            for name in (MANIFEST, *payload):
                store.delete(manifest.path(name))
        raise
    return manifest


def copy(manifest: Manifest, store: Store, sure: set[tuple[str, str]] | None = None) -> Manifest:
    """Copy a committed checkpoint to another store, its manifest last.

    Raises:
        CheckpointError: a file of it has been damaged meanwhile; nothing was written.
        StoreError: a store refused; what was committed there before is intact.
    """
    there = Manifest(manifest.session, manifest.id, manifest.facts, manifest.files, store)
    shared, receipt = manifest.shared, there.path(MANIFEST)
    present = set(store.list(f"{manifest.session}/{manifest.id}"))
    is_torn = receipt in present and _read_manifest(store, receipt, told=True) is None
    if is_torn or receipt not in present:
        # All is read before the slow writing begins: meanwhile retention may remove it over there.
        payload = {name: read(manifest, name) for name in manifest.files if name != shared}
        if shared is not None:
            sure = set() if sure is None else sure
            frozen.keep(store, manifest.session, shared, lambda: read(manifest, shared), sure)
        remove(store, present if is_torn else ())  # a kill has cut the receipt off
        for name, data in payload.items():
            store.write(there.path(name), data)
        store.write(receipt, _manifest_bytes(manifest))
    return there


def find(stores: Iterable[Store], session: str) -> list[Manifest]:
    """Return a session's checkpoints in all places, newest commit first, nearest place first.

    A manifest that cannot be read is no checkpoint: it is named in a warning and passed over. Where
    the very first commit was cut off there is no session yet; where a later one was, there is one.

    Raises:
        CheckpointError: one was written by a newer nbtrain; or there have been several, and no
            manifest of them is whole. Nothing is removed.
    """
    found = []
    ids: set[str] = set()
    for rank, store in enumerate(stores):
        for name in store.list(session):
            ids.update(filter(ID.fullmatch, name.split("/")[1:2]))
            if name.endswith("/" + MANIFEST):
                manifest = _read_manifest(store, name)
                if manifest is not None and manifest.session == session:
                    # A later stage was opened knowingly, however many commits an earlier one made.
                    stage = manifest.facts.get("stage", 0)
                    found.append((-stage, -manifest.number, rank, manifest.id, manifest))
    if not found and any(number(id) > 1 for id in ids):
        raise CheckpointError(
            f"No manifest of session {session!r} is whole, but there is {', '.join(sorted(ids))}.\n"
            f"{_WAY_OUT}"
        )
    return [manifest for *_, manifest in sorted(found, key=lambda entry: entry[:4])]


def sessions(stores: Iterable[Store]) -> list[str]:
    """Return the names of all sessions that have a checkpoint in one of the stores."""
    names = {n.split("/")[0] for s in stores for n in s.list() if n.endswith("/" + MANIFEST)}
    return sorted(names)


def read(manifest: Manifest, file: str) -> bytes:
    """Return a file of a checkpoint, verified.

    Raises:
        CheckpointError: it is missing, or not what the manifest says; names the file.
    """
    name = manifest.path(file)
    try:
        entry = manifest.files[file]
        if file == manifest.shared:
            return frozen.read(manifest.store, manifest.session, file, entry)
        data = manifest.store.read(name)
    except KeyError as error:
        raise CheckpointError(f"{name} is not in the manifest.") from error
    except NbtrainError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error
    if len(data) != entry["bytes"]:
        raise CheckpointError(f"{name} has {len(data)} bytes of {entry['bytes']}.")
    if sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{name} has changed since it was written: its sha256 differs.")
    return data


def state(manifest: Manifest) -> dict[str, Any]:
    """Return a checkpoint's counters and settings, verified."""
    return _parse(read(manifest, STATE))


def recipe(manifest: Manifest) -> str:
    """Return the source kept with a checkpoint, verified."""
    return read(manifest, RECIPE).decode()


def load(manifest: Manifest) -> Snapshot:
    """Read a checkpoint whole, verified; nothing that is alive is touched.

    Raises:
        CheckpointError: a file is missing, damaged or foreign; names it.
    """
    files = {name: read(manifest, name) for name in manifest.files}
    still = {} if manifest.shared is None else load_tensors(files[manifest.shared])
    try:
        return Snapshot(
            number=manifest.number,
            model=load_tensors(files[MODEL]) | still,
            tensors=load_tensors(files[PARTS]),
            state=_parse(files[STATE]),
            recipe=files[RECIPE].decode(),
            facts=dict(manifest.facts),
        )
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{manifest.id} is not a checkpoint of nbtrain: {error}") from error


def load_newest(manifests: Iterable[Manifest]) -> tuple[Manifest, Snapshot]:
    """Read the first checkpoint of these that is whole; name each damaged one in a warning.

    Raises:
        CheckpointError: none is whole. Nothing is removed.
    """
    damaged: list[tuple[Manifest, CheckpointError]] = []
    for manifest in manifests:
        try:
            snapshot = load(manifest)
        except CheckpointError as error:
            damaged.append((manifest, error))
            continue
        for other, why in damaged:
            warnings.warn(
                f"Checkpoint {other.id} of {other.session!r} in {other.store.place} is damaged and "
                f"set aside: {why} Instead {manifest.id} is used.",
                NbtrainWarning,
                stacklevel=2,
            )
        return manifest, snapshot
    problems = "\n  ".join(str(error) for _, error in damaged)
    raise CheckpointError(f"No checkpoint is whole:\n  {problems}\n{_WAY_OUT}")


def retain(
    store: Store,
    session: str,
    good: list[Manifest],
    keep: int,
    best: Manifest | None = None,
    is_ours: Callable[[str], bool] = lambda id: True,
) -> list[Manifest]:
    """Keep the newest of the good checkpoints, and the best one; remove what is older.

    Args:
        good: Checkpoints in this store that were verified or written by this process.
        keep: How many, at least 2, so that one damaged file never is the last.
        best: Kept besides, and not counted: nobody has verified it.
        is_ours: Whether an id may be removed; another process's may not.

    Returns:
        Those of the good ones that remain, newest first.
    """
    ordered = sorted(good, key=lambda m: m.number, reverse=True)
    if len(ordered) < 2:
        return ordered
    newest = ordered[:keep]
    kept = {m.id for m in (*newest, best) if m is not None}
    oldest = newest[-1].number
    older: dict[str, list[str]] = {}
    for name in store.list(session):
        id = name.split("/")[1]
        if id not in kept and ID.fullmatch(id) and number(id) < oldest and is_ours(id):
            older.setdefault(id, []).append(name)
    for names in older.values():
        remove(store, names)
    if older:
        _sweep(store, session)
    return [m for m in ordered if m.id in kept]


def _sweep(store: Store, session: str) -> None:
    """Remove the shared files that no manifest refers to; where one cannot be read, none."""
    names = store.list(session)
    if not any(frozen.NAME.fullmatch(name.split("/")[-1]) for name in names):
        return
    with suppress(CheckpointError):  # one is a newer nbtrain's
        found = [_read_manifest(store, n, told=True) for n in names if n.endswith("/" + MANIFEST)]
        if all(manifest is not None for manifest in found):
            frozen.sweep(store, session, [m.shared for m in found if m is not None and m.shared])


def remove(store: Store, names: Iterable[str]) -> None:
    """Remove the files of a checkpoint, the manifest first: without it the rest is none."""
    for name in sorted(names, key=lambda n: not n.endswith("/" + MANIFEST)):
        store.delete(name)


def best_of(manifests: Iterable[Manifest]) -> Manifest | None:
    """Return the checkpoint with the best score, the earliest of equals, if any."""
    by_place = {(m.facts.get("stage", 0), m.number): m for m in manifests}
    by_number = {place[1]: by_place[place] for place in judging.gone_on_with(by_place)}
    best = judging.best({number: manifest.facts for number, manifest in by_number.items()})
    return None if best is None else by_number[best]


def ids(store: Store, session: str) -> set[str]:
    """Return the ids of a session's manifests in a store, unread."""
    found = {n.split("/")[1] for n in store.list(session) if n.endswith("/" + MANIFEST)}
    return {id for id in found if ID.fullmatch(id)}


def number(id: str) -> int:
    """Return how many commits the session had made with the one of this id."""
    return int(id.split("-")[0])


def _manifest_bytes(manifest: Manifest) -> bytes:
    body = {
        "format": f"nbtrain/{WITH_FROZEN if manifest.shared else FORMAT}",
        "session": manifest.session,
        "id": manifest.id,
        "facts": dict(manifest.facts),
        "files": {name: dict(entry) for name, entry in manifest.files.items()},
    }
    return _json(body | {"sha256": sha256(_json(body)).hexdigest()})


def _read_manifest(store: Store, name: str, *, told: bool = False) -> Manifest | None:
    try:
        body = _parse(store.read(name))
        own_hash = body.pop("sha256")
        version = int(body["format"].removeprefix("nbtrain/"))
        intact = sha256(_json(body)).hexdigest() == own_hash
        manifest = Manifest(body["session"], body["id"], body["facts"], body["files"], store)
        belongs = name == manifest.path(MANIFEST) and ID.fullmatch(manifest.id) is not None
        is_complete = set(manifest.files) - {manifest.shared} == {MODEL, PARTS, STATE, RECIPE}
    except (NbtrainError, KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
    else:
        why = "its own sha256 differs" if not intact else "it is another checkpoint's"
        if intact and belongs and version > WITH_FROZEN:
            raise CheckpointError(
                f"{name} was written by a newer nbtrain.\n"
                f"  in checkpoint: format {version}\n  in session:    format {WITH_FROZEN}\n"
                "Install it: pip install -U nbtrain"
            )
        if intact and belongs and is_complete:
            return manifest
    if not told:
        warnings.warn(
            f"{name} in {store.place} cannot be read and is set aside: {why}.",
            NbtrainWarning,
            stacklevel=3,
        )
    return None


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def _parse(data: bytes) -> dict[str, Any]:
    value = json.loads(data, parse_constant=_refuse_constant)
    if not isinstance(value, dict):
        raise CheckpointError("a JSON object was expected")
    return value


def _refuse_constant(name: str) -> Iterator[None]:
    raise CheckpointError(f"{name} is not strict JSON")
