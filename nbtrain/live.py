"""What is alive in a session, what a window does to it, and how it becomes a snapshot.

All state of a run is here and nowhere else: the place (step, epoch, position), the task, the journal,
the history, the losses not yet read, and the window that is under way. A snapshot taken inside a
window is of the window's start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nbtrain import accumulation, grades, memory, parts, randomness, schedulers, trees
from nbtrain.checkpoint import Snapshot
from nbtrain.data import Order
from nbtrain.errors import LossError, TaskError
from nbtrain.forward import Forward
from nbtrain.history import History
from nbtrain.journal import Journal
from nbtrain.judging import Judging
from nbtrain.schedule import FUNCTION
from nbtrain.task import Task


class Live:
    """A run at a place.

    Args:
        task: Model, optimizer, parts.
        journal: The settings in force.
        order: How many samples an epoch has.
        drop_last: Whether an epoch's last micro-batch is left out if it is not full.
        forward: How a batch becomes a loss.
        clip_norm: Largest norm of a step's gradient, or None.
        judging: When it has stopped getting better.
    """

    def __init__(
        self,
        task: Task,
        journal: Journal,
        order: Order,
        drop_last: bool,
        forward: Forward,
        clip_norm: float | None = None,
        judging: Judging = Judging(),  # noqa: B008
    ) -> None:
        self.task, self.journal, self.forward = task, journal, forward
        self.history = History()
        self.stage, self.grade = 1, grades.NEW
        self.step = self.epoch = self.position = 0
        self.train_s = 0.0
        self.stages: list[dict[str, Any]] = []
        self.logged: dict[str, float] = {}
        self.loss = math.nan
        self.window: accumulation.Window | None = None
        self.is_torn = self.is_spoilt = False
        self.scaler, self.judging = forward.new_scaler(), judging
        self.rooms: dict[str, int] = {}  # by device: samples that a micro-batch has room for
        self._order, self._drop_last, self._clip_norm = order, drop_last, clip_norm
        self._pending: list[tuple[dict[str, Any], Tensor, accumulation.Window]] = []
        self._sums: dict[str, tuple[float, float]] = {}  # of this epoch, with their weights
        self._start = parts.Start(task)
        self.num_samples = order.length(0)

    @property
    def place(self) -> tuple[int, int, int]:
        """Step, epoch, and position in the epoch in samples."""
        return self.step, self.epoch, self.position

    @property
    def progress(self) -> float:
        """Samples seen, as epochs."""
        return self.epoch + self.position / self.num_samples

    @property
    def num_seen(self) -> int:
        """Samples seen, were every epoch as long as this one."""
        return self.epoch * self.num_samples + self.position

    @property
    def lr(self) -> float:
        """The learning rate of the next step, first group; after the end of a function the last one."""
        now = self.journal.settings
        is_over = now["decay"] == FUNCTION and self.progress >= (now["epochs"] or math.inf)
        if self.journal.writes_rates and not is_over:
            return self.journal.rates(self.progress)[0]
        return float(self.task.optimizer.param_groups[0]["lr"])

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained, or it has stopped getting better."""
        return bool(self.end)

    @property
    def end(self) -> str:
        """How it has come to its end: "done", "early", or "" where it has not."""
        epochs = self.journal.settings["epochs"]
        if epochs is not None and self.epoch >= epochs:
            return "done"
        return "early" if self.judging.is_over(self.history.epochs) else ""

    @property
    def room(self) -> int | None:
        """Most samples that a micro-batch has room for on this device; None where that is not known."""
        return memory.room(self.rooms, self.task.model)

    @property
    def valid_room(self) -> int | None:
        """The same of a batch of the validation, which needs less for each sample."""
        return memory.room(self.rooms, self.task.model, validates=True)

    @property
    def micro_batch(self) -> int:
        """Most samples of a micro-batch, here and now."""
        return accumulation.cuts(self.journal.settings["batch_size"], self.room)[0]

    def edit(self, changes: dict[str, Any]) -> None:
        """Change settings by hand, from here on.

        Raises:
            ValueError: they cannot be changed so.
        """
        if "batch_size" in changes:
            self._order.refuse(changes["batch_size"])
        self.journal.edit(self.step, self.progress, "hand", **changes)

    def next_window(self) -> accumulation.Window | None:
        """Return the window that comes next, or None at the end of the epoch."""
        settings = self.journal.settings
        size, accumulate = settings["batch_size"], settings["accumulate"]
        if self._order.is_batched:
            sizes = self._order.sizes(self.epoch, self.position, size, drop_last=False)
            return accumulation.of(islice(sizes, accumulate), self.room)
        return accumulation.plan(
            self.num_samples - self.position,
            batch_size=size,
            accumulate=accumulate,
            drop_last=self._drop_last,
            room=self.room,
        )

    def enter(self, reason: str | None, now: float) -> None:
        """Write into the list of stages how this one goes: begun, its first step done, ended.

        Its grade is the lowest of all the times that it was opened in this kernel.
        """
        if not self.stages or self.stages[-1]["stage"] != self.stage:
            new = {"stage": self.stage, "from_step": self.step, "began_at": now}
            self.stages.append(new | {"first_step_at": None, "ended": None} | self.grade.plain())
        stage = self.stages[-1]
        stage["ended"] = reason
        if self.grade.is_worse_than(stage["grade"]):  # its cells were run again, changed
            stage |= self.grade.plain()
        if stage["first_step_at"] is None and self.step > stage["from_step"]:
            stage["first_step_at"] = now

    def begin(self, window: accumulation.Window) -> None:
        """Begin a window, remembering what a forward pass may change."""
        self._start.mark()
        self.window = window

    def go_back(self) -> None:
        """Be again at the start of the window that is under way, if one is."""
        if self.window is not None:
            self._start.go_back()
            self.window = None

    def micro_step(self, given: tuple[int, Any], seed: int) -> None:
        """Train one micro-batch of the window, under its key, and step when that fills it.

        Args:
            given: What a loader gives: (samples, batch).
            seed: Of the key.
        """
        assert self.window is not None
        num_samples, batch = given
        randomness.seed(seed, "step", self.step, self.window.micro_step)
        loss, n, output = self.forward.run(self.task, self.forward.moved(batch))
        self.add(loss.squeeze(), num_samples if n is None else n, self.task.named(output))

    def add(self, loss: Tensor, n: float, named: Mapping[str, Any]) -> None:
        """Run backward for a micro-step's mean loss of n samples; step if it fills the window.

        Args:
            loss: Shape ().
            n: Samples, tokens, boxes.
            named: Other means over these, to be logged.
        """
        window = self.window
        assert window is not None
        window.add(loss, n, self.scaler, self.task.optimizer)
        window.log(named, n)
        if window.is_full:
            self._update(window)

    def give_way(self, error: Exception, num_samples: int | None) -> str:
        """After an error for want of memory, be at the window's start, to take half so many samples.

        Returns:
            In words, what that changes.

        Raises:
            torch.OutOfMemoryError: it would not help.
        """
        model, before = self.task.model, self.micro_batch
        size, said = memory.halved(error, model, num_samples, is_torn=self.is_torn)
        self.go_back()
        self.rooms[memory.device_name(model)] = size
        self.journal.note(self.step, self.progress, "memory", "micro_batch", before, size)
        return said

    def _update(self, window: accumulation.Window) -> None:
        """End a full window: clip, write the rates, step, count."""
        optimizer = self.task.optimizer
        groups = optimizer.param_groups
        rates = self.journal.rates(self.progress) if self.journal.writes_rates else None
        self.is_torn = True  # what a schedule raised has changed nothing yet
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)  # the norm is clipped of what will be applied
        loss = window.finish((p for group in groups for p in group["params"]), self._clip_norm)
        if rates is not None:
            schedulers.write(optimizer, rates)
        lr = float(groups[0]["lr"])
        if self.scaler is None:
            optimizer.step()
        else:  # which leaves a step out where a gradient is not finite; its window counts all the same
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.task.anneal("step")
        self.step += 1
        self.task.average(self.step)
        self.position += window.num_samples
        self.window = None
        self.is_torn = False
        self._pending.append((self._row(lr), loss, window))

    def settle(self) -> None:
        """Read the losses off the device, into the history.

        Raises:
            LossError: one is not finite; what is alive is spoilt.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = torch.stack([loss for _, loss, _ in pending]).tolist()
        for (row, _, window), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                raise self._spoilt(f"The loss is {loss}", row)
            means, size = {}, float(window.weight)
            for name, (value, n) in ({"loss": (loss * size, size)} | window.named).items():
                means[name] = float(value) / float(n)
                total, weight = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = total + float(value), weight + float(n)
            self.history.add(**row | means | {"loss": loss})
            self.loss = loss

    def check(self) -> None:
        """Settle, and look at the weights: a gradient may be infinite where the loss was not.

        Raises:
            LossError: a loss or a weight is not finite; what is alive is spoilt.
        """
        self.settle()
        if (name := parts.spoilt(self.task.model)) is not None:
            raise self._spoilt(f"The weights {name!r} are not finite", self._row(self.lr))

    def refuse_unwatched(self, metrics: dict[str, float]) -> None:
        """Refuse a validation that does not give what a plateau is looked for in.

        Raises:
            TaskError: names what is watched, and what there is.
        """
        name, found = self.judging.metric, self.logged | metrics
        is_watched = self.journal.settings["decay"] == "plateau" or self.task.needs_a_metric
        if is_watched and name not in found:
            there = ", ".join(found) or "nothing"
            raise TaskError(
                f"A plateau is looked for in {name!r}, and this epoch gave {there}. "
                "Give the task valid= or metrics=, log it, or name another as metric=."
            )

    def close_epoch(self, metrics: dict[str, float]) -> dict[str, float]:
        """End the epoch, writing into the history what its validation gave and what was logged."""
        means = {f"train_{name}": total / n for name, (total, n) in self._sums.items()}
        metrics = means | self.logged | metrics
        self.note(metrics)
        self.logged, self._sums = {}, {}
        self.epoch, self.position = self.epoch + 1, 0
        self.num_samples = self._order.length(self.epoch)
        self.task.anneal("epoch", metrics.get(self.judging.metric))
        self.look_for_plateau()
        return metrics

    def refuse_blind(self) -> None:
        """Refuse a metric that no validation gives, and what waits for validations that never come.

        Nobody knows what a step will log; what a loop of the user's own has logged is in the history.

        Raises:
            TaskError, ValueError: says what there is.
        """
        task, decay = self.task, self.journal.settings["decay"]
        if task.step is None:
            seen = self.history.epochs[-1] if self.history.epochs else ()
            self.judging.refuse_unknown([*task.metrics, *seen])
            waits = {'decay="plateau"': decay == "plateau", "ReduceLROnPlateau": task.needs_a_metric}
            self.judging.refuse_waiting(waits, has_valid=task.valid is not None)

    def look_for_plateau(self) -> None:
        """Lower the rates where the decay waits for a plateau, and the validations so far are one."""
        how = self.judging
        self.journal.observe(self.step, self.progress, self.history.epochs, how.metric, how.direction)

    def note(self, metrics: dict[str, float]) -> None:
        """Write into the history what a validation gave here."""
        last = self.history.last  # the rate of a step that was, not of one to come
        row = self._row(self.lr if last is None else last["lr"]) | {"loss": self.loss}
        self.history.close_epoch(row | metrics)

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Copy everything to the CPU: the model's tensors, other tensors, plain values.

        Raises:
            LossError: a loss or a weight is not finite; what is alive is spoilt.
        """
        self.check()
        start = self._start if self.window is not None else None
        model, tensors, found = parts.take(self.task, self.history, start)
        state = {
            "place": list(self.place),
            "stage": self.stage,
            "stages": [dict(stage) for stage in self.stages],
            "train_s": self.train_s,
            "logged": trees.flatten(self.logged, "logged", {}),
            "sums": trees.flatten(self._sums, "sums", {}),
            "rooms": dict(self.rooms),
            "loss": None if math.isnan(self.loss) else self.loss,
            "journal": self.journal.state_dict(),
            "trees": found,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        return model, tensors, state

    def put(self, snapshot: Snapshot) -> None:
        """Be what was taken.

        Raises:
            CheckpointError: it does not fit; nothing was changed.
        """
        state = snapshot.state
        parts.put(self.task, self.history, snapshot.model, snapshot.tensors, state["trees"])
        self.journal = Journal.from_state_dict(state["journal"], self.journal)
        self.journal.scales = schedulers.scales(self.task.optimizer)  # which came with it
        self.step, self.epoch, self.position = state["place"]
        self.stage, self.stages = state["stage"], list(state["stages"])
        self.train_s, self.logged = state["train_s"], trees.restore(state["logged"], {})
        self.loss = math.nan if state["loss"] is None else state["loss"]
        self._sums = trees.restore(state.get("sums", {}), {})
        self.rooms = dict(state.get("rooms", {}))
        self.num_samples = self._order.length(self.epoch)
        self.task.optimizer.zero_grad(set_to_none=True)
        self.window, self._pending = None, []
        self.is_torn = self.is_spoilt = False
        self._start = parts.Start(self.task)  # what it has seen move was not of this state
        self.adopt(state.get("scaler"))

    def adopt(self, scaling: dict[str, Any] | None) -> None:
        """Scale gradients as another did; afresh where it did not, and not at all without fp16."""
        self.scaler = self.forward.new_scaler()
        if self.scaler is not None and scaling is not None:
            self.scaler.load_state_dict(scaling)

    def _spoilt(self, what: str, row: dict[str, Any]) -> LossError:
        self.is_torn = self.is_spoilt = True
        return LossError(
            f"{what} at step {row['step']} "
            f"(epoch {row['progress']:.3f}, learning rate {row['lr']:.3g}).\n"
            "The session is back at its last good checkpoint. "
            f"Lower the rate there, session.set(lr={self.journal.peak_lr / 3:.2g}), "
            "and run it again."
        )

    def _row(self, lr: float) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "epoch": self.epoch,
            "step": self.step,
            "progress": self.progress,
            "lr": lr,
            "seconds": self.train_s,
        }
