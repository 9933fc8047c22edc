"""Which samples a run reads, and in which order, as a function of (seed, epoch).

A `Walk` is the batch sampler given to torch's DataLoader: it never ends at an epoch's end, so the
workers, forked once because a notebook's classes cannot be pickled, fetch across it.
"""

from __future__ import annotations

import multiprocessing
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate, chain
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

from nbtrain import randomness
from nbtrain.accumulation import cuts
from nbtrain.errors import DataError
from nbtrain.stream import Stream

MAX_WORKERS = 4  # what a free notebook has of cores; more is for the user to ask


@dataclass
class Source:
    """A data set and how it is to be read; None leaves a choice to the session."""

    dataset: Any
    sampler: Any = None
    batch_sampler: Any = None
    shuffle: bool = True
    batch_size: int | None = None
    drop_last: bool = False
    collate: Callable[[list[Any]], Any] = default_collate
    num_workers: int | None = None
    pin_memory: bool | None = None
    prefetch_factor: int | None = None
    worker_init: Callable[[int], None] | None = None


def source(
    data: Any,
    name: str,
    *,
    shuffle: bool,
    collate: Callable[..., Any] | None,
    skip_seen: bool = False,
) -> Source:
    """Take over a data set, or everything that a DataLoader says about one.

    Args:
        data: A data set with `__len__` and `__getitem__`, or `__iter__`, or a DataLoader over one.
        name: "train" or "valid", for messages.
        shuffle: Whether to shuffle where the data does not say.
        collate: Used instead of the DataLoader's or torch's own.
        skip_seen: Whether a stream without a state may be read again from its start.

    Raises:
        DataError: it has no length, is empty, or is a stream that cannot go on in its middle.
    """
    found = Source(data, shuffle=shuffle)
    if isinstance(data, DataLoader):
        if data.batch_sampler is None:
            raise DataError(
                f"{name}: the DataLoader has batch_size=None, so it makes no batches to count. "
                "Give the data set itself, or a DataLoader with a batch_size."
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
        if type(data.batch_sampler) is not BatchSampler:
            found.batch_sampler = data.batch_sampler
        elif isinstance(data.dataset, IterableDataset):
            found.shuffle = False
        elif found.shuffle and not _plain_shuffle(data.sampler, data.dataset):
            found.sampler = data.sampler
    if collate is not None:
        found.collate = collate
    if isinstance(found.dataset, IterableDataset) or _is_only_iterable(found.dataset):
        # A validation begins at the start every time.
        skip_seen, found.shuffle = skip_seen or name != "train", False
        found.dataset = Stream(found.dataset, name, skip_seen=skip_seen)
    else:
        _require_map_style(found.dataset, name)
    return found


def _is_only_iterable(dataset: Any) -> bool:
    kind = type(dataset)  # an iterator is spent after one epoch
    known = ("__getitem__", "__getitems__", "__next__")
    return hasattr(kind, "__iter__") and not any(hasattr(kind, name) for name in known)


def _plain_shuffle(sampler: Any, dataset: Any) -> bool:
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(dataset)
    )


def _require_map_style(dataset: Any, name: str) -> None:
    if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__getitems__"):
        raise DataError(
            f"{name}: a {type(dataset).__name__} has no positions to resume from. "
            "Give a map-style data set, with __len__ and __getitem__."
        )
    if not isinstance(dataset, Sized):
        raise DataError(f"{name}: a {type(dataset).__name__} has no length. Give it a __len__.")
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set is empty. Check the path it was read from.")


def default_workers(dataset: Any) -> int:
    """Return how many workers suit this machine: none for tensors in memory, streams, without fork."""
    if (
        isinstance(dataset, (TensorDataset, Stream))
        or "fork" not in multiprocessing.get_all_start_methods()
    ):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_WORKERS)


class Order:
    """Which sample comes at which position of an epoch, as a function of (seed, epoch)."""

    def __init__(self, source: Source, seed: int) -> None:
        self._source = source
        self._seed = seed
        self._made: dict[int, Sequence[int] | torch.Tensor] = {}
        self._ends: dict[int, list[int]] = {}

    def __call__(self, epoch: int) -> Sequence[int] | torch.Tensor:
        """Return the indices of an epoch, shape (samples,); the last two made are kept."""
        if epoch not in self._made:
            self._made = dict([*self._made.items()][-1:])
            self._made[epoch] = self._make(epoch)
        return self._made[epoch]

    def length(self, epoch: int) -> int:
        """Return how many samples an epoch has."""
        given = self._source.sampler is not None or self.is_batched
        return len(self(epoch) if given else self._source.dataset)

    def num_windows(self, epoch: int, position: int, settings: Mapping[str, Any]) -> int:
        """Return how many steps are left of a run, were all later epochs as long as this one."""

        def left(position: int) -> int:
            size, drop_last = settings["batch_size"], self._source.drop_last
            sizes = self.sizes(epoch, position, size, drop_last=drop_last)
            return -(-sum(1 for _ in sizes) // int(settings["accumulate"]))

        num_later = int(settings["epochs"]) - epoch - 1
        return left(position) + num_later * left(0) if num_later >= 0 else 0

    def misfit(self, batch_size: int) -> str:
        """Say why batches of a size leave nothing to train, or nothing where they do not."""
        if self.is_batched or not self._source.drop_last or batch_size <= self.length(0):
            return ""
        return (
            f"batch_size={batch_size} with drop_last leaves nothing of {self.length(0)} samples. "
            "Make it smaller, or keep the last batch."
        )

    def refuse(self, batch_size: int) -> None:
        """Refuse a size that somebody sets on the way.

        Raises:
            ValueError: a batch sampler makes the batches, or none would be full.
        """
        if self.is_batched:
            raise ValueError("batch_size is the batch sampler's. Set accumulate=, or give it another.")
        if misfit := self.misfit(batch_size):
            raise ValueError(misfit)

    @property
    def is_batched(self) -> bool:
        """Whether a batch sampler of the user's own makes the batches, whatever their sizes."""
        return self._source.batch_sampler is not None

    def sizes(self, epoch: int, position: int, batch_size: int, *, drop_last: bool) -> Iterator[int]:
        """Give the sizes of an epoch's batches, from a position on."""
        length = len(self(epoch)) if self.is_batched else self.length(epoch)
        if self.is_batched:
            ends = self._ends[epoch]
            for end in ends[bisect_right(ends, position) :]:
                yield end - position
                position = end
            return
        if drop_last:
            length -= (length - position) % batch_size
        while position < length:
            yield min(batch_size, length - position)
            position += batch_size

    def _make(self, epoch: int) -> Sequence[int] | torch.Tensor:
        words = (self._seed, "order", epoch)
        if self.is_batched:
            drawn = _drawn(self._source.batch_sampler, *words)
            batches = [list(batch) for batch in drawn if len(batch)]
            kept = [*self._ends.items()][-1:]
            self._ends = dict(kept) | {epoch: list(accumulate(map(len, batches)))}
            return list(chain.from_iterable(batches))
        if self._source.sampler is not None:
            return _drawn(self._source.sampler, *words)
        if not self._source.shuffle:
            return range(len(self._source.dataset))
        return torch.randperm(len(self._source.dataset), generator=randomness.generator(*words))


def _drawn(sampler: Any, *words: randomness.Word) -> list[Any]:
    """Draw a user's sampler under a key, whether it uses the global generator or one of its own."""
    both = [sampler, *filter(None, [getattr(sampler, "sampler", None)])]  # which batches are made of
    for each in both:
        if hasattr(each, "set_epoch"):
            each.set_epoch(words[-1])
    randomness.seed(*words)
    owns = [(each, each.generator) for each in both if getattr(each, "generator", None) is not None]
    for each, _ in owns:
        each.generator = randomness.generator(*words)
    try:
        return list(sampler)
    finally:
        for each, own in owns:
            each.generator = own


@dataclass
class Walk(Sampler[Any]):
    """Batches of positions from a place on, epoch after epoch: torch's batch sampler.

    Where the device has `room` for less than a batch, each comes in several smaller ones.
    """

    order: Order
    batch_size: int
    drop_last: bool
    epoch: int = 0
    position: int = 0
    epochs: int | None = None
    room: int | None = None

    def __iter__(self) -> Iterator[Any]:
        epoch, position, size = self.epoch, self.position, self.batch_size
        while self.epochs is None or epoch < self.epochs:
            indices = self.order(epoch)
            for whole in self.order.sizes(epoch, position, size, drop_last=self.drop_last):
                for length in cuts(whole, self.room):
                    some, start = indices[position : position + length], position
                    yield epoch, start, some.tolist() if isinstance(some, torch.Tensor) else list(some)
                    position += length
            epoch, position = epoch + 1, 0
