"""A worker: a process somewhere that does slices of a population, one after the other.

It is given plain values and the text of the recipe, and nothing of the notebook: a slice is a function
of these, of its turn and of the state that it begins with. So it is the same in any worker, and is
done again where one is lost. It computes as the cell would that runs the population: with as many
threads, and by the same switches of torch.

Nothing of Ray is in here: `cluster` makes such a worker an actor.
"""

from __future__ import annotations

import copy
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch

from nbtrain import randomness
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import LossError, NbtrainError, TaskError
from nbtrain.grades import NEW, Grade
from nbtrain.population import space as spaces
from nbtrain.population.evolution import Turn
from nbtrain.population.making import Maker
from nbtrain.population.member import NOT_ITS_FAULT, Interval, Member, why
from nbtrain.population.table import Row
from nbtrain.recipe import Recipe
from nbtrain.thread import Settings

PLAIN = (str, bytes, int, float, type(None))


class Switches:
    """What bits depend on besides a slice's own values, as it is in this process."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._precision = torch.get_float32_matmul_precision()
        self._is_deterministic = torch.are_deterministic_algorithms_enabled()
        self._only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
        self._dtype = torch.get_default_dtype()
        cudnn = torch.backends.cudnn
        self._cudnn = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
        self.of_thread = Settings()
        self.of_thread.cuda = None  # which of the GPUs is not for the cell to say

    def throw(self) -> None:
        """Let them be this process's; the thread's own are entered besides."""
        torch.set_num_threads(self._threads)
        torch.set_float32_matmul_precision(self._precision)
        torch.use_deterministic_algorithms(self._is_deterministic, warn_only=self._only_warns)
        torch.set_default_dtype(self._dtype)
        cudnn = torch.backends.cudnn
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = self._cudnn


@dataclass(frozen=True)
class Kit:
    """All that a worker is given, as plain values.

    Args:
        name: The population's.
        recipe: Makes `build`.
        space: The domains, plain.
        arguments: What the user wrote.
        split: How the data are split, which must not differ between members.
        device: "cpu" or "cuda".
        stage: The number of this stretch in one kernel.
    """

    name: str
    recipe: Recipe
    space: dict[str, list[Any]]
    arguments: dict[str, Any]
    split: list[Any]
    device: str
    stage: int
    switches: Switches = field(default_factory=Switches)


@dataclass(frozen=True)
class Outcome:
    """What became of a slice; its state goes beside it.

    Args:
        row: Of a slice that is over, also by a failure; None where it was cut.
        error: What the member failed with; without a row, what ends the training.
        costs: The longest window and validation, in seconds.
        grade: How good it was to go on from the state that it began with.
    """

    row: Row | None = None
    error: Exception | None = None
    costs: dict[str, float] = field(default_factory=dict)
    grade: Grade = NEW


class Worker:
    """Does slices."""

    def __init__(self) -> None:
        self._cut: int | None = None

    def enter(self, kit: Kit) -> tuple[str, Exception | None]:
        """Make ready; return in words what this computes with, and what was wrong with it."""
        self._kit = kit
        self._interval = Interval.read(kit.arguments["interval"])
        device = torch.device(kit.device)
        kit.switches.throw()
        try:
            if kit.arguments.get("deterministic"):
                randomness.deterministic()  # cuBLAS reads the environment, which does not travel
            build = kit.recipe.load(kit.name)
            self._maker = Maker(build, spaces.from_plain(kit.space), kit.arguments, device, kit.recipe)
        except Exception as error:
            return "", sendable(error)
        self._maker.split = kit.split
        return computer(device), None

    def slice(self, number: int, turn: Turn, found: Snapshot | None) -> tuple[Outcome, Any]:
        """Do a slice from a state, or from a part of it; return what became of it, and its state.

        Args:
            number: What `cut` calls it.
            turn: What to do.
            found: Where to begin; None begins afresh.
        """
        # Torch counts threads for each thread anew, and this is not the one that entered.
        self._kit.switches.throw()
        costs: dict[str, float] = {}

        def observe(what: str, took_s: float) -> None:
            costs[what] = max(took_s, costs.get(what, 0.0))

        member = Member(turn.member, self._maker, self._interval)
        try:
            with self._kit.switches.of_thread.applied():
                member.begin(turn, found, self._kit.stage)
                assert member.live is not None
                place, grade = member.live.place, member.live.grade
                metric = self._kit.arguments["metric"]
                done = member.slice(metric, lambda what: self._cut != number, observe, time.monotonic)
                if done is None:
                    return Outcome(costs=costs, grade=grade), _part(member, place)
            row, taken = done
            return Outcome(row, costs=costs, grade=grade), Snapshot(0, *taken, "", {})
        except NOT_ITS_FAULT as error:
            return Outcome(error=sendable(error), costs=costs), None
        except Exception as error:
            row = Row.of(turn, error=why(error))
            return Outcome(row, sendable(error), costs), None
        finally:
            member.drop()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # others may share the device

    def cut(self, number: int) -> None:
        """End a slice at the next boundary; it may be called while one is done."""
        self._cut = number


def computer(device: torch.device) -> str:
    """Return what decides the bits of a worker, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"torch {torch.__version__} on {name}"


def sendable(error: Exception) -> Exception:
    """Return an exception that can be raised in another process, with its traceback as a note."""
    error.add_note("In the worker:\n" + "".join(traceback.format_exception(error)).rstrip())
    is_foreign = type(error).__module__.startswith(("nbtrain_recipe_", "__main__"))
    is_foreign = is_foreign or "<locals>" in type(error).__qualname__
    is_foreign = is_foreign or not all(isinstance(arg, PLAIN) for arg in error.args)
    try:
        copy.deepcopy(error)  # by the protocol that would carry it
    except Exception:  # its class has its own mind about that, or holds what cannot travel
        is_foreign = True
    if not is_foreign:
        return error
    # Of ours, the nearest kind: a data set's error is no member's fault there either.
    kind: type[Exception] = next(
        (k for k in type(error).__mro__ if k.__module__ == NbtrainError.__module__), TaskError
    )
    told = kind(why(error))
    told.__notes__ = error.__notes__
    return told


def _part(member: Member, begun: Any) -> Snapshot | None:
    """Return what is done of a slice that was cut; None where that is spoilt, or nothing."""
    live = member.live
    assert live is not None
    live.go_back()
    if live.place == begun:
        return None
    try:
        return Snapshot(0, *member.take(), "", {"step": live.step, "progress": live.progress})
    except LossError:  # it is begun again, and fails where that is heard
        return None
