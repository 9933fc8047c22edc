"""When a population is saved, what is written then, and what it means that a save failed.

The end of each slice is saved, and the part of one when training stops inside it or has gone on for
long. A save that fails is told and tried again with the next one; at the end it is raised.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from nbtrain import parts
from nbtrain.budget import words
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import NbtrainError
from nbtrain.lines import Lines
from nbtrain.opening import Ground
from nbtrain.population import founding
from nbtrain.population.founding import Founded
from nbtrain.population.making import Maker
from nbtrain.population.member import Member, Taken
from nbtrain.population.table import Key, Row

NOTHING: Taken = ({}, {}, {})


class Storing:
    """Saves what is alive of a population, and reads it back.

    Args:
        ground: Clock and stores.
        maker: Makes the members.
        founded: The rows, and the shelf.
        lines: Where a failure that is no reason to stop is told.
        every_s: Longest time between two saves inside a slice, in seconds.
    """

    def __init__(
        self, ground: Ground, maker: Maker, founded: Founded, lines: Lines, every_s: float
    ) -> None:
        self._ground, self._maker, self._founded = ground, maker, founded
        self._shelf, self._table, self._lines = founded.shelf, founded.table, lines
        self._every_s = every_s
        self._at = -math.inf
        self._place: Any = None

    def begin(self) -> None:
        """Save before the first slice: the place is tried out now, and the recipe is there."""
        self._at = self._ground.clock()
        if not self._shelf.manifests() or self._shelf.is_failing:
            self.note()

    def note(self) -> None:
        """Commit what is known, without any state, and wait for it.

        Raises:
            StoreError: the place refused.
        """
        rows = self._table.rows
        step = max((row.step for row in rows), default=0)
        self._request(None, NOTHING, step, max((row.progress for row in rows), default=0.0))
        self.finish()

    def end(self, row: Row, taken: Taken) -> None:
        """Save the end of a slice, in the background."""
        self._request(row.key, taken, row.step, row.progress)

    def part(self, member: Member) -> None:
        """Save the part of a slice that is done, in the background, unless that was done here.

        Raises:
            LossError: what is alive is spoilt.
        """
        assert member.live is not None and member.turn is not None
        live, key = member.live, member.turn.key
        if self._place != (key, live.place):
            self._request(key, member.take(), live.step, live.progress, partial=True)
            self._place = key, live.place

    def part_of(self, key: Key, found: Snapshot) -> None:
        """Save the part of a slice that was done elsewhere, and wait until it is on this machine."""
        facts, taken = found.facts, (found.model, found.tensors, found.state)
        self._request(key, taken, facts["step"], facts["progress"], partial=True)
        self._shelf.wait(copies=False)

    def is_due(self, now: float) -> bool:
        """Whether the last save is too long ago."""
        return now - self._at >= self._every_s

    def heed(self) -> None:
        """Tell what a save has raised since this was last asked, and who else trains here."""
        failure = self._shelf.failure()
        if failure is not None:
            if not isinstance(failure, NbtrainError):
                raise failure
            self._lines.warn(f"A save failed, training goes on: {failure}")
        if (rival := self._shelf.rival()) is not None:
            self._lines.warn(rival)

    def catch_up(self) -> None:
        """Copy what was loaded, where there is nothing left to train and a kill came before its copy.

        Raises:
            StoreError: the store refused.
        """
        if self._shelf.catch_up():
            self.finish()

    def finish(self) -> None:
        """Wait for what was requested, the copy too for as long as the budget lasts.

        Raises:
            StoreError: the last save failed.
        """
        budget = self._ground.budget
        timeout_s = None if budget.limit_s is None else max(60.0, budget.left_s)
        in_time = self._shelf.wait(timeout_s=timeout_s)
        if self._shelf.is_failing and (failure := self._shelf.failure()) is not None:
            self._place = None
            raise failure
        self.heed()
        if not in_time:
            self._lines.warn(
                f"The copy to {self._ground.stores[-1].place} was not done in {words(timeout_s)}; "
                "the checkpoints are on this machine."
            )

    def state(self, row: Row) -> Snapshot:
        """Return the state that a slice ended in.

        Raises:
            CheckpointError: it is no longer there, or cannot be read.
        """
        return self._founded.states.get(row.key) or self._shelf.load(row.key)

    def model(self, row: Row) -> torch.nn.Module:
        """Return a model of its own, with the weights that a slice ended with.

        Raises:
            CheckpointError: they are no longer there, or cannot be read.
        """
        built, found = self._maker.built(row.hyperparameters), self.state(row)
        model = parts.model_of(built, found.model, found.tensors, found.state["trees"])
        return model.to(self._maker.device)

    def _request(
        self, key: Key | None, taken: Taken, step: int, progress: float, *, partial: bool = False
    ) -> None:
        model, tensors, state = taken
        facts: dict[str, Any] = {
            "step": step,
            "stage": self._founded.stage,
            "progress": progress,
            "at": time.time(),
            "valid_loss": None,
            "round": key[0] if key else None,
            "member": key[1] if key else None,
            "partial": partial,
            "needs": [list(needed) for needed in self._table.needs()],
        }
        # For who lists what is stored, from manifests alone.
        best, rows = self._table.best(), self._table.rows
        score = best.score if best is not None else None
        facts["population"] = [self._table.evolution.members, rows[-1].round + 1 if rows else 1, score]
        recipe = self._ground.recipe_source
        state = state | founding.identity(self._ground, self._maker, self._founded)
        number = self._shelf.next_number()
        self._shelf.request(Snapshot(number, model, tensors, state, recipe, facts))
        self._at = self._ground.clock()
