"""What a member is made from: `build`, called with the member's hyperparameters.

Those that `build` takes by name are given to it; the rest are settings, `lr` or `batch_size`, which
the member's journal begins with. `build` runs under one key for all members, so that a data set split
in it is split for all alike: a copied model must never have trained on what it is validated with. The
first weights are therefore the same too, for members of one shape; what tells members apart is their
hyperparameters, and their order, augmentation and dropout, which are keyed by the member.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from nbtrain import grades, randomness, task
from nbtrain.errors import DataError, TaskError
from nbtrain.forward import Forward
from nbtrain.journal import SETTINGS, Journal
from nbtrain.live import Live
from nbtrain.population.space import Domain
from nbtrain.reading import Reading
from nbtrain.recipe import Recipe
from nbtrain.task import Task

WHOLE = ("epochs", "milestones")  # settings of the population, and of no member alone


class Maker:
    """Makes members' tasks.

    Args:
        build: Returns the Task.
        space: The hyperparameters' domains.
        arguments: What the user wrote.
        device: Where members train.
        recipe: Of build, if there is one.

    Raises:
        ValueError: a hyperparameter is neither an argument of build nor a setting, or leaves what
            that setting may be.
    """

    def __init__(
        self,
        build: Callable[..., Task],
        space: Mapping[str, Domain],
        arguments: dict[str, Any],
        device: torch.device,
        recipe: Recipe | None,
    ) -> None:
        self.build, self._arguments = build, arguments
        self._code = recipe.code_sha256[:12] if recipe is not None else ""
        self.seed, self.device = arguments["seed"], device
        self.forward = Forward.of(arguments, device)
        self.given, self.settings = split(build, space)
        self._check_settings(space)
        self.split: list[Any] = []

    def make(self, member: int, hyperparameters: Mapping[str, Any]) -> Reading:
        """Build a member's task, on the device, with its data in the member's order.

        Raises:
            TaskError: build gave no Task.
            DataError: the data are split otherwise than for the members before.
        """
        built = self.built(hyperparameters)
        self.forward.prepare(built)
        if built.valid is None:
            raise TaskError(
                "Task(valid=) is None, and members are judged by their validation. Give valid=."
            )
        self._refuse_another_split(built)
        settings = {name: hyperparameters[name] for name in self.settings}
        return Reading(
            built,
            self._arguments | settings,
            seed=randomness.key(self.seed, "member", member),
            valid_seed=self.seed,  # one model has one score, whosever it is
            device=self.device,
        )

    def live(self, read: Reading) -> Live:
        """Return what will be trained of a member, at its start."""
        drop_last, clip_norm = read.source.drop_last, self._arguments["clip_norm"]
        return Live(read.task, read.journal, read.order, drop_last, self.forward, clip_norm)

    def built(self, hyperparameters: Mapping[str, Any]) -> Task:
        """Call build under its key."""
        given = {name: hyperparameters[name] for name in self.given}
        randomness.seed(self.seed, "build")
        return task.call(partial(self.build, **given))

    def fingerprint(self, model: nn.Module) -> dict[str, Any]:
        """Return what can change a bit of a member's training in this process, as plain values."""
        return grades.fingerprint(
            self.device,
            model,
            micro_batch=None,  # a copy may have another batch size on purpose
            num_workers=self._arguments["num_workers"] or 0,
            recipe=self._code,
            precision=self.forward.precision,
            channels_last=self.forward.channels_last,
        )

    def _refuse_another_split(self, built: Task) -> None:
        split = [_split(built.train), _split(built.valid)]
        self.split = self.split or split
        if split != self.split:
            raise DataError(
                "build splits its data otherwise for other hyperparameters, or than before: "
                "a copied model would be validated with what it was trained on.\n"
                f"  before: {self.split}\n  now:    {split}\n"
                "Give random_split a generator of its own: torch.Generator().manual_seed(0)."
            )

    def _check_settings(self, space: Mapping[str, Domain]) -> None:
        first = {name: self._arguments.get(name) for name in SETTINGS}
        first["batch_size"] = first["batch_size"] or 1  # the DataLoader's, which is not known yet
        for name in self.settings:
            for value in space[name].edges():
                Journal(first | {name: value}, [1.0])


def split(build: Callable[..., Any], names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which names build takes, and which are settings.

    Raises:
        ValueError: one is neither.
    """
    parameters = inspect.signature(build).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = tuple(names)
    given = tuple(name for name in names if takes_all or name in taken)
    settings = tuple(name for name in names if name not in given)
    for name in settings:
        if name not in SETTINGS or name in WHOLE:
            raise ValueError(_unknown(name, taken))
    return given, settings


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what each group of an optimizer was built with, besides its parameters."""
    return [
        {
            name: float(value) if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


def set_option(group: dict[str, Any], name: str, value: Any) -> None:
    """Let a group have an option, in the tensor that it is in where it is in one."""
    if isinstance(group.get(name), torch.Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def refuse_shared(one: Task, other: Task) -> None:
    """Refuse two builds that have something in common that is trained: members would train each other.

    Raises:
        TaskError: names it.
    """
    theirs = {id(p) for p in other.model.parameters() if p.requires_grad}
    shared = [f"the parameter {n!r}" for n, p in one.model.named_parameters() if id(p) in theirs]
    if one.optimizer is other.optimizer:
        shared.append("the optimizer")
    shared += [f"the part {n!r}" for n, p in one.parts.items() if other.parts.get(n) is p]
    if shared:
        raise TaskError(
            f"build gives two members the same {shared[0].removeprefix('the ')}, made outside of it or "
            "cached. Make it inside of build; only data may be shared, and what nothing trains."
        )


def shape(built: Task) -> list[Any]:
    """Return what must agree for one task's weights to fit into another."""
    groups = [len(group["params"]) for group in built.optimizer.param_groups]
    tensors = built.model.state_dict().items()
    return [
        groups,
        type(built.optimizer).__name__,
        [(n, tuple(v.shape), str(v.dtype)) for n, v in tensors if isinstance(v, torch.Tensor)],
    ]


def _split(given: Any) -> list[Any]:
    """Return the length of some data, and which samples they are of a larger set."""
    dataset = given.dataset if isinstance(given, DataLoader) else given
    found: list[Any] = [len(dataset) if hasattr(dataset, "__len__") else None]
    while isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices, dtype=np.int64)
        found.append(sha256(indices.tobytes()).hexdigest()[:12])
        dataset = dataset.dataset
    return found


def _unknown(name: str, taken: Iterable[str]) -> str:
    settings = [setting for setting in SETTINGS if setting not in WHOLE]
    near = difflib.get_close_matches(name, [*taken, *settings], 1, 0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return (
        f"space has {name!r}, which build does not take, and which is no setting. {hint}"
        f"build takes: {', '.join(taken) or 'nothing'}; settings: {', '.join(settings)}."
    )
