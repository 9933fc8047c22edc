"""The settings in force, and every change of them: step, what, from, to, by whom.

The settings that shape the mathematics of a run are never just overwritten. They are the settings
that the session began with, folded with its journal; so a run with live edits can be replayed to the
same bits, and a resumed one has the learning rate that the run would have had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbtrain.errors import CheckpointError, near
from nbtrain.schedule import FUNCTION, Schedule, linear_scaling

OPTIONS = ("warmup_from", "power", "floor", "period", "multiplier")  # None leaves them to the schedule
SHAPE = ("epochs", "warmup_epochs", "warmup", "decay", "milestones", "gamma", *OPTIONS)
SETTINGS = (*SHAPE, "plateau_patience", "batch_size", "accumulate", "lr", "base_lr", "base_batch")
PATIENCE, THRESHOLD = 10, 1e-4  # of the plateau
WRITING = ("warmup_epochs", "decay", "lr", "base_lr")  # told one of these, a session writes rates


@dataclass(frozen=True)
class Entry:
    """One change."""

    step: int
    progress: float
    what: str
    old: Any
    new: Any
    by: str

    def __str__(self) -> str:
        where = f"step {self.step:,}, epoch {self.progress:.2f}"
        return f"{where}: {self.what} {self.old} → {self.new}, by {self.by}"


def check(settings: dict[str, Any]) -> None:
    """Refuse settings that make no sense.

    Raises:
        ValueError: says which, its value, and what it may be.
    """
    for name in ("batch_size", "accumulate"):
        value = settings[name]
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 up.")
    epochs = settings["epochs"]
    if epochs is not None and (type(epochs) is not int or epochs < 1):
        raise ValueError(f"epochs={epochs!r} must be a whole number from 1 up, or None for no end.")
    for name in ("lr", "base_lr", "base_batch"):
        value = settings[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"{name}={value!r} must be a number above 0.")
    if (settings["base_lr"] is None) != (settings["base_batch"] is None):
        raise ValueError("base_lr and base_batch go together: the rate, and the batch it was for.")
    patience = settings["plateau_patience"]
    if patience is not None and (type(patience) is not int or patience < 0):
        raise ValueError(
            f"plateau_patience={patience!r} must be a whole number of validations from 0 up."
        )
    Schedule(**{name: settings[name] for name in SHAPE})


class Journal:
    """The first settings, what was changed since, and what follows from both.

    Args:
        first: Names of `SETTINGS`, as the session began; `OPTIONS` and `plateau_patience` may lack.
        group_lrs: The learning rates that the optimizer's groups were built with.
        function: What the decay "function" asks: a factor for a progress.
        scheduler: The class of the one that the user brings, which then writes the rates, or "".
        scales: What each group's rate is multiplied by, for layer decay; none is 1 for all.
    """

    def __init__(
        self,
        first: Mapping[str, Any],
        group_lrs: Sequence[float],
        function: Callable[[float], float] | None = None,
        scheduler: str = "",
        scales: Sequence[float] = (),
    ) -> None:
        self.first: dict[str, Any] = dict.fromkeys((*OPTIONS, "plateau_patience")) | dict(first)
        self.first["milestones"] = tuple(first["milestones"])
        check(self.first)
        self.function, self.scheduler = function, scheduler
        self.scales = list(scales) or [1.0] * len(group_lrs)
        self.group_lrs = self._first_lrs = list(group_lrs)
        self.entries: list[Entry] = []
        self._edits: list[tuple[int, float, str, dict[str, Any]]] = []
        self.settings = dict(self.first)
        self.schedule = Schedule(**{name: self.first[name] for name in SHAPE}, function=function)

    def __repr__(self) -> str:
        now = self.settings
        size = f"batch_size {now['batch_size']}, accumulate {now['accumulate']}"
        head = f"<journal: {size}, lr {self.peak_lr:.6g}, warmup {now['warmup_epochs']}, {now['decay']}"
        return "\n  ".join([f"{head}; {len(self.entries)} changes", *map(str, self.entries)]) + ">"

    def edit(self, step: int, progress: float, by: str, **changes: Any) -> list[Entry]:
        """Change settings from this step on, and write down what did change.

        Raises:
            ValueError: a change makes no sense; then none of them is made.
        """
        changes, settings = self.tried(**changes)
        made = [Entry(step, progress, k, self.settings[k], v, by) for k, v in changes.items()]
        shape = {k: v for k, v in changes.items() if k in SHAPE}
        if shape:
            self.schedule = self.schedule.edited(progress, **shape)
        self.settings = settings
        self.entries += made
        if changes:
            self._edits.append((step, progress, by, changes))
        return made

    def rebase(self, step: int, progress: float, by: str, group_lrs: Sequence[float]) -> list[Entry]:
        """Let the optimizer's groups have been built with other rates, from this step on."""
        made = [Entry(step, progress, "group_lrs", self.group_lrs, list(group_lrs), by)]
        self.entries += made
        self._edits.append((step, progress, by, {"group_lrs": list(group_lrs)}))
        self.group_lrs = list(group_lrs)
        return made

    def observe(
        self,
        step: int,
        progress: float,
        epochs: Sequence[Mapping[str, Any]],
        metric: str = "valid_loss",
        direction: str = "min",
    ) -> bool:
        """Lower the rates if a plateau is what they wait for, and the validations so far are one.

        As torch's ReduceLROnPlateau does: after more than `plateau_patience` validations that are no
        better than the best by 1e-4 of it, times gamma. It counts anew from each lowering, from where
        the decay became "plateau", and from the warmup's end.

        Args:
            step: Here.
            progress: Here, in epochs.
            epochs: `History.epochs`: a row for each validation, with its progress.
            metric, direction: By what a validation is better, and "min" or "max" of it.

        Returns:
            Whether they were lowered; then it is written down.
        """
        if self.settings["decay"] != "plateau":
            return False
        sign = 1.0 if direction == "min" else -1.0
        turns = [e.progress for e in self.entries if e.what in ("factor", "decay")]
        since, best, num_bad = max([self.schedule.end, *turns]), math.inf, 0
        for row in epochs:
            value = row.get(metric)
            if value is None:
                continue
            if sign * value < best - THRESHOLD * abs(best) or best == math.inf > sign * value:
                best, num_bad = sign * value, 0
            else:
                num_bad += row["progress"] > since
        patience = self.settings["plateau_patience"]
        if num_bad <= (PATIENCE if patience is None else patience):
            return False
        return self.lower(step, progress, "plateau")

    def lower(self, step: int, progress: float, by: str) -> bool:
        """Let the factor be gamma times what it is, from this step on; False where that is no less."""
        schedule = self.schedule.lowered(progress)
        old, new = self.schedule(progress), schedule(progress)
        if new < old:
            self.entries.append(Entry(step, progress, "factor", old, new, by))
            self._edits.append((step, progress, by, {"lowered": new}))
            self.schedule = schedule
        return new < old

    def note(self, step: int, progress: float, by: str, what: str, old: Any, new: Any) -> list[Entry]:
        """Write down a change that is no setting's, such as of the optimizer's momentum."""
        made = [Entry(step, progress, what, old, new, by)] if new != old else []
        self.entries += made
        self._edits += [(step, progress, by, {"noted": [what, old, new]}) for _ in made]
        return made

    def tried(self, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what would change, and the settings then; raise ValueError where it cannot be."""
        unknown = changes.keys() - set(SETTINGS)
        if unknown:
            meant = near(min(unknown), (*SETTINGS, "budget"))
            hint = f"Did you mean {meant}? " if meant else ""
            raise ValueError(
                f"{', '.join(sorted(unknown))} cannot be set. "
                f"{hint}There are: {', '.join(SETTINGS)}, budget."
            )
        if "milestones" in changes:
            if not isinstance(changes["milestones"], (list, tuple)):
                raise ValueError(f"milestones={changes['milestones']!r} must be a list of epochs.")
            changes["milestones"] = tuple(changes["milestones"])
        changes = {k: v for k, v in changes.items() if v != self.settings[k]}
        settings = self.settings | changes
        check(settings)
        if "decay" in changes:
            self.refuse_no_function(settings)
        if self.scheduler and changes.keys() & set(WRITING):
            raise ValueError(
                f"{min(changes.keys() & set(WRITING))} cannot be set: the rates are those of the "
                f"{self.scheduler} that the task brings. Change it there, or leave it out of the task."
            )
        return changes, settings

    @property
    def by_hand(self) -> list[dict[str, Any]]:
        """What was set by hand, in its order."""
        return [changes for _, _, by, changes in self._edits if by == "hand"]

    @property
    def writes_rates(self) -> bool:
        """Whether the rates are the session's; else they are the optimizer's, or a part's."""
        planned = self.first["warmup_epochs"] or self.first["decay"] != "constant"
        asked = self.settings["lr"] is not None or self.settings["base_lr"] is not None
        return bool(planned or asked or any(e.what in WRITING for e in self.entries))

    @property
    def peak_lr(self) -> float:
        """The first group's learning rate where the schedule's factor is 1, and its scale."""
        now = self.settings
        if now["lr"] is not None:
            return float(now["lr"])
        if now["base_lr"] is not None:
            batch = now["batch_size"] * now["accumulate"]
            return linear_scaling(now["base_lr"], now["base_batch"], batch)
        return self.group_lrs[0]

    def rates(self, progress: float) -> list[float]:
        """Return each group's learning rate at a progress in epochs."""
        factor = self.schedule(progress)
        groups = zip(self.group_lrs, self.scales, strict=True)
        if self.settings["lr"] is None and self.settings["base_lr"] is None:
            return [lr * factor * scale for lr, scale in groups]
        peak = self.peak_lr
        first = self.group_lrs[0]
        return [(lr / first if first else 1.0) * peak * factor * scale for lr, scale in groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the first settings and all entries, as plain values."""
        return {
            "first": dict(self.first, milestones=list(self.first["milestones"])),
            "group_lrs": list(self._first_lrs),
            "edits": [
                [step, progress, by, {name: _plain(value) for name, value in changes.items()}]
                for step, progress, by, changes in self._edits
            ],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], like: Journal | None = None) -> Journal:
        """Make every edit again: the same settings and the same schedule, to the bit.

        Args:
            state: What `state_dict` gave.
            like: Has what no file holds: the function, whether there is a scheduler, the scales.

        Raises:
            CheckpointError: the decay is a function, and there is none.
        """
        function = None if like is None else like.function
        if like is not None and function is None and _uses_function(state):
            raise CheckpointError(
                "The decay is a function, which the task brings no more.\n"
                "Give it as before, Task(schedule=function), and change it by session.set(decay=...)."
            )
        journal = cls(state["first"], state["group_lrs"], function)
        for step, progress, by, changes in state["edits"]:
            if "noted" in changes:
                journal.note(step, progress, by, *changes["noted"])
            elif "lowered" in changes:
                journal.lower(step, progress, by)
            else:
                edit = journal.rebase if "group_lrs" in changes else journal.edit
                edit(step, progress, by, **changes)
        if like is not None:
            journal.scheduler, journal.scales = like.scheduler, list(like.scales)
        return journal

    def refuse_no_function(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings whose decay is a function where there is none.

        Raises:
            ValueError: says who brings it.
        """
        if settings["decay"] == FUNCTION and self.function is None:
            raise ValueError(
                'decay="function" needs one. Let build give it, Task(schedule=function): '
                "it takes the progress in epochs, and returns the factor on the learning rate."
            )


def _uses_function(state: dict[str, Any]) -> bool:
    made = [state["first"], *(changes for *_, changes in state["edits"])]
    return any(changes.get("decay") == FUNCTION for changes in made)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
