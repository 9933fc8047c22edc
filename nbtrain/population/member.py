"""One member of a population, and its part in one round: a slice.

A slice is so much training, then a validation. It is a function of the state that it begins with, of
its turn and of the seed: which process it is done in, and what was done there before, changes nothing.
A member that goes on from another's state takes over weights, optimizer, parts, journal and place, and
keeps its own key; so it does not repeat the batches that its donor has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nbtrain import accumulation, grades, memory, trees
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import CheckpointError, DataError, TaskError
from nbtrain.journal import SETTINGS
from nbtrain.live import Live
from nbtrain.population import making, parking
from nbtrain.population.evolution import Turn
from nbtrain.population.making import Maker
from nbtrain.population.table import Key, Row
from nbtrain.reading import Reading
from nbtrain.validation import validate

UNITS = ("epochs", "steps")
# What is no member's fault: the data, a state, or what build gives, such as without a network.
NOT_ITS_FAULT = (DataError, CheckpointError, TaskError, OSError)

Taken = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
Proceed = Callable[[str], bool]
Observe = Callable[[str, float], None]


@dataclass(frozen=True)
class Interval:
    """How much training there is in a slice.

    Args:
        amount: So many.
        unit: "epochs", which may be parts of one, or "steps".
    """

    amount: float
    unit: str = "epochs"

    @classmethod
    def read(cls, value: Any) -> Interval:
        """Read "4 epochs", "500 steps", or a number of epochs.

        Raises:
            ValueError: it is none of these, or not above 0.
        """
        words = value.split() if isinstance(value, str) else [value, "epochs"]
        try:
            amount, unit = float(words[0]), {"epoch": "epochs", "step": "steps"}.get(words[1], words[1])
            good = len(words) == 2 and unit in UNITS and 0 < amount < math.inf
            good = good and (unit == "epochs" or amount == int(amount))
        except (TypeError, ValueError, IndexError):
            good = False
        if not good or isinstance(value, bool):
            raise ValueError(
                f'interval={value!r} cannot be read. Write "4 epochs", "500 steps", or epochs.'
            )
        return cls(amount, unit)

    def is_over(self, live: Live, round: int, *, ends_epoch: bool) -> bool:
        """Whether a round's training is done; at an epoch's end, whether it is once that is closed."""
        until = self.amount * (round + 1)
        if self.unit == "steps":
            return live.step >= until
        return (live.epoch + 1 if ends_epoch else live.progress) >= until


class Member:
    """One member, asleep until its first turn in this process.

    Args:
        id: Its number, from 0.
        maker: Makes its task.
        interval: Length of a slice.
    """

    def __init__(self, id: int, maker: Maker, interval: Interval) -> None:
        self.id, self._maker, self._interval = id, maker, interval
        self.at: Key | None = None  # the state that is alive, where it is that of a slice's end
        self.turn: Turn | None = None  # the slice that is under way
        self.live: Live | None = None
        self.read: Reading | None = None
        self.is_parked = False
        self.gives_way = True  # to a lack of memory, by smaller micro-batches
        self._options: list[dict[str, Any]] = []

    # ---- a slice

    def go_on(self, turn: Turn) -> None:
        """Begin a slice from the state that is alive."""
        self.turn, self.at = turn, None

    def begin(self, turn: Turn, found: Snapshot | None, stage: int) -> None:
        """Begin a slice from a state, or afresh where there is none; or go on in the middle of it.

        Raises:
            CheckpointError: the state does not fit what build gives.
        """
        self.drop()
        read = self._maker.make(self.id, turn.hyperparameters)
        live = self._maker.live(read)
        self._options = making.options(read.task.optimizer)
        if found is not None:
            self._take_over(found, turn, live, read)
            kernel = self._maker.fingerprint(read.task.model)
            live.grade = grades.compare(found.state.get("fingerprint"), kernel)
        live.stage = stage
        if not read.task.model.training:
            read.task.model.train()
        self.live, self.read, self.turn = live, read, turn

    def slice(
        self, metric: str, proceed: Proceed, observe: Observe, clock: Callable[[], float]
    ) -> tuple[Row, Taken] | None:
        """Do the slice that is begun; return its row and its state, or None where `proceed` said no.

        Raises:
            NOT_ITS_FAULT: the data set raised, or the task cannot be trained.
            Exception: what the user's code raised, or a LossError: the member has failed.
        """
        if not self.train(proceed, observe, clock):
            return None
        began = clock()
        metrics = self.validate(proceed)
        if metrics is None:
            return None
        observe("validation", clock() - began)
        score = score_of(metrics, metric)
        taken = self.take()
        assert self.live is not None and self.turn is not None
        live, turn = self.live, self.turn
        self.finish()
        return (
            Row.of(
                turn,
                score=score,
                metrics={name: v if math.isfinite(v) else None for name, v in metrics.items()},
                error="" if score is not None else f"{metric} is not finite",
                step=live.step,
                epoch=live.epoch,
                progress=live.progress,
            ),
            taken,
        )

    def train(self, proceed: Proceed, observe: Observe, clock: Callable[[], float]) -> bool:
        """Train to the slice's end; False where `proceed` said no at a boundary on the way.

        Raises:
            DataError: the data set raised.
            Exception: what the user's code raised, or a LossError: the member has failed.
        """
        assert self.live is not None and self.read is not None and self.turn is not None
        live, read = self.live, self.read
        while not self._is_over:
            window = live.next_window()
            if window is None:
                live.settle()
                live.close_epoch({})
                read.train.turn()
                continue
            if not proceed("window"):
                return False
            began = clock()
            if not self._fill(window, live, read):
                memory.release()
                continue  # the same window again, in smaller micro-batches
            took_s = clock() - began
            live.train_s += took_s
            observe("window", took_s)
        return True

    def _fill(self, window: accumulation.Window, live: Live, read: Reading) -> bool:
        """Do the micro-steps of a window; False where memory was short, and the room is less now."""
        settings, num_samples = live.journal.settings, None
        live.begin(window)
        size, epochs = settings["batch_size"], settings["epochs"]
        read.train.start(live.epoch, live.position, size, epochs, live.room)
        try:
            while not window.is_full:
                given = _next(read)
                num_samples = given[0]
                live.micro_step(given, read.seed)
        except RuntimeError as error:
            if not (self.gives_way and memory.is_shortage(error)):
                raise
            live.give_way(error, num_samples)
        return window.is_full

    def validate(self, proceed: Proceed) -> dict[str, float] | None:
        """Return what the validation gives at the slice's end; None where `proceed` said no.

        Raises:
            LossError: a loss was not finite.
        """
        assert self.live is not None and self.read is not None and self.turn is not None
        live, read = self.live, self.read
        live.settle()
        assert read.valid is not None
        if not proceed("validation"):
            return None
        try:
            metrics = validate(
                read.task,
                read.valid,
                read.valid_batch,
                seed=self._maker.seed,
                forward=self._maker.forward,
                proceed=lambda: proceed("window"),
                room=live.valid_room,
            )
        except RuntimeError as error:
            if not (self.gives_way and memory.is_shortage(error)):
                raise
            memory.give_way_in_validation(error, live.rooms, read.task.model, read.valid_batch)
            return self.validate(proceed)
        if metrics is None:
            return None
        if live.next_window() is None and not live.is_done:
            live.close_epoch(metrics)
        else:
            live.note(metrics)
        return metrics

    def finish(self) -> None:
        """Be at the slice's end, and let its workers go: the next slice is another member's."""
        assert self.read is not None and self.turn is not None
        self.at, self.turn = (self.turn.round, self.id), None
        self.read.close()

    def take(self) -> Taken:
        """Copy all that the member is: the model's tensors, other tensors, plain values.

        Raises:
            LossError: a loss or a weight is not finite.
        """
        assert self.live is not None
        model, tensors, state = self.live.take()
        options = trees.flatten(self._options, "options", {})
        kernel = self._maker.fingerprint(self.live.task.model)
        return model, tensors, state | {"options": options, "fingerprint": kernel}

    def drop(self) -> None:
        """Fall asleep, forgetting what is alive."""
        if self.read is not None:
            self.read.close()
        self.at = self.turn = self.live = self.read = None
        self.is_parked = False

    def park(self) -> None:
        """Leave the device, until the next slice."""
        if self.live is not None and not self.is_parked:
            parking.park(self.live.task)
            self.is_parked = True

    def fetch(self) -> None:
        """Be on the device again."""
        if self.live is not None and self.is_parked:
            parking.fetch(self.live.task, self._maker.device)
            self.is_parked = False

    # ---- from another state

    def _take_over(self, found: Snapshot, turn: Turn, live: Live, read: Reading) -> None:
        """Be in a state, with the hyperparameters that were built: the source's own or new ones.

        What a hyperparameter means for the optimizer is seen by comparing what it was built with
        then and now: a moved `momentum` acts, and a rate that the user's scheduler has lowered stays
        where it is unless it was built otherwise.
        """
        # A state may be gone on from by several, and an optimizer keeps what it is given.
        found = replace(found, tensors={name: t.clone() for name, t in found.tensors.items()})
        optimizer = read.task.optimizer
        then = trees.restore(found.state["options"], {})
        saved = trees.restore(found.state["trees"]["optimizer"], found.tensors)
        for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=False):
            for name in group.keys() & before.keys() - {"params"}:
                group[name] = before[name]  # what differs on purpose is not to be warned of
        live.put(found)
        for group, old, new in zip(optimizer.param_groups, then, self._options, strict=True):
            for name, value in new.items():
                if name not in old or value != old[name]:
                    making.set_option(group, name, value)
        place, by = (live.step, live.progress), "explore" if turn.is_exploit else "cell"
        wanted = {name: value for name, value in read.settings.items() if name in SETTINGS}
        explored = {name: wanted.pop(name) for name in self._maker.settings}
        if read.group_lrs != live.journal.group_lrs:
            live.journal.rebase(*place, by, read.group_lrs)
        live.journal.edit(*place, by, **explored)
        live.journal.edit(*place, "cell", **wanted)

    @property
    def _is_over(self) -> bool:
        assert self.live is not None and self.turn is not None
        live, epochs = self.live, self.live.journal.settings["epochs"]
        ends_epoch = live.next_window() is None
        if live.is_done or (ends_epoch and epochs is not None and live.epoch + 1 >= epochs):
            return True
        return self._interval.is_over(live, self.turn.round, ends_epoch=ends_epoch)


def why(error: Exception) -> str:
    """Return in one line why a member has failed."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no words'}"


def _next(read: Reading) -> tuple[int, Any]:
    try:
        return next(read.train)
    except RuntimeError as error:  # a worker was killed, which is no fault of the member's
        raise DataError(f"The data could not be fetched: {error}") from error


def score_of(metrics: dict[str, float], metric: str) -> float | None:
    """Return what a member is judged by; None where it is not finite.

    Raises:
        TaskError: the validation does not give it.
    """
    if metric not in metrics:
        raise TaskError(
            f"metric={metric!r} is not among what the validation gives: {', '.join(metrics)}. "
            "Name one of these, or give it to Task(metrics={...})."
        )
    value = float(metrics[metric])
    return value if math.isfinite(value) else None
