"""A data set that is iterated: it has no positions, so where it stands is part of what is saved.

With `state_dict` and `load_state_dict` it goes on exactly: its state at the window's start is in each
checkpoint. Without them `Task(skip_seen=True)` reads again what the epoch has seen, with the same keys,
and throws it away. It is read in the loop's own process: each worker would have a stream of its own,
and the order would depend on how many there are.

It needs a length, since a window must know its samples before it begins, and gives so many an epoch.
Before each sample all generators are seeded from its place; what a stream shuffles with a generator of
its own, or at the start of an epoch, has to be in its state.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from nbtrain import randomness
from nbtrain.errors import DataError

TRIED, TRIED_S = 8, 1.0  # samples, and seconds, that measuring a stream may take


class Stream:
    """An iterable data set with a place; a part, if it has a state.

    Args:
        dataset: Has `__iter__` and `__len__`; perhaps `state_dict`, `load_state_dict`, `set_epoch`.
        name: "train" or "valid", for messages.
        skip_seen: Whether to read again what was seen, where it has no state.

    Raises:
        DataError: it has no length, no sample, or no way to go on in the middle of an epoch.
    """

    def __init__(self, dataset: Any, name: str, *, skip_seen: bool) -> None:
        self.dataset, self._name = dataset, name
        self._kind = type(dataset).__name__
        self._iterator: Iterator[Any] | None = None
        self._at = (0, 0)
        self._given: dict[str, Any] | None = None
        self._told: list[str] = []
        if not hasattr(dataset, "__len__"):
            raise DataError(
                f"{name}: a {self._kind} has no length, and a step must know its samples before it "
                "begins. Give it a __len__: how many samples an epoch has."
            )
        if len(dataset) == 0:
            raise DataError(f"{name}: the data set is empty. Check the path it was read from.")
        self.has_state = all(hasattr(dataset, n) for n in ("state_dict", "load_state_dict"))
        # Each validation reads the same; the state that one leaves behind is in no checkpoint.
        repeats = self.has_state and name == "valid"
        self._first = copy.deepcopy(dataset.state_dict()) if repeats else None
        if not self.has_state and not skip_seen:
            raise DataError(
                f"{name}: a {self._kind} has no positions to resume from, and no state_dict and "
                "load_state_dict.\nGive a map-style data set, with __len__ and __getitem__, or give it "
                f"both, or write Task(..., skip_seen=True): a resume then reads again what the epoch "
                f"has seen{self._cost()}."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, words: tuple[randomness.Word, ...], epoch: int, position: int) -> Any:
        """Return the sample at a place; the one after the last is at hand, others are sought."""
        self._seek(words, epoch, position)
        return self._next(words)

    def told(self) -> list[str]:
        """Return in words, once, what seeking has cost."""
        told, self._told = self._told, []
        return told

    def state_dict(self) -> dict[str, Any]:
        """Return the place, and the data set's state there."""
        if self._given is not None:
            return self._given
        epoch, position = self._at
        return {"epoch": epoch, "position": position, "state": self.dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand there, once a sample is asked for."""
        self._given, self._iterator = state, None

    def _seek(self, words: tuple[randomness.Word, ...], epoch: int, position: int) -> None:
        if self._given is not None:
            given, self._given = self._given, None
            self.dataset.load_state_dict(copy.deepcopy(given["state"]))
            self._begin(words, given["epoch"])
            self._at = given["epoch"], given["position"]
        if self._iterator is not None and self._at == (epoch, position):
            return
        if position and self.has_state:
            raise ValueError(f"a {self._kind} stands at {self._at} and was asked for {epoch, position}")
        self._end(words)
        if self._first is not None:
            self.dataset.load_state_dict(copy.deepcopy(self._first))
        self._begin(words, epoch)
        began = time.perf_counter()
        for _ in range(position):
            self._next(words)
        if position:
            took_s = time.perf_counter() - began
            self._told.append(
                f"{self._name}: read again and skipped {position} samples of epoch {epoch} "
                f"in {took_s:.1f} s (skip_seen)"
            )

    def _begin(self, words: tuple[randomness.Word, ...], epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        randomness.seed(*words, "stream", epoch)
        self._iterator, self._at = iter(self.dataset), (epoch, 0)

    def _end(self, words: tuple[randomness.Word, ...]) -> None:
        """Let an epoch come to its end, where a data set may make itself ready for the next one."""
        iterator, length = self._iterator, len(self)
        if iterator is None:
            return
        while self.has_state and self._at[1] < length:  # what drop_last has left
            self._next(words)
        if self._at[1] == length:
            with suppress(StopIteration):
                next(iterator)
                raise ValueError(
                    f"a {self._kind} of length {length} gave more. Let __len__ say what it gives."
                )
        self._iterator = None

    def _next(self, words: tuple[randomness.Word, ...]) -> Any:
        assert self._iterator is not None
        epoch, position = self._at
        randomness.seed(*words, epoch, position)
        try:
            sample = next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"a {self._kind} ended after {position} of {len(self)} samples. "
                "Let __len__ say what it gives."
            ) from None
        self._at = epoch, position + 1
        return sample

    def _cost(self) -> str:
        """Measure what reading costs; the data set is not going to be used."""
        began, count = time.perf_counter(), 0
        for _ in self.dataset:
            count += 1
            took_s = time.perf_counter() - began
            if count == TRIED or took_s > TRIED_S:
                break
        if not count:
            return ""
        each_s = took_s / count
        return f", here {1000 * each_s:.2g} ms a sample, at most {each_s * len(self):.2g} s a time"
