"""The states of a population in its stores: what is kept, what is let go, what can be gone on from.

Each slice that is over is a checkpoint of its own, and what a population goes on from is a set of them.
So a checkpoint's facts name the states that it leans on, its own among them::

    "round": 7, "member": 3, "needs": [[6, 1], [6, 4], [7, 0], [7, 3]]

and it can be gone on from if all of these are whole; where one is damaged, an older checkpoint whose
states all are is used, if there is one, and what came after it is trained again to the same bits.
What is needed is never removed; what is not goes, oldest first, before a store holds more than twice
the population. Within that not every state can be there twice: a mirror is the second place.

A part of a slice, saved because time was over, is a checkpoint with "partial": true. It is there until
the slice is over; where members train at the same time there may be several. A checkpoint without a
member holds no state, but the rows and the recipe.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from nbtrain import checkpoint
from nbtrain.budget import Budget
from nbtrain.checkpoint import Manifest, Snapshot
from nbtrain.errors import CheckpointError, NbtrainWarning
from nbtrain.population.table import Key
from nbtrain.saving import Saved, Saver
from nbtrain.stores import MANIFEST, Store


class Shelf(Saver):
    """Commits, copies and removes a population's states.

    Args:
        name: The population's.
        stores: The place to commit to; and, if there are two, the one to copy to.
        budget: Learns what a save and a copy cost.
        found: Checkpoints that are there already, newest first.
        newest: The one that is gone on from.
    """

    def __init__(
        self,
        name: str,
        stores: list[Store],
        budget: Budget,
        found: list[Manifest],
        newest: Manifest | None,
    ) -> None:
        super().__init__(name, stores, 2, budget, found, newest)
        self._lock = threading.Lock()
        # What is newer is damaged, or leans on what is; it is trained again, and goes.
        sound = [m for m in found if newest is None or m.number <= newest.number]
        self._held = {store.place: [m for m in sound if m.store is store] for store in stores}
        self._pinned: set[str] = set()  # ids of what a copy under way still reads
        self._unsaved: list[Snapshot] = []
        self._asked_at: dict[int, float] = {}
        self._cut = {s.place: self._names(s).keys() - checkpoint.ids(s, name) for s in stores}

    def request(self, snapshot: Snapshot) -> None:
        """Commit a snapshot soon; only a part of a slice may be replaced by a newer request.

        One that may not waits for the commit before it: a kill never costs two slices that were over.
        """
        self._asked_at[snapshot.number] = self._budget.working()
        is_part = snapshot.facts["partial"]
        if not is_part:
            self._commits.join()
        self._commits.submit(snapshot, needed=not is_part)

    def load(self, key: Key) -> Snapshot:
        """Read a state back, from the nearest place that has it.

        Raises:
            CheckpointError: no place has it whole.
        """
        self.wait(copies=False)
        problems = []
        with self._lock:
            found = [m for held in self._held.values() for m in held if _key(m) == key]
        for manifest in found:
            try:
                return checkpoint.load(manifest)
            except CheckpointError as error:
                problems.append(str(error))
        raise CheckpointError(
            f"The state of member {key[1]} after round {key[0]} cannot be read: "
            + ("; ".join(problems) or "it was not saved.")
        )

    def known(self) -> list[Saved]:
        """Return where the newest bytes are, and how many of the population there are in all."""
        with self._lock:
            num_bytes = {place: sum(m.num_bytes for m in held) for place, held in self._held.items()}
        return [replace(saved, num_bytes=num_bytes[saved.place]) for saved in super().known()]

    def manifests(self) -> list[Manifest]:
        """Return all checkpoints that are there, near and far."""
        with self._lock:
            return [manifest for held in self._held.values() for manifest in held]

    # ---- on the saving threads

    def _commit(self, snapshot: Snapshot) -> None:
        # One that could not be saved is wanted as long as the newest one leans on it.
        wanted = _needs(snapshot.facts)
        waiting = [s for s in self._unsaved if _key_of(s.facts) in wanted]
        self._unsaved = [*waiting, snapshot]
        self._clear(self._near)
        with self._lock:
            held = self._held[self._near.place]
            needed = [m for m in held if _key(m) in wanted] + _open_parts(held)
        self._bring(needed)  # first: a checkpoint that leans on what is elsewhere is none
        while self._unsaved:
            manifest = checkpoint.commit(self._near, self._session, self._unsaved[0])
            self._unsaved.pop(0)
            self._note(manifest)
        self._retain(self._near)
        if self._far is not None:
            self._copies.submit(manifest)
        # With the wait for the one before it: the last save of all may have to wait too.
        self._budget.observe("save", self._budget.working() - self._asked_at[snapshot.number])
        self._asked_at = {n: at for n, at in self._asked_at.items() if n > snapshot.number}

    def _copy(self, manifest: Manifest) -> None:
        """Make the far place one that this checkpoint can be gone on from."""
        assert self._far is not None
        far, began = self._far, self._budget.working()
        with self._lock:
            wanted = _needs(manifest.facts)
            there = {_key(m) for m in self._held[far.place]}
            near = [m for m in self._held[self._near.place] if _key(m) in wanted - there]
            ids = {m.id for m in self._held[far.place]}
            near += [m for m in _open_parts(self._held[self._near.place]) if m.id not in ids]
            if manifest not in self._held[self._near.place]:
                return  # a newer one has come meanwhile
            self._pinned = {m.id for m in [*near, manifest]}
        try:
            self._clear(far)
            for each in [*(m for m in reversed(near) if m.id != manifest.id), manifest]:
                self._note(checkpoint.copy(each, far))
        finally:
            with self._lock:
                self._pinned = set()
        self._retain(far)
        self._budget.observe("mirror", self._budget.working() - began)

    def _note(self, manifest: Manifest) -> None:
        super()._note(manifest)
        with self._lock:
            self._held[manifest.store.place].insert(0, manifest)

    def _retain(self, store: Store) -> None:
        """Remove what the newest checkpoint does not need, as far as there is no room for it."""
        with self._lock:
            held = self._held[store.place]
            newest, wanted = held[0], _needs(held[0].facts)
            everywhere = {_key(m) for some in self._held.values() for m in some}
            if not wanted <= everywhere:
                return  # a save has failed: an older one may be what can be gone on from
            open_parts = _open_parts(held)
            kept = [
                m
                for m in held
                if m is newest or _key(m) in wanted or m in open_parts or m.id in self._pinned
            ]
            spare = [m for m in held if m not in kept]
            total = sum(m.num_bytes for m in held)
            # Room for the next state, and for a part of one.
            limit = 2 * _size(held) - 2 * max(m.num_bytes for m in held)
            gone = [m for m in spare if m.facts["partial"]]
            total -= sum(m.num_bytes for m in gone)
            for manifest in reversed([m for m in spare if m not in gone]):
                if total <= limit:
                    break
                gone.append(manifest)
                total -= manifest.num_bytes
            self._held[store.place] = [m for m in held if m not in gone]
            self._good[store.place] = list(self._held[store.place])
            ids = {m.id for m in self._held[store.place]}
        self._remove(store, ids, newest.number)

    def _remove(self, store: Store, kept: set[str], newest: int) -> None:
        names = self._names(store)
        for id in names.keys() - kept:
            if self._is_ours(id) and checkpoint.number(id) < newest:
                checkpoint.remove(store, names[id])
            elif any(name.endswith("/" + MANIFEST) for name in names[id]):
                self._rivals.add(id)

    def _clear(self, store: Store) -> None:
        """Remove what commits left that were cut off: it would take the room of what comes."""
        cut = self._cut.pop(store.place, set())
        names = self._names(store) if cut else {}
        for id in cut & names.keys():
            if not any(name.endswith("/" + MANIFEST) for name in names[id]):
                checkpoint.remove(store, names[id])

    def _names(self, store: Store) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in store.list(self._session):
            if checkpoint.ID.fullmatch(id := name.split("/")[1]):
                names.setdefault(id, []).append(name)
        return names


def newest_whole(
    found: Iterable[Manifest], *, partly: bool = False
) -> tuple[Manifest, Snapshot, dict[Key, Snapshot]]:
    """Return the newest checkpoint that can be gone on from, with the states that it needs.

    Each that is damaged is named in a warning, once.

    Args:
        found: Checkpoints, newest first.
        partly: Take the newest whose rows can be read, with those of its states that can be.

    Raises:
        CheckpointError: there is none. Nothing is removed.
    """
    manifests = list(found)
    read: dict[tuple[str, str], Snapshot] = {}
    damaged: dict[tuple[str, str], str] = {}

    def load(manifest: Manifest) -> Snapshot | None:
        place = manifest.id, manifest.store.place
        if place not in read and place not in damaged:
            try:
                read[place] = checkpoint.load(manifest)
            except CheckpointError as error:
                damaged[place] = str(error)
        return read.get(place)

    for manifest in manifests:
        snapshot = load(manifest) or (_without_tensors(manifest) if partly else None)
        if snapshot is None:
            continue
        states: dict[Key, Snapshot] = {}
        for key in _needs(manifest.facts):
            same = (load(m) for m in manifests if _key(m) == key and m.number <= manifest.number)
            state = next((s for s in same if s is not None), None)
            if state is not None:
                states[key] = state
        if partly or states.keys() == _needs(manifest.facts):
            for (id, place), why in damaged.items():
                warnings.warn(
                    f"Checkpoint {id} of {manifest.session!r} in {place} is damaged and set aside: "
                    f"{why} If anything is left to train, it goes on from {manifest.id}.",
                    NbtrainWarning,
                    stacklevel=2,
                )
            return manifest, snapshot, states
    problems = "\n  ".join(damaged.values()) or "the states that each needs are not all there."
    raise CheckpointError(f"No checkpoint is whole:\n  {problems}\nNothing was removed.")


def _without_tensors(manifest: Manifest) -> Snapshot | None:
    try:
        state = checkpoint.state(manifest)
        recipe = checkpoint.read(manifest, checkpoint.RECIPE).decode()
    except (CheckpointError, ValueError):  # it is named already
        return None
    return Snapshot(manifest.number, {}, {}, state, recipe, dict(manifest.facts))


def parts(found: Iterable[Manifest], newest: Manifest, slices: Collection[Key]) -> dict[Key, Snapshot]:
    """Return of these slices what was saved of each before it was cut.

    Where that is damaged it is named in a warning, and the slice begins anew.
    """
    read: dict[Key, Snapshot] = {}
    for manifest in _open_parts([m for m in found if m.number <= newest.number]):
        key = manifest.facts["round"], manifest.facts["member"]
        if key in slices and key not in read:
            try:
                read[key] = checkpoint.load(manifest)
            except CheckpointError as error:
                warnings.warn(
                    f"The part of member {key[1]}'s slice is damaged and set aside: {error}",
                    NbtrainWarning,
                    stacklevel=2,
                )
    return read


def _open_parts(held: Iterable[Manifest]) -> list[Manifest]:
    """Return the newest part of each slice of which there is no end."""
    held = [m for m in held if m.facts["member"] is not None]  # newest first
    round = max((m.facts["round"] for m in held), default=0)
    over = {_key(m) for m in held}
    found: dict[Key, Manifest] = {}
    for m in held:
        key = m.facts["round"], m.facts["member"]
        if m.facts["partial"] and key[0] == round and key not in over:
            found.setdefault(key, m)
    return list(found.values())


def _key_of(facts: Any) -> Key | None:
    """Name the state of a slice's end that a checkpoint holds, if it holds one."""
    if facts["partial"] or facts["member"] is None:
        return None
    return facts["round"], facts["member"]


def _key(manifest: Manifest) -> Any:
    return _key_of(manifest.facts)


def _needs(facts: Any) -> set[Any]:
    return {tuple(key) for key in facts["needs"]}


def _size(held: list[Manifest]) -> int:
    """Return the bytes of a population: of each member's newest state."""
    newest: dict[int, int] = {}
    for manifest in held:  # newest first
        if (key := _key(manifest)) is not None:
            newest.setdefault(key[1], manifest.num_bytes)
    return sum(newest.values())
