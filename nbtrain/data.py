"""The samples of a run in their order, from any position on.

Order and augmentation are functions of a place, not of a history: which sample comes at a position
depends on (seed, epoch), and what a random augmentation does to it on (seed, epoch, position). The
whole state of the loader is therefore two integers, the number of workers and what they have
prefetched change nothing, and going on from the middle of an epoch reads no sample that is skipped.

Randomness that a data set keeps for itself, a `numpy.random.Generator` made in its `__init__` for
example, is out of reach: use `sample_rng()`, or torch's, numpy's, python's module-level functions.
"""

from __future__ import annotations

import signal
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils import signal_handling

from nbtrain import randomness
from nbtrain.errors import DataError
from nbtrain.samples import Order as Order
from nbtrain.samples import Source as Source
from nbtrain.samples import Walk as Walk
from nbtrain.samples import default_workers as default_workers
from nbtrain.samples import source as source
from nbtrain.stream import Stream

DEATH_CHECK_S = 0.2


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
        samples, where = [], f"indices {indices} (epoch {epoch})"
        try:
            if self.collate is default_collate and (found := _gathered(self.dataset, indices)):
                return len(indices), found
            for position, index in enumerate(indices, start):
                where = f"index {index} (epoch {epoch}, position {position})"
                if isinstance(self.dataset, Stream):
                    samples.append(self.dataset.take(self.words, epoch, position))
                    continue
                randomness.seed(*self.words, epoch, position)
                samples.append(_one(self.dataset, index))
            where = f"collating indices {indices}"
            randomness.seed(*self.words, "collate", epoch, start)
            return len(indices), self.collate(samples)
        except Exception as error:  # carried to the loop, which raises it
            said = f"{type(error).__name__}: {error}"
            return len(indices), Failure(where, said, traceback.format_exc())


def _gathered(dataset: Any, indices: list[int]) -> list[Tensor]:
    """Return what `default_collate` makes of tensors, at once, and [] where samples are to be read.

    It is a small net's dearest part: to read and collate 64 samples one by one takes a millisecond.
    """
    while type(dataset) is Subset:
        dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
    if type(dataset) is not TensorDataset or not all(map(_is_whole, indices)):
        return []
    at = torch.tensor([int(index) for index in indices])
    return [tensor[at].contiguous() for tensor in dataset.tensors]


def _is_whole(index: Any) -> bool:
    """Whether an index is one number, and no list, mask or row of several."""
    if type(index) is int:
        return True
    if isinstance(index, Tensor):
        return index.ndim == 0 and not (index.is_floating_point() or index.dtype == torch.bool)
    return isinstance(index, Integral) and not isinstance(index, bool)


def _one(dataset: Any, index: int) -> Any:
    """Read a sample; also where a data set can only read several: each has a key of its own."""
    if getattr(type(dataset), "__getitem__", Dataset.__getitem__) is Dataset.__getitem__:
        return dataset.__getitems__([index])[0]
    return dataset[index]


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
        self._stream = source.dataset if isinstance(source.dataset, Stream) else None
        # Each worker would have a stream of its own.
        self.num_workers = num_workers = 0 if self._stream is not None else num_workers
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

    def start(
        self,
        epoch: int,
        position: int,
        batch_size: int,
        epochs: int | None,
        room: int | None = None,
    ) -> None:
        """Go on from a place; where the loader stands there already, keep what is prefetched.

        With `room` for less than a batch, each batch comes in several smaller ones.
        """
        walk = self._walk
        stands_there = self._next == (epoch, position)
        same = (walk.batch_size, walk.epochs, walk.room) == (batch_size, epochs, room)
        if self._batches is not None and stands_there and same:
            return
        walk.epoch, walk.position, walk.epochs = epoch, position, epochs
        walk.batch_size, walk.room = batch_size, room
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
        if self._stream is not None:  # it is put back by its state, with the other parts
            self._batches = None
            return
        self._batches = chain(given, self._batches)
        self._next = (self._next[0], self._next[1] - sum(num_samples for num_samples, _ in given))

    def turn(self) -> None:
        """Note that the walk has gone over the end of an epoch."""
        self._next = (self._next[0] + 1, 0)

    def told(self) -> list[str]:
        """Return in words, once, what finding the place has cost."""
        return [] if self._stream is None else self._stream.told()

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
