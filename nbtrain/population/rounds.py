"""The loop of a population: members take turns, round by round.

In each round every member has one slice: training, then validation. The plan of a round is made from
the scores of the one before, when all of them are there; members are trained one after the other, in
the order of their numbers, and each is saved when its slice is over. An order, the clock and a signal
are heard between two windows, also inside a slice; the part of it that is done is saved then.

A member that fails, by a loss that is not finite or by an error in the user's code, ends its slice
without a score: it is worst, and replaced in the next round. An error of the data or of the store is
no member's fault, and ends the loop as it ends a session's.
"""

from __future__ import annotations

import math
import threading

import torch

from nbtrain import memory
from nbtrain.bar import Bar, goodbye, hello, number
from nbtrain.budget import words
from nbtrain.checkpoint import Snapshot
from nbtrain.driving import Driven
from nbtrain.errors import LossError, SessionError
from nbtrain.grades import NEW, Grade
from nbtrain.opening import Ground
from nbtrain.population.evolution import Turn
from nbtrain.population.founding import Founded
from nbtrain.population.making import Maker
from nbtrain.population.member import NOT_ITS_FAULT, Interval, Member, Taken, why
from nbtrain.population.parking import Room
from nbtrain.population.storing import NOTHING, Storing
from nbtrain.population.table import Row

LOOK_EVERY_S = 0.25


class Rounds(Driven):
    """Trains a population, from where it is, until something ends it.

    Args:
        name: The population's.
        ground: Clock, stores, arguments.
        maker: Makes the members.
        founded: What there is of it.
        save_every_s: Longest time between two saves inside a slice.
        shows_bar: Whether a progress line is drawn.
    """

    def __init__(
        self,
        name: str,
        ground: Ground,
        maker: Maker,
        founded: Founded,
        save_every_s: float,
        shows_bar: bool,
    ) -> None:
        super().__init__(name, ground, shows_bar)
        self.founded, self.table, self.shelf = founded, founded.table, founded.shelf
        self.storing = Storing(ground, maker, founded, self.lines, save_every_s)
        self._shows_bar = shows_bar
        self.interval = Interval.read(ground.arguments["interval"])
        members = range(ground.arguments["members"])
        self.members = [Member(id, maker, self.interval) for id in members]
        for member in self.members:
            member.gives_way = False  # before its micro-batches are halved, the others leave the device
        self.active: Member | None = None  # whose slice is under way
        self._parts = founded.parts
        self._errors: dict[int, Exception] = {}  # of this round, by member
        self._room = Room(ground.device)
        self._look_at = 0.0
        for again in self.table.forget_failures():
            founded.notes.append(f"member {again.member} tries round {again.round + 1} again")
        self._look_around()
        self.grade, self._from = founded.grade, None if founded.is_new else self._at
        where = self._from and self._graded(self._from)
        place = ground.stores[0 if self.shelf.is_behind else -1].place
        self.lines.say(hello(name, place, where, founded.notes))
        if founded.is_new:
            for note in founded.notes:
                self.lines.say(f"{name}: {note}.")

    def train(self) -> None:
        """Train until all is done, or something ends it."""
        if self.is_done:
            if self.shelf.is_failing:
                self.storing.note()
            self.storing.catch_up()
            self.state = self.reason = "done"
            self._say_goodbye()
            return
        with self._running():
            while not self.reason and (turns := self.table.left):
                self._round(turns)

    # ---- what it says of itself

    @property
    def resumed(self) -> str:
        """Where it was opened, and how good that is."""
        return "new" if self._from is None else f"resumed in {self._graded(self._from)}"

    @property
    def is_done(self) -> bool:
        """Whether every member has reached the end."""
        return self.table.is_done

    @property
    def num_slices(self) -> int | None:
        """How many slices there are in all, where that is known before."""
        epochs, interval = self.table.epochs, self.interval
        if epochs is None or interval.unit != "epochs" or self.table.evolution.mode == "halving":
            return None
        return math.ceil(epochs / interval.amount) * len(self.members)

    def bar(self, *, shown: bool = True) -> Bar:
        """Return a progress line over the slices."""
        shown = shown and self._shows_bar and threading.current_thread() is threading.main_thread()
        is_batch, done = self._ground.host.is_batch, len(self.table.rows)
        return Bar(self.name, done, self.num_slices, is_batch=is_batch, shown=shown, unit="slices")

    def draw(self, bar: Bar) -> None:
        """Draw a progress line as things are now."""
        best, now = self.now_best, self._doing()
        score = "-" if best is None or best.score is None else number(best.score)
        metric = self._ground.arguments["metric"]
        round, left = self.now_round + bool(self.now_left), words(self._budget.left_s)
        text = f"round {round}, {now}best {metric} {score}, budget {left}"
        bar.put(len(self.table.rows), text)

    @property
    def busy(self) -> set[int]:
        """The members whose slices are under way."""
        return set() if self.active is None else {self.active.id}

    def leave(self) -> None:
        """Do nothing: there is no loop of the user's."""

    def _doing(self) -> str:
        active = self.active
        live = active.live if active is not None else None
        return f"member {active.id}, loss {number(live.loss)}, " if active and live else ""

    # ---- rounds and slices

    def _round(self, turns: list[Turn]) -> None:
        if not self._slices(turns):
            return
        round = turns[0].round + 1
        if self.table.has_failed:
            error = self._errors.get(min(self._errors, default=-1))
            if error is None or isinstance(error, LossError):  # what that advises is for a session
                what = str(error or self.table.rows[-1].error).splitlines()[0]
                error = LossError(f"{what}\nGive the space lower rates, and the population a new name.")
            error.add_note(f"All members have failed in round {round}; this was the first.")
            raise error
        best = self.now_best
        assert best is not None
        score = f"{self._ground.arguments['metric']} {number(best.score or 0.0)}"
        left = self.table.left
        moves = [f"{t.member} <- {t.source}" for t in left if t.is_exploit]
        ended = {t.member for t in turns} - {t.member for t in left} if left else set()
        moves += [f"{member} ends" for member in sorted(ended)]
        says = f"round {round}: best {score} (member {best.member})"
        self.lines.say("; ".join([says, *([", ".join(moves)] if moves else [])]))
        self._errors = {}

    def _slices(self, turns: list[Turn]) -> bool:
        """Do the slices of a round; False where something ended the loop on the way."""
        self._hold_donors(turns)
        for turn in turns:
            if not self._slice(turn):
                return False
            self.storing.heed()
        return True

    def _hold_donors(self, turns: list[Turn]) -> None:
        """Copy each state that another member goes on from, before its own member trains on."""
        for turn in turns:
            key = (turn.round - 1, turn.source) if turn.source is not None else None
            if turn.is_exploit and key is not None and key not in self.founded.states:
                donor = self.members[key[1]]
                if donor.at == key:
                    self.founded.states[key] = Snapshot(0, *donor.take(), "", {})

    def _slice(self, turn: Turn) -> bool:
        """Do a member's slice; False where something ended the loop on the way."""
        member = self.active = self.members[turn.member]
        found = None if member.turn == turn else self._source(member, turn)
        try:
            if member.turn != turn:
                self._wake(member, turn, found)
            del found
            observe, clock = self._budget.observe, self._budget.working
            done = member.slice(self._ground.arguments["metric"], self._proceed, observe, clock)
            if done is None:
                return False
        except NOT_ITS_FAULT:
            raise
        except Exception as error:
            if memory.is_shortage(error) and self._make_room(member):
                member.drop()  # the slice is begun again, which changes nothing in it
                return self._slice(turn)
            self._fail(Row.of(turn, error=why(error)), error)
            return True
        if self._room.is_tight():
            member.park()  # it is the one that is needed last
        self._close(*done)
        return True

    def _source(self, member: Member, turn: Turn) -> Snapshot | None:
        """Return the state that a slice begins with, where it is not alive already.

        Raises:
            CheckpointError: it cannot be read; that is no fault of the member's.
        """
        if (part := self._parts.get(turn.key)) is not None:
            return part
        if turn.source is None:
            return None
        key = turn.round - 1, turn.source
        if member.at == key:
            return None
        return self.founded.states[key] if key in self.founded.states else self.shelf.load(key)

    def _regrade(self, grade: Grade) -> None:
        """Say it where a state is gone on from less well than was said."""
        if is_worse := grade.is_worse_than(self.grade.word):
            self.lines.say(f"{self.name}: goes on ({grade}).")
        if is_worse or (self._from is not None and self.grade.word == NEW.word):
            self.grade = grade

    def _make_room(self, member: Member) -> bool:
        """Let all others leave the device, then halve micro-batches; False after both."""
        others = [m for m in self.members if m is not member and m.live is not None]
        there = [m for m in others if not m.is_parked]
        for other in there:
            other.park()
        if not there and not member.gives_way:
            member.gives_way = True
            return True
        return bool(there)

    def _wake(self, member: Member, turn: Turn, found: Snapshot | None) -> None:
        member.fetch()
        self._room.begin()
        if found is None and turn.source is not None:
            member.go_on(turn)
        else:
            member.begin(turn, found, self.founded.stage)
            assert member.live is not None
            self._regrade(member.live.grade)
        self._parts.pop(turn.key, None)

    def _fail(self, row: Row, error: Exception) -> None:
        self._errors[row.member] = error
        self.members[row.member].drop()
        self.lines.say(f"member {row.member} has failed in round {row.round + 1}: {row.error}")
        self._close(row, NOTHING)

    def _close(self, row: Row, taken: Taken) -> None:
        """Note that a slice is over, and save it."""
        self.table.add(row)
        self._look_around()
        self.active = None
        self.storing.end(row, taken)
        wanted = {(t.round - 1, t.source) for t in self.table.left}
        self.founded.states = {
            key: state for key, state in self.founded.states.items() if key in wanted
        }

    def _look_around(self) -> None:
        # For other threads, which must not read a table that is being written.
        self.now_round, self.now_best = self.table.round, self.table.best()
        self.now_left = len(self.table.left)

    # ---- between two windows

    def _proceed(self, what: str) -> bool:
        """Look at losses, orders and clock, save if it is time; say whether to go on."""
        now = self._ground.clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            assert self.active is not None and self.active.live is not None
            self.active.live.settle()
            self._poll()
        if not self._may_go_on(what):
            return False
        if what == "window" and self.active is not None and self.storing.is_due(now):
            self.storing.part(self.active)
        return True

    # ---- the ends

    def _begin(self) -> None:
        for again in self.table.forget_failures():
            self.members[again.member].drop()
        self._look_at = 0.0
        self._order_files.start()
        self.storing.begin()

    def _settle(self) -> None:
        """Nothing is unread: a slice's losses are read before it is over."""

    def _end(self) -> None:
        """Save the part of a slice that is done, and wait for all that is being saved."""
        self._orders.obey()
        member = self.active
        if member is not None and member.live is not None and member.turn is not None:
            member.live.go_back()
            try:
                self.storing.part(member)
            except LossError as error:  # its slice is begun again, and fails where it is heard
                self.lines.warn(f"The part of member {member.id}'s slice was not saved: {error}")
                member.drop()
        self.storing.finish()
        self._orders.obey()
        self._say_goodbye()

    def _rest(self) -> None:
        for member in self.members:
            if member.read is not None:
                member.read.close()

    def _say_goodbye(self, *, prints: bool = True) -> None:
        saved = list(self.shelf.saved.values())[-1:]
        where = "".join(f"; saved in {s.place} ({s.degree})" for s in saved)
        reason, on = "done" if self.is_done else self.reason, self._ground.way_on(self.name)
        said = goodbye(self.name, self._at + where, reason, on, is_own=self.is_own)
        self.lines.say(said, prints=prints)

    def _graded(self, at: str) -> str:
        return at if self.grade.word == NEW.word else f"{at} ({self.grade})"

    @property
    def _at(self) -> str:
        best = self.now_best
        score = "" if best is None or best.score is None else f", best {number(best.score)}"
        done = len({row.round for row in self.table.rows})
        return f"round {done}, {len(self.table.rows)} slices{score}, stage {self.founded.stage}"

    def model(self, row: Row) -> torch.nn.Module:
        """Return a model of its own, with the weights that a slice ended with.

        Raises:
            SessionError: it trains, and what `build` draws for another model would shift its numbers.
            CheckpointError: they are no longer there, or cannot be read.
        """
        if self.runs_elsewhere:
            raise SessionError(
                f"{self.name!r} is training, and to build another model would shift its random "
                "numbers. Pause it first: population.pause()."
            )
        return self.storing.model(row)

    def best(self) -> Row:
        """Return the row of the best state.

        Raises:
            SessionError: there is none yet.
        """
        if self.now_best is None:
            raise SessionError("There is no best yet: no member has ended its first slice.")
        return self.now_best
