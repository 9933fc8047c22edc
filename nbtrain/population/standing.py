"""Where a population stands, and each member: with what it trains, what that gave, whom it copied."""

from __future__ import annotations

import math
from typing import Any

import torch

from nbtrain.bar import number
from nbtrain.errors import SessionError
from nbtrain.journal import Journal
from nbtrain.opening import Ground
from nbtrain.population.member import Member
from nbtrain.population.rounds import Rounds
from nbtrain.population.table import Row


class Standing:
    """What is known of one member.

    Attributes:
        id: Its number, from 0.
    """

    def __init__(self, rounds: Rounds, member: Member) -> None:
        self._rounds, self._member = rounds, member
        self.id = member.id

    @property
    def rows(self) -> list[Row]:
        """Its slices that are over, oldest first."""
        return [row for row in list(self._rounds.table.rows) if row.member == self.id]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of the slice under way, else of the last one."""
        turn, rows = self._member.turn, self.rows
        if turn is not None:
            return dict(turn.hyperparameters)
        return dict(rows[-1].hyperparameters) if rows else {}

    @property
    def score(self) -> float | None:
        """What the last slice's validation gave; None before it, and where that failed."""
        return self.scores[-1] if self.rows else None

    @property
    def scores(self) -> list[float | None]:
        """The scores of its rounds."""
        return [row.score for row in self.rows]

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """Each time it went on from another member's state: round, donor, and what was changed."""
        return [
            {
                "round": row.round + 1,
                "donor": row.source,
                "member": row.member,
                "changes": [vars(change) for change in row.changes],
            }
            for row in self.rows
            if row.source not in (None, row.member)
        ]

    @property
    def state(self) -> str:
        """One of "ready", "training", "waiting", "failed", "ended", "done"."""
        return _state(self._rounds, self._member, next(reversed(self.rows), None))

    @property
    def model(self) -> torch.nn.Module:
        """Its model as it is now; where it sleeps, a copy from its last state.

        Raises:
            CheckpointError: that state is no longer there.
            SessionError: it has not trained yet; or it sleeps while others train.
        """
        if self._member.live is not None:
            return self._member.live.task.model
        return self._rounds.model(self._last())

    @property
    def journal(self) -> Journal:
        """The settings in force, and every change of them, with those of the weights it copied."""
        if self._member.live is not None:
            return self._member.live.journal
        return Journal.from_state_dict(self._rounds.storing.state(self._last()).state["journal"])

    def _last(self) -> Row:
        rows = [row for row in self.rows if row.score is not None]
        if not rows:
            raise SessionError(f"Member {self.id} has no state yet. Run the population first.")
        return rows[-1]

    def __repr__(self) -> str:
        score = "-" if self.score is None else number(self.score)
        return f"<member {self.id}: {self.state}, score {score}, {self.hyperparameters}>"


def _state(rounds: Rounds, member: Member, last: Row | None) -> str:
    if member.id in rounds.busy:
        return "training" if rounds.state == "running" else "waiting"
    if last is None:
        return "ready"
    if last.score is None:
        return "failed"
    if last.round < rounds.now_round - 1:
        return "ended"
    return "done" if rounds.is_done else "waiting"


def _facts(rounds: Rounds, member: Member, last: Row | None) -> dict[str, Any]:
    turn, live = member.turn, member.live  # once: the loop's thread moves on meanwhile
    now = turn or last
    source = now.source if now is not None else None
    state = _state(rounds, member, last)
    return {
        "id": member.id,
        "state": state,
        "score": last.score if last is not None else None,
        "hyperparameters": dict(now.hyperparameters) if now is not None else {},
        "donor": source if source != member.id else None,
        "progress": last.progress if last is not None else 0.0,
        "loss": live.loss if live is not None and state == "training" else math.nan,
        "error": last.error if last is not None else "",
    }


def of(name: str, rounds: Rounds, ground: Ground) -> dict[str, Any]:
    """Return what is known of a population, as plain values; times in seconds."""
    rows = list(rounds.table.rows)
    newest = {row.member: row for row in rows}  # in one pass: a panel asks four times a second
    best, active, arguments = rounds.now_best, rounds.active, ground.arguments
    return {
        "name": name,
        "kind": "population",
        "state": rounds.state,
        "reason": rounds.reason,
        "asked": rounds.asked,
        "error": rounds.worker.problem if rounds.worker is not None else "",
        "resumed": rounds.resumed,
        **rounds.grade.plain(),
        "stage": rounds.founded.stage,
        "round": rounds.now_round,
        "over_in_round": sum(row.round == rounds.now_round for row in rows),
        "left_in_round": rounds.now_left,
        "active": active.id if active is not None else None,
        "busy": sorted(rounds.busy),
        "num_slices": len(rows),
        "num_slices_in_all": rounds.num_slices,
        "members": [_facts(rounds, member, newest.get(member.id)) for member in rounds.members],
        "metric": arguments["metric"],
        "best_score": best.score if best is not None else None,
        "best_member": best.member if best is not None else None,
        "best_hyperparameters": dict(best.hyperparameters) if best is not None else {},
        "arguments": dict(arguments),
        "travels_with_weights": sorted(rounds.table.evolution.fixed),
        "tests": list(rounds.founded.tests),
        "budget": ground.clock_words,
        "budget_limit_s": ground.budget.limit_s,
        "budget_left_s": ground.budget.left_s,
        "reserve_s": ground.budget.reserve_s(validation=True),
        "saved": [vars(saved) for saved in rounds.shelf.known()],
        "pending_bytes": rounds.shelf.pending_bytes,
        "store": ground.stores[-1].place,
        "recipe": ground.recipe_words,
        "goes_on": ground.way_on(name),
    }
