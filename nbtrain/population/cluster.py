"""Ray as a population needs it: workers that do slices, wherever there is room for them.

All that is known of Ray is in here and in `tuning`, and it is imported when it is asked for. A cluster
that is connected already is used and left; one that is made here is shut down here.

A worker is an actor that is made once and then does one slice after the other, as many workers as fit
at the same time. It holds nothing that is not elsewhere too: where one is lost, another does its slice
again. What a slice ends with stays in Ray's object store as long as another slice begins with it, and
goes from node to node without passing through this process.
"""

from __future__ import annotations

import importlib
import logging
import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbtrain.checkpoint import Snapshot
from nbtrain.errors import NbtrainError
from nbtrain.population.evolution import Turn
from nbtrain.population.worker import Kit, Outcome, Worker

MAX_FALSE_STARTS = 3  # one after the other
NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}  # an option, and its resource

_connected: weakref.WeakSet[Cluster] = weakref.WeakSet()
_made_here: set[tuple[str, str]] = set()  # the connection, where the cluster is one of ours


@dataclass
class Hand:
    """A worker as it is seen from here.

    Args:
        actor: Ray's handle.
        answer: What is waited for: that it has entered, or a slice's outcome; None where it rests.
        turn: The slice that it does, if it does one.
        state: What will be that slice's state.
        number: What the slice is called.
    """

    actor: Any
    answer: Any
    turn: Turn | None = None
    state: Any = None
    number: int = 0


@dataclass(frozen=True)
class Done:
    """A slice that came back.

    Args:
        turn: The slice.
        outcome: What became of it; None where the worker was lost.
        found: The state that it ended in, or that it was cut in.
        state: The same, where it stands in the cluster.
        lost: How the worker was lost, in words.
    """

    turn: Turn
    outcome: Outcome | None = None
    found: Snapshot | None = None
    state: Any = None
    lost: str = ""


def package(name: str = "ray") -> Any:
    """Import and return Ray, or a part of it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name} cannot be imported ({error}). Install it: pip install 'nbtrain[ray]'",
            name=name,
        ) from error


def check(resources: Any) -> dict[str, Any]:
    """Return what was asked for each worker, as plain values that can be kept.

    Raises:
        ValueError: it is no dict of Ray's options for an actor.
    """
    if resources is None:
        return {}
    plain = (bool, int, float, str)
    good = isinstance(resources, Mapping) and all(
        isinstance(name, str)
        and (type(v) in plain or (isinstance(v, dict) and all(type(x) in plain for x in v.values())))
        for name, v in resources.items()
    )
    amounts = [resources.get(name, 0) for name in NAMES] if good else []
    if not good or not all(isinstance(a, (int, float)) and 0 <= a < math.inf for a in amounts):
        raise ValueError(
            f"resources={resources!r} must be Ray's options for an actor, as numbers and words: "
            'resources={"num_cpus": 1, "num_gpus": 0.25}.'
        )
    return dict(resources)


class Cluster:
    """The workers, on the cluster that Ray is connected to.

    Args:
        resources: Ray's options for each worker; where there are none, 1 CPU.
        wants_gpu: Whether a worker has a GPU for which `resources` does not ask; None is 1 where there
            are some and `resources` asks for nothing.
    """

    def __init__(self, resources: dict[str, Any], *, wants_gpu: bool | None) -> None:
        self._ray, self._asked, self._wants_gpu = package(), resources, wants_gpu
        self._options: dict[str, Any] = {}
        self._job: tuple[str, str] | None = None
        self._hands: list[Hand] = []
        self._num_slices = self._num_false_starts = 0
        self.kinds: set[str] = set()  # with what workers compute, in words

    def open(self) -> bool:
        """Be connected, with room for a worker at least; whether what was there before is gone.

        Raises:
            NbtrainError: no worker fits on any node.
            ValueError: Ray does not know one of the options.
        """
        ray = self._ray
        if not ray.is_initialized():
            # Warnings are about this thread, which is not the main one, and about room we look for.
            ray.init(include_dashboard=False, logging_level=logging.ERROR)
            _made_here.add(self._here())
        job = self._here()
        _connected.add(self)
        is_new = job != self._job
        if is_new:
            self._job, self._hands = job, []
            self._options = {"num_cpus": 1} | self._asked
            has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
            default = has_gpus and not self._asked if self._wants_gpu is None else self._wants_gpu
            if default and "num_gpus" not in self._options:
                self._options["num_gpus"] = 1
            self._refuse_small()
        return is_new

    @property
    def has_gpu(self) -> bool:
        """Whether each worker has one, or a part of one."""
        return bool(self._options.get("num_gpus"))

    @property
    def busy(self) -> list[Turn]:
        """The slices under way."""
        return [hand.turn for hand in self._hands if hand.turn is not None]

    def hire(self, count: int, kit: Kit) -> None:
        """Have so many workers, or as many as fit; what fits may have changed since."""
        if len(self._hands) >= count:
            return
        wanted = min(count, max(self._num_fitting(), 1))
        actor = self._ray.remote(Worker).options(max_concurrency=2, **self._options)
        for _ in range(wanted - len(self._hands)):
            hand = actor.remote()
            self._hands.append(Hand(hand, hand.enter.remote(kit)))

    def put(self, found: Snapshot) -> Any:
        """Bring a state to where workers find it."""
        return self._ray.put(found)

    @property
    def has_rest(self) -> bool:
        """Whether a worker waits for a slice."""
        return any(hand.answer is None for hand in self._hands)

    def begin(self, turn: Turn, state: Any) -> None:
        """Let a worker that rests do a slice."""
        hand = next(hand for hand in self._hands if hand.answer is None)
        self._num_slices += 1
        hand.turn, hand.number = turn, self._num_slices
        work = hand.actor.slice.options(num_returns=2)
        hand.answer, hand.state = work.remote(hand.number, turn, state)

    def wait(self, timeout_s: float) -> list[Done]:
        """Wait until a worker has answered, but not longer than this; return slices that came back.

        Raises:
            Exception: a worker cannot make ready; what was wrong.
        """
        answers = {hand.answer: hand for hand in self._hands if hand.answer is not None}
        if not answers:
            return []
        ready, _ = self._ray.wait(list(answers), num_returns=1, timeout=timeout_s)
        return [done for answer in ready if (done := self._answered(answers[answer])) is not None]

    def cut(self) -> list[Any]:
        """Tell all slices under way to end at their next boundary; return what says that they know."""
        return [hand.actor.cut.remote(hand.number) for hand in self._hands if hand.turn is not None]

    def dismiss(self, hands: Iterable[Hand] | None = None) -> None:
        """End workers, all of them unless said otherwise; what they are doing is lost."""
        for hand in list(self._hands if hands is None else hands):
            self._hands.remove(hand)
            if self._is_here:
                self._ray.kill(hand.actor)

    def dismiss_busy(self) -> None:
        """End the workers that are at a slice; it is lost."""
        self.dismiss([hand for hand in self._hands if hand.turn is not None])

    def close(self) -> None:
        """End all workers, and the cluster if it was made here and nobody else here is at it."""
        self.dismiss()
        _connected.discard(self)
        if self._is_here and self._job in _made_here and not _connected:
            self._ray.shutdown()
            _made_here.clear()
        self._job = None

    # ---- inside

    @property
    def _is_here(self) -> bool:
        return bool(self._ray.is_initialized()) and self._here() == self._job

    def _here(self) -> tuple[str, str]:
        """Name the connection: jobs of two clusters may have the same number."""
        context = self._ray.get_runtime_context()
        return context.get_node_id(), context.get_job_id()

    def _answered(self, hand: Hand) -> Done | None:
        turn, answer, state = hand.turn, hand.answer, hand.state
        hand.turn = hand.answer = hand.state = None
        try:
            if turn is not None:
                outcome, found = self._ray.get([answer, state])
                return Done(turn, outcome, found, state)
            kind, error = self._ray.get(answer)
        except self._ray.exceptions.RayError as lost:
            words = f"{type(lost).__name__}: {str(lost).strip().splitlines()[0]}"
            self.dismiss([hand])
            if turn is not None:
                return Done(turn, lost=words)
            self._num_false_starts += 1
            if self._num_false_starts < MAX_FALSE_STARTS:
                return None
            raise NbtrainError(f"No worker can begin.\n  {words}") from lost
        if error is not None:
            self.dismiss([hand])
            raise error
        self.kinds.add(kind)
        self._num_false_starts = 0
        return None

    def _needed(self) -> dict[str, float]:
        named = {r: self._options[name] for name, r in NAMES.items() if self._options.get(name)}
        return named | {r: n for r, n in self._options.get("resources", {}).items() if n}

    def _num_fitting(self) -> int:
        """Return how many workers fit on the nodes there are, were nobody else on them."""
        needed = self._needed()
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not needed:
            return 1_000_000
        return sum(min(int(n.get(r, 0) / x + 1e-9) for r, x in needed.items()) for n in nodes)

    def _refuse_small(self) -> None:
        if self._num_fitting():
            return
        needed = self._needed()
        there = self._ray.cluster_resources()
        sides = [", ".join(f"{amount.get(r, 0):g} {r}" for r in needed) for amount in (needed, there)]
        num_nodes = sum(node["Alive"] for node in self._ray.nodes())
        self.close()
        raise NbtrainError(
            "No worker fits on a node of the Ray cluster.\n"
            f"  asked for each: {sides[0]}\n"
            f"  there in all:   {sides[1]}, on {num_nodes} node{'s' if num_nodes > 1 else ''}\n"
            'Ask for less with resources={"num_cpus": 1}, or train here with engine="local".'
        )
