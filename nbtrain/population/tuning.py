"""The same task for Ray Tune, with its own schedulers and searchers: ASHA, Optuna, its PBT.

A trial trains by the very loop of a population's member, and reports after each interval what its
validation gave, with a checkpoint of everything: weights, optimizer, parts, journal, place. One that
Tune pauses, restarts or restores goes on from there as if it had not been cut; and where Tune's PBT
lets it go on from another trial's checkpoint with another config, that config acts.

The random key of a trial is made of the seed and of its number, the end of Tune's trial id, so that a
copied trial does not see its donor's batches again.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nbtrain import checkpoint, randomness, recipe
from nbtrain.arguments import ARGUMENTS, check, shared
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import RecipeError
from nbtrain.forward import chosen, use_tf32
from nbtrain.population.cluster import package
from nbtrain.population.evolution import Turn
from nbtrain.population.making import Maker
from nbtrain.population.member import Interval, Member, Taken
from nbtrain.population.table import Row
from nbtrain.recipe import Recipe
from nbtrain.stores import FolderStore
from nbtrain.task import Task

NAME = "trial"  # of the folder in each checkpoint's


@dataclass(frozen=True)
class Only:
    """The domain of a hyperparameter that Tune has chosen already."""

    value: Any

    def edges(self) -> tuple[Any, ...]:
        """Return the one value."""
        return (self.value,)


@dataclass(frozen=True)
class Plan:
    """What all trials have in common, as plain values: it travels to Tune's processes."""

    recipe: Recipe
    arguments: dict[str, Any]
    interval: Interval
    metric: str
    device: str | None


def tune_trainable(
    build: Callable[..., Task],
    *,
    metric: str = "valid_loss",
    epochs: int | None = None,
    interval: str | float = 1,
    batch_size: int | None = None,
    accumulate: int = 1,
    num_workers: int | None = None,
    seed: int = 0,
    warmup_epochs: float = 0,
    warmup: str = "linear",
    decay: str = "constant",
    milestones: tuple[float, ...] = (),
    gamma: float = 0.1,
    clip_norm: float | None = None,
    device: str | torch.device | None = None,
    deterministic: bool = False,
    **options: Any,
) -> Callable[[dict[str, Any]], None]:
    """Return a function for `ray.tune.Tuner`: trains what build gives, with a trial's config.

    A name in the config is an argument of build, or a setting such as lr or batch_size. Each report
    has the validation's metrics, and epoch, progress, step, lr and loss. The checkpoint's folder holds
    `trial/*/model.safetensors`.

    Args:
        build: Returns the Task, with validation data.
        metric: What the Tuner will go by: refused here where the validation does not give it.
        epochs: Length of a trial; None trains until Tune stops it.
        interval: Training between two reports: "1 epoch", "500 steps", or a number of epochs.
        device: None is the GPU if Tune gives the trial one.
        batch_size, accumulate, num_workers, seed, warmup_epochs, warmup, decay, milestones, gamma,
            clip_norm, deterministic: As for `Session`.
        **options: precision, channels_last, compile, tf32, and what else `Schedule` takes.

    Raises:
        ValueError: an argument makes no sense.
        RecipeError: what build needs cannot be kept as text, and Tune's processes have nothing else.
        ModuleNotFoundError: Ray Tune is not installed.
    """
    arguments = {k: v for k, v in locals().items() if k in ARGUMENTS} | shared(options)
    check(arguments | {"keep": 2, "save_every": None})
    every = Interval.read(interval)
    found = recipe.capture(build)
    if found.problems:
        raise RecipeError(
            "A trial of Ray Tune cannot build the task, because the recipe is not complete:\n  "
            + "\n  ".join(found.problems)
        )
    package("ray.tune")  # here, and not at hour one in another process
    plan = Plan(found, arguments, every, metric, None if device is None else str(device))

    def trainable(config: dict[str, Any]) -> None:
        train(plan, config)

    trainable.__name__ = found.entry  # what Tune calls its trials by
    return trainable


def train(plan: Plan, config: dict[str, Any]) -> None:
    """Train a trial inside of Tune, from the checkpoint that Tune gives it if it does.

    Raises:
        ValueError: a name in the config is neither an argument of build nor a setting.
        CheckpointError: the checkpoint does not fit: a hyperparameter that shapes the model is another.
        LossError: the loss is not finite.
        DataError: the data set raised, or is split otherwise than where the checkpoint comes from.
    """
    tune = package("ray.tune")
    trial = int(re.sub(r"^.*\D", "", tune.get_context().get_trial_id()) or 0)
    if plan.arguments["deterministic"]:
        randomness.deterministic()
    device = chosen(plan.device)
    use_tf32(plan.arguments["tf32"], device)
    space: dict[str, Any] = {name: Only(value) for name, value in config.items()}
    maker = Maker(plan.recipe.load(NAME), space, plan.arguments, device, plan.recipe)
    member = Member(trial, maker, plan.interval)
    found = _found(tune)
    turn = Turn(0, trial, None, config)
    if found is not None:
        maker.split = found.state["split"]
        turn = Turn(found.facts["round"] + 1, trial, found.facts["trial"], config)
    stage = 1 if found is None else found.facts["stage"] + 1
    try:
        member.begin(turn, found, stage)
        assert member.live is not None
        while not member.live.is_done:
            done = member.slice(plan.metric, lambda what: True, lambda what, s: None, time.monotonic)
            assert done is not None
            _report(tune, member, maker, *done)
            turn = Turn(turn.round + 1, trial, trial, config)
            member.go_on(turn)
    finally:
        member.drop()


def _found(tune: Any) -> Snapshot | None:
    """Return what Tune gives to go on from."""
    given = tune.get_checkpoint()
    if given is None:
        return None
    with given.as_directory() as folder:
        _, snapshot = checkpoint.load_newest(checkpoint.find([FolderStore(folder)], NAME))
    return snapshot


def _report(tune: Any, member: Member, maker: Maker, row: Row, taken: Taken) -> None:
    live = member.live
    assert live is not None
    model, tensors, state = taken
    facts: dict[str, Any] = {
        "step": row.step,
        "stage": live.stage,
        "progress": row.progress,
        "valid_loss": row.metrics.get("valid_loss"),
        "round": row.round,
        "trial": row.member,
    }
    snapshot = Snapshot(row.round + 1, model, tensors, state | {"split": maker.split}, "", facts)
    told = {
        "epoch": row.epoch,
        "progress": row.progress,
        "step": row.step,
        "lr": live.lr,
        "loss": live.loss,
        **{name: math.nan if value is None else value for name, value in row.metrics.items()},
    }
    with TemporaryDirectory() as folder:
        checkpoint.commit(FolderStore(folder), NAME, snapshot)
        tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))
