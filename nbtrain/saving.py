"""Snapshots to checkpoints in the background: near first, then far.

The loop hands over a snapshot and goes on. One thread commits it on this machine, another copies what
is committed to the store, where that is a remote one. Each does one thing at a time, and a newer
request replaces one that waits; so a slow disk or a slow Drive costs checkpoints, never steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Generic, TypeVar

from nbtrain import checkpoint, judging
from nbtrain.budget import Budget
from nbtrain.checkpoint import Manifest, Snapshot
from nbtrain.errors import StoreError
from nbtrain.stores import KaggleStore, Store

T = TypeVar("T")


class Latest(Generic[T]):
    """Does one thing at a time on a thread of its own; a newer request replaces a waiting one.

    What the work raises is kept for who asks; `is_failing` says whether the last one raised.
    """

    def __init__(self, work: Callable[[T], None]) -> None:
        self._work = work
        self._waiting: list[tuple[T, bool]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.is_failing = False

    def submit(self, item: T, *, needed: bool = False) -> None:
        """Do this next, instead of what has been waiting; what is needed is waited for instead."""
        with self._changed:
            while self._waiting and self._waiting[0][1]:
                self._changed.wait()
            self._waiting = [(item, needed)]
            if self._thread is None:
                self._thread = threading.Thread(target=self._drain, daemon=True)
                self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do; False when the time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout_s)

    def failure(self) -> Exception | None:
        """Return what the work has raised since this was last asked, the newest of it."""
        found, self._failure = self._failure, None
        return found

    def _drain(self) -> None:
        while True:
            with self._changed:
                self._changed.notify_all()
                if not self._waiting:
                    self._thread = None
                    return
                item, _ = self._waiting.pop()
                self._changed.notify_all()
            try:
                self._work(item)
                self.is_failing = False
            except Exception as error:  # for `failure`: the thread has nobody to raise it to
                self._failure, self.is_failing = error, True
            # Before anybody hears that this is done: where the process ends next, a thread that
            # still has tensors to free aborts it.
            del item


@dataclass(frozen=True)
class Saved:
    """Where the newest bytes are."""

    step: int
    degree: str
    place: str
    num_bytes: int
    at: float
    number: int


def _saved(manifest: Manifest) -> Saved:
    facts, store = manifest.facts, manifest.store
    at = float(facts.get("at", 0.0))
    return Saved(int(facts["step"]), store.degree, store.place, manifest.num_bytes, at, manifest.number)


class Saver:
    """Commits a session's snapshots, copies and retains them, and knows where they are.

    Args:
        session: The session's name.
        stores: The place to commit to; and, if there are two, the one to copy to.
        keep: How many checkpoints to keep in each, at least 2.
        budget: Learns what a save and a copy cost.
        found: Checkpoints that are there already, newest first.
        newest: The first of them that is whole; those before it are damaged.
    """

    def __init__(
        self,
        session: str,
        stores: list[Store],
        keep: int,
        budget: Budget,
        found: list[Manifest],
        newest: Manifest | None = None,
    ) -> None:
        self._session = session
        self._near = stores[0]
        self._far = stores[1] if len(stores) > 1 else None
        self._keep = keep
        self._budget = budget
        self._numbers = self._opened_at = max((m.number for m in found), default=0)
        self._mine: set[str] = set()
        self._brought: set[str] = set()
        self._rivals: set[str] = set()
        self._has_told = False
        self._sure: set[tuple[str, str]] = set()
        rest = list(dropwhile(lambda m: m is not newest, found))
        here = {store.place: [m for m in rest if m.store is store] for store in stores}
        # A damaged one must not stand in for a good one: only what was read whole is counted.
        self._good = {place: [m for m in some if m is newest] for place, some in here.items()}
        self._best = {place: checkpoint.best_of(some) for place, some in here.items()}
        self._commits: Latest[Snapshot] = Latest(self._commit)
        self._copies: Latest[Manifest] = Latest(self._copy)
        self.saved: dict[str, Saved] = {}
        far = {m.id for m in found if m.store is self._far}
        is_behind = newest is not None and self._far is not None and newest.id not in far
        self._uncopied = newest if is_behind else None
        self._loaded = [] if newest is None or "at" not in newest.facts else [_saved(newest)]

    def next_number(self) -> int:
        """Return the number of the next commit."""
        self._numbers += 1
        return self._numbers

    def request(self, snapshot: Snapshot) -> None:
        """Commit a snapshot soon; one with a validation is not replaced by a newer one."""
        self._commits.submit(snapshot, needed=judging.score(snapshot.facts) is not None)

    def catch_up(self) -> bool:
        """Copy what was loaded to the store, where a kill came before its copy; say whether it did."""
        loaded, self._uncopied = self._uncopied, None
        if loaded is not None:
            self._copies.submit(loaded)
        return loaded is not None

    def wait(self, *, copies: bool = True, timeout_s: float | None = None) -> bool:
        """Wait for what was requested; False when the time ran out before the copy was done."""
        self._commits.join()
        return self._copies.join(timeout_s) if copies else True

    def failure(self) -> Exception | None:
        """Return why a commit or copy has failed since this was last asked, if one has."""
        return self._commits.failure() or self._copies.failure()

    @property
    def is_failing(self) -> bool:
        """Whether the last commit or the last copy failed."""
        return self._commits.is_failing or self._copies.is_failing

    def known(self) -> list[Saved]:
        """Return where the newest bytes are; before the first save, those that were loaded."""
        return list(self.saved.values()) or self._loaded

    @property
    def pending_bytes(self) -> int:
        """Bytes that are committed on this machine and not yet in the store."""
        if self._far is None:
            return 0
        if not self.saved and self._uncopied is not None:
            return self._uncopied.num_bytes
        near, far = (self.saved.get(store.place) for store in (self._near, self._far))
        # By number: a slow copy of an older one may have ended after the newest was committed.
        is_behind = near is not None and (far is None or far.number < near.number)
        return near.num_bytes if near is not None and is_behind else 0

    def rival(self) -> str | None:
        """Say, once, that another process has committed to this session since it was opened."""
        if not self._rivals or self._has_told:
            return None
        self._has_told = True
        return (
            f"Another process trains {self._session!r} too: it has saved {max(self._rivals)}. "
            "Nothing is overwritten, but only the newest of all is gone on with. Stop one of them."
        )

    def best(self) -> Manifest | None:
        """Return the checkpoint with the best score, from the nearest place that has it."""
        known = [m for place in self._good for m in self._known(place)]
        return checkpoint.best_of(reversed(known))  # of one number it takes the last

    def load_best(self, best: Manifest) -> Snapshot:
        """Read the best one, from the nearest place where it is whole.

        Raises:
            CheckpointError: it is so in none.
        """
        known = [m for place in self._good for m in self._known(place) if m.id == best.id]
        places = {m.store.place: m for m in known}
        return checkpoint.load_newest(places.values())[1]

    @property
    def is_behind(self) -> bool:
        """Whether what was loaded is on this machine alone."""
        return self._uncopied is not None

    def _known(self, place: str) -> list[Manifest]:
        return list(filter(None, (*self._good[place], self._best[place])))

    def _commit(self, snapshot: Snapshot) -> None:
        began = self._budget.working()
        manifest = checkpoint.commit(self._near, self._session, snapshot, self._sure)
        self._note(manifest)
        if self._far is not None:
            self._copies.submit(manifest)
        self._retain(self._near)
        best = checkpoint.best_of(self._known(self._near.place))
        self._bring([] if best is None else [best])
        self._budget.observe("save", self._budget.working() - began)

    def _copy(self, manifest: Manifest) -> None:
        assert self._far is not None
        began = self._budget.working()
        self._note(checkpoint.copy(manifest, self._far, self._sure))
        best = self.best()
        there = {m.id for m in self._known(self._far.place)}
        if best is not None and best.id not in there:
            self._good[self._far.place].append(checkpoint.copy(best, self._far, self._sure))
        self._retain(self._far)
        self._budget.observe("mirror", self._budget.working() - began)

    def _bring(self, manifests: Iterable[Manifest]) -> None:
        """See that these are in Kaggle's output too: the next notebook may have no other of its inputs.

        Raises:
            StoreError: it refused; the next save tries again.
            CheckpointError: one is damaged; that is told once.
        """
        if not isinstance(self._near, KaggleStore):
            return
        for manifest in manifests:
            if manifest.id in self._mine | self._brought:
                continue
            self._brought.add(manifest.id)
            try:
                checkpoint.copy(manifest, self._near.output, self._sure)
            except StoreError:
                self._brought.discard(manifest.id)
                raise

    def _note(self, manifest: Manifest) -> None:
        self._good[manifest.store.place].append(manifest)
        self._mine.add(manifest.id)
        if manifest.store is self._far:
            self._uncopied = None
        self.saved[manifest.store.place] = replace(_saved(manifest), at=time.time())

    def _retain(self, store: Store) -> None:
        good, best = self._good[store.place], checkpoint.best_of(self._known(store.place))
        self._good[store.place] = checkpoint.retain(
            store, self._session, good, self._keep, best, self._is_ours
        )
        committed = checkpoint.ids(store, self._session)
        self._rivals |= {id for id in committed if not self._is_ours(id)}

    def _is_ours(self, id: str) -> bool:
        return id in self._mine or checkpoint.number(id) <= self._opened_at
