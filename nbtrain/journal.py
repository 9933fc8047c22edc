"""The settings in force, and every change of them: step, what, from, to, by whom.

The settings that shape the mathematics of a run are never just overwritten. They are the settings
that the session began with, folded with its journal; so a run with live edits can be replayed to the
same bits, and a resumed one has the learning rate that the run would have had.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbtrain.schedule import Schedule, linear_scaling

SHAPE = ("epochs", "warmup_epochs", "warmup", "decay", "milestones", "gamma")
SETTINGS = (*SHAPE, "batch_size", "accumulate", "lr", "base_lr", "base_batch")
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
    Schedule(**{name: settings[name] for name in SHAPE})


class Journal:
    """The first settings, what was changed since, and what follows from both.

    Args:
        first: Every name of `SETTINGS`, as the session began.
        group_lrs: The learning rates that the optimizer's groups were built with.
    """

    def __init__(self, first: dict[str, Any], group_lrs: Sequence[float]) -> None:
        self.first = dict(first, milestones=tuple(first["milestones"]))
        check(self.first)
        self.group_lrs = self._first_lrs = list(group_lrs)
        self.entries: list[Entry] = []
        self._edits: list[tuple[int, float, str, dict[str, Any]]] = []
        self.settings = dict(self.first)
        self.schedule = Schedule(**{name: self.first[name] for name in SHAPE})

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

    def rebase(self, step: int, progress: float, by: str, group_lrs: Sequence[float]) -> None:
        """Let the optimizer's groups have been built with other rates, from this step on."""
        self.entries.append(Entry(step, progress, "group_lrs", self.group_lrs, list(group_lrs), by))
        self._edits.append((step, progress, by, {"group_lrs": list(group_lrs)}))
        self.group_lrs = list(group_lrs)

    def note(self, step: int, progress: float, by: str, what: str, old: Any, new: Any) -> None:
        """Write down a change that is no setting's, such as of the optimizer's momentum."""
        if new != old:
            self.entries.append(Entry(step, progress, what, old, new, by))
            self._edits.append((step, progress, by, {"noted": [what, old, new]}))

    def tried(self, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what would change, and the settings then; raise ValueError where it cannot be."""
        unknown = changes.keys() - set(SETTINGS)
        if unknown:
            near = difflib.get_close_matches(min(unknown), SETTINGS, 1, 0.5)
            hint = f"Did you mean {near[0]}? " if near else ""
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
        return changes, settings

    @property
    def writes_rates(self) -> bool:
        """Whether the rates are the session's; else they are the optimizer's, or a part's."""
        planned = self.first["warmup_epochs"] or self.first["decay"] != "constant"
        asked = self.settings["lr"] is not None or self.settings["base_lr"] is not None
        return bool(planned or asked or any(e.what in WRITING for e in self.entries))

    @property
    def peak_lr(self) -> float:
        """The first group's learning rate where the schedule's factor is 1."""
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
        if self.settings["lr"] is None and self.settings["base_lr"] is None:
            return [lr * factor for lr in self.group_lrs]
        peak = self.peak_lr
        first = self.group_lrs[0]
        return [(lr / first if first else 1.0) * peak * factor for lr in self.group_lrs]

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
    def from_state_dict(cls, state: dict[str, Any]) -> Journal:
        """Make every edit again: the same settings and the same schedule, to the bit."""
        journal = cls(state["first"], state["group_lrs"])
        for step, progress, by, changes in state["edits"]:
            if "noted" in changes:
                journal.note(step, progress, by, *changes["noted"])
                continue
            edit = journal.rebase if "group_lrs" in changes else journal.edit
            edit(step, progress, by, **changes)
        return journal


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
