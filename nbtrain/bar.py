"""One progress line for a run: loss, learning rate, and what is left of epoch, run and budget."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Any

from tqdm.auto import tqdm

from nbtrain.budget import words

PERIOD_S = 0.25  # the front end shows no more; a batch job's log needs far less
PACE_S = 30.0
BATCH_PERIOD_S = 60.0


def number(value: float) -> str:
    """Write a loss, or "-" where there is none yet."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def hello(name: str, place: str, at: str | None, notes: list[str]) -> str:
    """Say where a session is found, and what is now other than it was."""
    if at is None:
        return f"{name}: new, in {place}."
    return "\n  ".join([f"{name}: resumed at {at}, from {place}.", *notes])


def goodbye(
    name: str,
    at: str,
    reason: str,
    way_on: str,
    *,
    is_own: bool,
    verdict: str = "",
    is_whole: bool = True,
) -> str:
    """Say where a loop has ended, why, and how it goes on; the user's own does so by its cell.

    It is whole where it ended at the step that it had come to.
    """
    if reason == "done":
        return f"{name}: done at {at}. For more, raise epochs."
    if reason == "early":
        return f"{name}: done early at {at}: {verdict}. For more, raise patience."
    if reason == "pause" and not is_own:
        return f"{name}: paused at {at}.\n  Resume goes on; Stop ends it."
    if reason == "error":
        lost = ": nothing is lost" if is_whole else ", which goes on from there"
        return f"{name}: ended by an error at {at}.\n  Mend it, and run the cell again{lost}."
    return f"{name}: ended by {reason} at {at}.\n  To go on: {way_on}"


class Pace:
    """Samples a second over the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now: float, num_seen: int) -> None:
        """Note how many samples have been seen now, in seconds of any clock."""
        self._seen.append((now, num_seen))
        while now - self._seen[0][0] > PACE_S:
            self._seen.popleft()

    @property
    def per_s(self) -> float:
        """The pace; 0 before the second note."""
        if len(self._seen) < 2:
            return 0.0
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        # Back at an older checkpoint, fewer have been seen than at first.
        return max(last - first, 0) / max(now - began, 1e-9)


class Bar:
    """A tqdm bar over the samples of a run, or other units, redrawn a few times a second at most.

    Args:
        name: The session's.
        done: Samples seen already.
        total: Samples of the whole run, or None where it has no end.
        is_batch: Whether nobody watches: then there are lines, a minute apart.
        shown: False draws nothing.
        unit: What is counted.
    """

    def __init__(
        self,
        name: str,
        done: int,
        total: int | None,
        *,
        is_batch: bool,
        shown: bool,
        unit: str = "samples",
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._is_shown, self._is_batch = shown, is_batch
        self._period_s = BATCH_PERIOD_S if is_batch else PERIOD_S
        self._due = 0.0
        # Where nobody watches, a bar that is drawn anew leaves its first picture in the output.
        self._tqdm = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=f" {unit}",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=self._period_s,
            disable=is_batch or not shown,
        )

    @classmethod
    def of(cls, live: Any, name: str, *, is_batch: bool, shown: bool) -> Bar:
        """Return the line of what is alive; on another thread than the main one it draws nothing."""
        epochs = live.journal.settings["epochs"]
        total = epochs * live.num_samples if epochs else None
        is_main = threading.current_thread() is threading.main_thread()
        return cls(name, live.num_seen, total, is_batch=is_batch, shown=shown and is_main)

    def is_due(self) -> bool:
        """Whether there is a line, old enough to be drawn again."""
        return self._is_shown and time.monotonic() >= self._due

    def show(
        self,
        done: int,
        epoch: int,
        left_in_epoch: int,
        loss: float,
        lr: float,
        samples_per_s: float,
        budget_left_s: float,
    ) -> None:
        """Draw the line; in a batch job print one instead.

        Args:
            done: Samples seen by the session.
            epoch: Counted from 1.
            left_in_epoch: Samples.
            loss: Of the last window.
            lr: Of the first group.
            samples_per_s: As it is now; 0 where it is not known.
            budget_left_s: Seconds, infinite without a limit.
        """
        left = words(left_in_epoch / samples_per_s) if samples_per_s else "?"
        text = (
            f"loss {number(loss)}, lr {lr:.3g}, epoch {epoch} ends in {left}, "
            f"budget {words(budget_left_s)}"
        )
        self.put(done, text)

    def put(self, done: int, text: str) -> None:
        """Draw the line with some words; in a batch job print one instead."""
        self._due = time.monotonic() + self._period_s
        if self._is_batch and self._is_shown:
            tqdm.write(f"{self._name}: {done} of {self._total or 'no end of'} {self._unit}, {text}")
        self._tqdm.n = done
        self._tqdm.set_postfix_str(text, refresh=False)
        self._tqdm.refresh()

    def draw(self, live: Any, samples_per_s: float, budget_left_s: float) -> None:
        """Draw the line of what is alive."""
        epoch, left = live.epoch + 1, live.num_samples - live.position
        if live.is_done:
            epoch, left = live.epoch, 0
        self.show(live.num_seen, epoch, left, live.loss, live.lr, samples_per_s, budget_left_s)

    def close(self) -> None:
        """Leave the last line as it is."""
        self._tqdm.close()
