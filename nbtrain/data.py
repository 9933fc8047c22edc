"""The samples of a run in their order, from any position on.

Order and augmentation are functions of a place, not of a history: which sample comes at a position
depends on (seed, epoch), and what a random augmentation does to it on (seed, epoch, position). The
whole state of the loader is therefore two integers, the number of workers and what they have
prefetched change nothing, and going on from the middle of an epoch reads no sample that is skipped.

Randomness that a data set keeps for itself, a `numpy.random.Generator` made in its `__init__` for
example, is out of reach: use `sample_rng()`, or torch's, numpy's, python's module-level functions.

A `Walk` is the batch sampler given to torch's DataLoader: it never ends at an epoch's end, so the
workers, forked once because a notebook's classes cannot be pickled, fetch across it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data._utils import signal_handling

from nbtrain import randomness
from nbtrain.errors import DataError

DEATH_CHECK_S = 0.2
MAX_WORKERS = 4  # what a free notebook has of cores; more is for the user to ask


@dataclass
class Source:
    """A data set and how it is to be read; None leaves a choice to the session."""

    dataset: Any
    sampler: Any = None
    shuffle: bool = True
    batch_size: int | None = None
    drop_last: bool = False
    collate: Callable[[list[Any]], Any] = default_collate
    num_workers: int | None = None
    pin_memory: bool | None = None
    prefetch_factor: int | None = None
    worker_init: Callable[[int], None] | None = None


def source(data: Any, name: str, *, shuffle: bool, collate: Callable[..., Any] | None) -> Source:
    """Take over a map-style data set, or everything that a DataLoader says about one.

    Args:
        data: A data set with `__len__` and `__getitem__`, or a DataLoader over one.
        name: "train" or "valid", for messages.
        shuffle: Whether to shuffle where the data does not say.
        collate: Used instead of the DataLoader's or torch's own.

    Raises:
        DataError: it is iterable-style, has its own batch sampler, has no length, or is empty.
    """
    found = Source(data, shuffle=shuffle)
    if isinstance(data, DataLoader):
        if data.batch_sampler is None:
            raise DataError(
                f"{name}: the DataLoader has batch_size=None, so it makes no batches to count. "
                "Give the data set itself, or a DataLoader with a batch_size."
            )
        if type(data.batch_sampler) is not BatchSampler:
            raise DataError(
                f"{name}: the DataLoader has a batch sampler of its own "
                f"({type(data.batch_sampler).__name__}), whose place cannot be resumed. "
                "Give batch_size and, if needed, sampler instead."
            )
        found = Source(
            data.dataset,
            batch_size=data.batch_size,
            drop_last=data.drop_last,
            collate=data.collate_fn,
            num_workers=data.num_workers,
            pin_memory=data.pin_memory,
            prefetch_factor=data.prefetch_factor,
            worker_init=data.worker_init_fn,
        )
        found.shuffle = not isinstance(data.sampler, SequentialSampler)
        if found.shuffle and not _plain_shuffle(data.sampler, data.dataset):
            found.sampler = data.sampler
    if collate is not None:
        found.collate = collate
    _require_map_style(found.dataset, name)
    return found


def _plain_shuffle(sampler: Any, dataset: Any) -> bool:
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(dataset)
    )


def _require_map_style(dataset: Any, name: str) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name}: a {type(dataset).__name__} has no positions to resume from. "
            "Give a map-style data set, with __len__ and __getitem__."
        )
    if not isinstance(dataset, Sized):
        raise DataError(f"{name}: a {type(dataset).__name__} has no length. Give it a __len__.")
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set is empty. Check the path it was read from.")


def default_workers(dataset: Any) -> int:
    """Return how many workers suit this machine: none for tensors in memory or without fork."""
    if isinstance(dataset, TensorDataset) or "fork" not in multiprocessing.get_all_start_methods():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_WORKERS)


class Order:
    """Which sample comes at which position of an epoch, as a function of (seed, epoch)."""

    def __init__(self, source: Source, seed: int) -> None:
        self._source = source
        self._seed = seed
        self._made: dict[int, Sequence[int] | torch.Tensor] = {}

    def __call__(self, epoch: int) -> Sequence[int] | torch.Tensor:
        """Return the indices of an epoch, shape (samples,); the last two made are kept."""
        if epoch not in self._made:
            self._made = dict([*self._made.items()][-1:])
            self._made[epoch] = self._make(epoch)
        return self._made[epoch]

    def length(self, epoch: int) -> int:
        """Return how many samples an epoch has."""
        return len(self._source.dataset if self._source.sampler is None else self(epoch))

    def _make(self, epoch: int) -> Sequence[int] | torch.Tensor:
        words = (self._seed, "order", epoch)
        if self._source.sampler is not None:
            return _drawn(self._source.sampler, *words)
        if not self._source.shuffle:
            return range(len(self._source.dataset))
        return torch.randperm(len(self._source.dataset), generator=randomness.generator(*words))


def _drawn(sampler: Any, *words: randomness.Word) -> list[int]:
    """Draw a user's sampler under a key, whether it uses the global generator or one of its own."""
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(words[-1])
    randomness.seed(*words)
    own = getattr(sampler, "generator", None)
    if own is None:
        return list(sampler)
    sampler.generator = randomness.generator(*words)
    try:
        return list(sampler)
    finally:
        sampler.generator = own


@dataclass
class Walk(Sampler[Any]):
    """Batches of positions from a place on, epoch after epoch: torch's batch sampler."""

    order: Order
    batch_size: int
    drop_last: bool
    epoch: int = 0
    position: int = 0
    epochs: int | None = None

    def __iter__(self) -> Iterator[Any]:
        epoch, position, size = self.epoch, self.position, self.batch_size
        while self.epochs is None or epoch < self.epochs:
            indices = self.order(epoch)
            end = len(indices)
            if self.drop_last:
                end -= (end - position) % size
            for start in range(position, end, size):
                some = indices[start : min(start + size, end)]
                yield epoch, start, some.tolist() if isinstance(some, torch.Tensor) else list(some)
            epoch, position = epoch + 1, 0


@dataclass
class Failure:
    """What a data set raised, on its way from a worker to the loop."""

    where: str
    error: str
    text: str = field(repr=False)

    def to_raise(self) -> DataError:
        """Return the exception for the loop, with the worker's traceback as its cause."""
        error = DataError(
            f"The data set raised {self.error}\n  at {self.where}\n"
            "Mend the sample or the code that reads it, then run again: nothing is lost."
        )
        error.__cause__ = RuntimeError(f"in the data set:\n{self.text}")
        return error


@dataclass
class Keyed:
    """A data set that is asked for a place (epoch, start, indices) and gives a collated batch."""

    dataset: Any
    collate: Callable[[list[Any]], Any]
    words: tuple[randomness.Word, ...]

    def __getitems__(self, place: tuple[int, int, list[int]]) -> tuple[int, Any]:
        epoch, start, indices = place
        samples, where = [], ""
        try:
            for position, index in enumerate(indices, start):
                where = f"index {index} (epoch {epoch}, position {position})"
                if type(self.dataset) is not TensorDataset:  # it draws nothing; keys cost as much
                    randomness.seed(*self.words, epoch, position)
                samples.append(self.dataset[index])
            where = f"collating indices {indices}"
            randomness.seed(*self.words, "collate", epoch, start)
            return len(indices), self.collate(samples)
        except Exception as error:  # carried to the loop, which raises it
            said = f"{type(error).__name__}: {error}"
            return len(indices), Failure(where, said, traceback.format_exc())


@dataclass
class Begin:
    """What a worker does first.

    A notebook's interrupt goes to the whole process group: workers that heeded it would leave the loop
    without data for the window that it wants to end. And the loop's own SIGTERM handler, inherited by
    the fork, would make them immortal.
    """

    then: Callable[[int], None] | None

    def __call__(self, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.then is not None:
            self.then(number)


def _as_it_is(batch: Any) -> Any:
    return batch


class Loader:
    """Batches from any position on; its state is where it was started.

    Args:
        source: What to read.
        words: The first words of every key, for example (seed, "train").
        order: The order of its samples.
        batch_size: Samples in a batch; may be changed before `start`.
        num_workers: Forked processes that fetch; 0 fetches in the loop.
        pin_memory: Whether batches are put in page-locked memory.
    """

    def __init__(
        self,
        source: Source,
        words: tuple[randomness.Word, ...],
        order: Order,
        batch_size: int,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.num_workers = num_workers
        self._walk = Walk(order, batch_size, source.drop_last)
        self._torch: DataLoader[Any] = DataLoader(
            Keyed(source.dataset, source.collate, words),  # type: ignore[arg-type]
            batch_sampler=self._walk,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=Begin(source.worker_init),
            prefetch_factor=source.prefetch_factor if num_workers else None,
            multiprocessing_context="fork" if num_workers else None,
            # Without its own generator every start would draw from torch's global one.
            generator=torch.Generator(),
        )
        self._batches: Iterator[tuple[int, Any]] | None = None
        self._next = (-1, -1)

    def start(self, epoch: int, position: int, batch_size: int, epochs: int | None) -> None:
        """Go on from a place; where the loader stands there already, keep what is prefetched."""
        walk = self._walk
        stands_there = self._next == (epoch, position)
        same = (walk.batch_size, walk.epochs) == (batch_size, epochs)
        if self._batches is not None and stands_there and same:
            return
        walk.epoch, walk.position, walk.epochs = epoch, position, epochs
        walk.batch_size = batch_size
        self._batches = iter(self._torch)
        _tell_of_deaths_where_they_matter(self._batches)
        self._next = (epoch, position)

    def __next__(self) -> tuple[int, Any]:
        """Return (number of samples, collated batch).

        Raises:
            DataError: the data set raised; names the index and the position.
        """
        assert self._batches is not None
        if self.num_workers:
            num_samples, batch = next(self._batches)
        else:
            # A worker computes with one thread, and some sums differ in their last bit with two.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                num_samples, batch = next(self._batches)
            finally:
                torch.set_num_threads(threads)
        if isinstance(batch, Failure):
            self._batches = None
            raise batch.to_raise()
        self._next = (self._next[0], self._next[1] + num_samples)
        return num_samples, batch

    def put_back(self, given: list[tuple[int, Any]]) -> None:
        """Give these, which came last, again before what comes next."""
        assert self._batches is not None
        self._batches = chain(given, self._batches)
        self._next = (self._next[0], self._next[1] - sum(num_samples for num_samples, _ in given))

    def turn(self) -> None:
        """Note that the walk has gone over the end of an epoch."""
        self._next = (self._next[0] + 1, 0)

    def close(self) -> None:
        """End the workers; a later start forks new ones."""
        self._batches = None
        iterator = getattr(self._torch, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._torch._iterator = None


def _tell_of_deaths_where_they_matter(batches: Any) -> None:
    """Let a worker's death be told where its batch is awaited, not in a handler of SIGCHLD.

    Torch's handler raises in the main thread wherever that is: in the middle of an optimizer step, or
    of the save at a shutdown, which kills the workers too. Without it who waits for a batch would find
    a dead worker after 5 s only, when a notebook that is shut down has been killed.
    """
    if getattr(batches, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
        batches._worker_pids_set = False
        # Weak, or the iterator would be in a circle and its workers outlive it.
        look = partial(type(batches)._try_get_data, weakref.proxy(batches), DEATH_CHECK_S)
        batches._try_get_data = look


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device, whatever dicts, lists and tuples hold them."""
    if device.type == "cpu":
        return batch
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


class Epoch:
    """The rest of one epoch, as batches; `number` counts from 0."""

    def __init__(self, batches: Callable[[], Iterator[Any]], number: int) -> None:
        self._batches = batches
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        return self._batches()
