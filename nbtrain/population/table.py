"""What is known of a population: a row for each member's round that is over.

The rows are all the truth there is, besides the weights: which round is under way, who is still to
train in it, from whose state and with what, follows from them, from the seed and from the arguments.
So a population that was cut goes on from its rows as if it had not been.

A slice needs one state of the round before, its source's. `needs` says which states that leaves: as
many as there are members, never more than twice as many while a round is under way.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nbtrain.population.evolution import Change, Evolution, Turn

Key = tuple[int, int]  # round, member: whose state at the end of which round


@dataclass(frozen=True)
class Row:
    """A slice that is over.

    Args:
        round, member, source, hyperparameters, changes: Its turn.
        score: What it is judged by; None if it failed.
        metrics: What its validation gave; None for what is not finite.
        step, epoch, progress: Where it ended.
        error: Why it failed, in words.
    """

    round: int
    member: int
    source: int | None
    hyperparameters: dict[str, Any]
    changes: tuple[Change, ...]
    score: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    progress: float = 0.0
    error: str = ""

    @classmethod
    def of(cls, turn: Turn, **facts: Any) -> Row:
        """Return the row of a turn."""
        hyperparameters = dict(turn.hyperparameters)
        return cls(turn.round, turn.member, turn.source, hyperparameters, turn.changes, **facts)

    def plain(self) -> list[Any]:
        """Return it as plain values, without the names: each of many commits has all the rows."""
        changes = [[change.what, change.how, change.old, change.new] for change in self.changes]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return [*(values | {"changes": changes}).values()]

    @classmethod
    def from_plain(cls, values: list[Any]) -> Row:
        """Undo `plain`."""
        row = cls(*values)
        return replace(row, changes=tuple(Change(*change) for change in row.changes))  # type: ignore[misc]

    @property
    def key(self) -> Key:
        """Name the state that the slice ended in."""
        return self.round, self.member

    @property
    def source_key(self) -> Key | None:
        """Name the state that it began with, if there was one."""
        return None if self.source is None else (self.round - 1, self.source)


class Table:
    """The rows, and what follows from them.

    Args:
        evolution: Plans the rounds.
        epochs: Where members end, or None.
        rows: Those there are.
    """

    def __init__(self, evolution: Evolution, epochs: int | None, rows: Iterable[Row] = ()) -> None:
        self.evolution, self.epochs = evolution, epochs
        self.rows: list[Row] = []
        self._plain: list[list[Any]] = []  # once a row: each of many commits writes them all
        self._ends: dict[int, dict[int, Row]] = {}
        self._plans: dict[int, list[Turn]] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Note that a slice is over; rows stand by round and member, in whichever order they come."""
        place = bisect(self.rows, row.key, key=lambda row: row.key)
        self.rows.insert(place, row)
        self._plain.insert(place, row.plain())
        self._ends.setdefault(row.round, {})[row.member] = row

    def turns(self, round: int) -> list[Turn]:
        """Return a round's plan; the rounds before it must be over."""
        if round not in self._plans:
            if round == 0:
                self._plans[round] = self.evolution.first()
            else:
                ends = self._ends[round - 1]
                scores = {member: row.score for member, row in ends.items()}
                values = {member: row.hyperparameters for member, row in ends.items()}
                self._plans[round] = self.evolution.plan(round, scores, values)
        return self._plans[round]

    @property
    def round(self) -> int:
        """The round under way: its plan is made, and somebody is still to train in it."""
        newest = max(self._ends, default=0)
        return newest if self._open(newest) else newest + 1

    @property
    def left(self) -> list[Turn]:
        """Those who are still to train in this round; nobody where all is done, or all failed."""
        return [] if self.is_done or self.has_failed else self._open(self.round)

    @property
    def is_done(self) -> bool:
        """Whether a round is over in which every member reached the end."""
        last = self._ends.get(self.round - 1, {})
        good = [row for row in last.values() if row.score is not None]
        return bool(good) and self.epochs is not None and all(r.epoch >= self.epochs for r in good)

    @property
    def has_failed(self) -> bool:
        """Whether a round is over in which every member failed."""
        last = self._ends.get(self.round - 1, {})
        return bool(last) and all(row.score is None for row in last.values())

    def forget_failures(self) -> list[Row]:
        """Take a round back in which every member failed, for another try; return its rows."""
        if not self.has_failed:
            return []
        gone = self._ends.pop(self.round - 1)
        num_left = len(self.rows) - len(gone)  # they are the last ones
        self.rows, self._plain = self.rows[:num_left], self._plain[:num_left]
        return list(gone.values())

    def needs(self) -> list[Key]:
        """Return the states from which everything can go on, and those of members that have ended."""
        round = self.round
        if self.has_failed or self.is_done:  # it may be tried again; what is done stays whole
            round -= 1
        ends = self._ends.get(round, {})
        good = {row.key for row in ends.values() if row.score is not None}
        turns = self.turns(round)
        # Where nobody has got through yet, perhaps nobody will, and all is to be tried again.
        ahead = [t for t in turns if t.member not in ends or not good]
        needed = good | {(round - 1, t.source) for t in ahead if t.source is not None}
        busy = {turn.member for turn in turns}
        newest = {row.member: row for row in self.rows}
        ended = [row for row in newest.values() if row.member not in busy and row.score is not None]
        return sorted(needed | {row.key for row in ended})

    def row(self, key: Key) -> Row:
        """Return the row of a state."""
        return self._ends[key[0]][key[1]]

    def newest(self, member: int) -> Row | None:
        """Return a member's last row, if it has one."""
        return next((row for row in reversed(self.rows) if row.member == member), None)

    def best(self) -> Row | None:
        """Return the row of the best state there is, if there is one."""
        rows = [self.row(key) for key in self.needs()]
        scores = {number: row.score for number, row in enumerate(rows)}
        order = self.evolution.order(scores)
        return rows[order[0]] if order else None

    def plain(self) -> list[list[Any]]:
        """Return the rows as plain values."""
        return list(self._plain)

    def _open(self, round: int) -> list[Turn]:
        ends = self._ends.get(round, {})
        return [turn for turn in self.turns(round) if turn.member not in ends]
