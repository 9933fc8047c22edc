"""The loop of a population whose members train at the same time, on a Ray cluster.

The rounds are the same as here, and so is each slice: `worker` does them with the code that does them
here, so that every weight, score and copy is that of `engine="local"` on the same kind of device. Each
is saved as soon as it is back, in whichever order they come.

Orders, the clock and signals are heard here, every quarter of a second. Slices that are under way are
then cut at their next boundary, and the part that is done is saved; a worker that does not answer in
time loses its slice, which is begun again. So does one that dies, or the notebook's kernel: each worker
loses at most the slice that it was at.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nbtrain.budget import words
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import NbtrainError, RecipeError
from nbtrain.opening import Ground
from nbtrain.population import space as spaces
from nbtrain.population.cluster import Cluster, Done
from nbtrain.population.evolution import Turn
from nbtrain.population.founding import Founded
from nbtrain.population.making import Maker
from nbtrain.population.member import Taken
from nbtrain.population.rounds import LOOK_EVERY_S, Rounds
from nbtrain.population.table import Key, Row
from nbtrain.population.worker import Kit, computer

PATIENCE_S = 30.0  # for slices that are cut, besides the longest window that was seen
MAX_LOSSES = 3  # of workers, in one and the same slice


def chosen(
    engine: str, resources: dict[str, Any], device: str | torch.device | None
) -> Callable[..., Rounds]:
    """Return what makes the loop of an engine; it takes what `Rounds` takes."""
    return partial(Spread, resources, device) if engine == "ray" else Rounds


class Spread(Rounds):
    """Trains a population on a Ray cluster; what it promises is what `Rounds` does.

    Args:
        resources: Ray's options for each worker.
        device: As the user gave it; workers take the same kind.
        name, ground, maker, founded, save_every_s, shows_bar: As for `Rounds`.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        RecipeError: the recipe of `build` is not complete, and workers have nothing else.
    """

    def __init__(
        self,
        resources: dict[str, Any],
        device: str | torch.device | None,
        name: str,
        ground: Ground,
        maker: Maker,
        founded: Founded,
        save_every_s: float,
        shows_bar: bool,
    ) -> None:
        self._kind = None if device is None else torch.device(device).type
        wants_gpu = None if self._kind is None else self._kind == "cuda"
        self._cluster = Cluster(resources, wants_gpu=wants_gpu)
        if ground.recipe is not None and ground.recipe.problems:
            raise RecipeError(
                "A Ray worker cannot build the task, because the recipe is not complete:\n  "
                + "\n  ".join(ground.recipe.problems)
                + '\nMend these, or train here with engine="local".'
            )
        self._maker = maker
        self._states: dict[Key, Any] = {}  # those that slices begin with, in the cluster
        self._losses: Counter[Key] = Counter()
        self._kinds: set[str] = set()
        self._waits_since = 0.0
        super().__init__(name, ground, maker, founded, save_every_s, shows_bar)

    @property
    def busy(self) -> set[int]:
        """The members whose slices are under way."""
        return {turn.member for turn in self._cluster.busy}

    def _doing(self) -> str:
        if self._cluster.busy:
            return f"{len(self._cluster.busy)} at once, "
        return "waiting for a worker, " if self.now_left and self.state == "running" else ""

    # ---- a round

    def _begin(self) -> None:
        if self._cluster.open():
            self._states = {}
        super()._begin()
        self._losses.clear()
        self._kit = self._made_kit()

    def _slices(self, turns: list[Turn]) -> bool:
        cluster, waiting = self._cluster, deque(turns)
        while waiting or cluster.busy:
            cluster.hire(len(waiting) + len(cluster.busy), self._kit)
            while waiting and cluster.has_rest:
                turn = waiting.popleft()
                cluster.begin(turn, self._given(turn))
                self.members[turn.member].turn = turn
            for done in cluster.wait(LOOK_EVERY_S):
                if not self._took(done):
                    waiting.append(done.turn)
            self._look_at_workers()
            self.storing.heed()
            self._poll()
            if not self._may_go_on("window"):
                return False
        return True

    def _given(self, turn: Turn) -> Any:
        """Return what a slice begins with, where workers find it."""
        if (part := self._parts.get(turn.key)) is not None:
            return self._cluster.put(part)
        if turn.source is None:
            return None
        key = turn.round - 1, turn.source
        if key not in self._states:
            found = self.founded.states.get(key) or self.shelf.load(key)
            self._states[key] = self._cluster.put(found)
        return self._states[key]

    def _took(self, done: Done) -> bool:
        """Commit a slice that came back; False where it is to be done again.

        Raises:
            DataError: the data set raised.
            NbtrainError: the slice has lost one worker too many.
        """
        turn, outcome = done.turn, done.outcome
        self.members[turn.member].turn = None
        if outcome is None:
            self._lost(done)
            return False
        for what, cost_s in outcome.costs.items():
            self._budget.observe(what, cost_s)
        self._regrade(outcome.grade)
        if outcome.row is None:
            if outcome.error is not None:
                raise outcome.error
            self._keep_part(turn, done.found)
            return False
        self._parts.pop(turn.key, None)
        if outcome.error is not None:
            self._fail(outcome.row, outcome.error)
        else:
            assert done.found is not None
            self._states[turn.key] = done.state
            self._close(outcome.row, (done.found.model, done.found.tensors, done.found.state))
        return True

    def _close(self, row: Row, taken: Taken) -> None:
        super()._close(row, taken)
        wanted = {(t.round - 1, t.source) for t in self.table.left}
        # Who is copied is known when the round is over.
        self._states = {
            key: state
            for key, state in self._states.items()
            if key in wanted or (key[0] == row.round == self.table.round)
        }

    def _lost(self, done: Done) -> None:
        turn = done.turn
        self._losses[turn.key] += 1
        where = f"member {turn.member}'s slice of round {turn.round + 1}"
        if self._losses[turn.key] >= MAX_LOSSES:
            raise NbtrainError(
                f"{where} has lost its worker {MAX_LOSSES} times.\n  the last time: {done.lost}\n"
                "What was done before is saved. Look into Ray's log: is there memory enough?"
            )
        self.lines.warn(f"A worker was lost, {where} is begun again. {done.lost}")
        # What it began with may have been lost too; a store has it.
        self._states.pop((turn.round - 1, turn.source or 0), None)

    # ---- the end

    def _end(self) -> None:
        try:
            self._gather()
        finally:
            super()._end()

    def _gather(self) -> None:
        """Cut what is under way, and keep what is done of it."""
        cluster = self._cluster
        cluster.cut()
        patience_s = PATIENCE_S + self._budget.cost_s("window")
        until = time.monotonic() + min(patience_s, max(self._budget.left_s, 1.0))
        while cluster.busy and time.monotonic() < until:
            for done in cluster.wait(LOOK_EVERY_S):
                outcome = done.outcome
                if outcome is not None and (outcome.row is not None or outcome.error is None):
                    self._took(done)
                else:  # something else has ended the training already
                    why = done.lost if outcome is None else str(outcome.error)
                    self.lines.warn(f"Member {done.turn.member}'s slice is begun again. {why}")
        for turn in cluster.busy:
            self.lines.warn(
                f"Member {turn.member}'s slice did not end in {words(patience_s)} and is begun again."
            )
        cluster.dismiss_busy()
        for member in self.members:
            member.turn = None

    def _keep_part(self, turn: Turn, part: Snapshot | None) -> None:
        if part is not None:
            self._parts[turn.key] = part
            self.storing.part_of(turn.key, part)

    def _rest(self) -> None:
        super()._rest()
        self._states = {}
        self._cluster.close()

    # ---- what workers are given

    def _made_kit(self) -> Kit:
        ground = self._ground
        assert ground.recipe is not None
        device = "cuda" if self._cluster.has_gpu else "cpu"
        return Kit(
            self.name,
            ground.recipe,
            spaces.plain(self.table.evolution.space),
            ground.arguments,
            self._maker.split,
            device if self._kind in (None, "cuda") else self._kind,
            self.founded.stage,
        )

    def _look_at_workers(self) -> None:
        """Say what somebody should know of them, once."""
        kinds = set(self._cluster.kinds)
        if self._ground.device.type == self._kit.device:
            kinds.add(computer(self._ground.device))
        if len(kinds) > 1 and kinds != self._kinds:
            self._kinds = kinds
            self.lines.warn(
                "A slice's bits depend on who does it, because not all are alike: "
                + "; ".join(sorted(kinds))
            )
        now = time.monotonic()
        if self._cluster.busy or not self._waits_since:
            self._waits_since = now
        elif now - self._waits_since > PATIENCE_S:
            self._waits_since = math.inf
            self.lines.say(f"{self.name}: no worker has begun yet; Ray makes room when others leave.")
