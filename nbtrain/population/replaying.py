"""A schedule of hyperparameters, trained by one session from its start: what a population has found.

A schedule is a list of (progress, {name: value}), the first at 0. At each place, between two windows,
its values come into force: settings, such as batch_size, as a change in the journal; what `build` takes
by seeing what it means for the optimizer, and giving its groups that. Both are what a member does when
it copies and explores.

What is not replayed, because one model and its data are built once: a hyperparameter that changes on
the way and of which `build` makes something else than an option of the optimizer. It is refused.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from nbtrain import randomness, task, trees
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import SessionError
from nbtrain.journal import Journal
from nbtrain.live import Live
from nbtrain.population import making

SHAPE_OF_IT = "Give what Population.schedule is: [(0.0, {name: value}), (progress, {...}), ...]."


def read(schedule: Any) -> list[list[Any]] | None:
    """Return a schedule as plain values, and None for none.

    Raises:
        ValueError: it is none.
    """
    if schedule is None:
        return None
    try:
        plain: list[list[Any]] = [[float(at), dict(values)] for at, values in schedule]
        json.dumps(plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"replay={schedule!r} is no schedule: {error}. {SHAPE_OF_IT}") from error
    places = [at for at, _ in plain]
    good = places and places[0] == 0 and places == sorted(set(places)) and places[-1] < math.inf
    if not good or any(values.keys() != plain[0][1].keys() for _, values in plain):
        raise ValueError(
            f"replay={schedule!r} must begin at 0, rise, and name the same in each entry. {SHAPE_OF_IT}"
        )
    return plain


class Replay:
    """What a session follows.

    Args:
        build: Takes hyperparameters by name.
        schedule: As `read` gives it.
        seed: Of the session, under whose key `build` is called.

    Raises:
        ValueError: a name is neither an argument of build nor a setting.
    """

    def __init__(self, build: Callable[..., task.Task], schedule: list[list[Any]], seed: int) -> None:
        self._build, self._seed = build, seed
        self._places = [at for at, _ in schedule]
        values = [each for _, each in schedule]
        given, settings = making.split(build, values[0])
        self._given = [{name: each[name] for name in given} for each in values]
        self._settings = [{name: each[name] for name in settings} for each in values]
        self._options: list[list[dict[str, Any]]] = []
        self._at = 0

    @property
    def first(self) -> dict[str, Any]:
        """The settings that the session begins with."""
        return self._settings[0]

    def built(self, given: Mapping[str, Any] | None = None) -> task.Task:
        """Call build, as it is at the start if nothing else is given."""
        randomness.seed(self._seed, "build")
        return task.call(partial(self._build, **(self._given[0] if given is None else given)))

    def check(self, made: task.Task, journal: Journal) -> None:
        """See what all entries mean, and refuse what cannot be replayed.

        Args:
            made: What `built` gave for the start.
            journal: As the session begins.

        Raises:
            SessionError: a hyperparameter that changes acts elsewhere than in the optimizer.
            ValueError: a setting makes no sense.
        """
        for settings in self._settings:
            journal.tried(**settings)
        shape, options = making.shape(made), making.options(made.optimizer)
        for name in self._given[0]:
            other = next((g[name] for g in self._given if g[name] != self._given[0][name]), None)
            if other is None:
                continue
            tried = self.built({**self._given[0], name: other})
            if making.shape(tried) != shape or making.options(tried.optimizer) == options:
                raise SessionError(
                    f"{name!r} changes on the way, from {self._given[0][name]!r} to {other!r}, and is "
                    "no option of the optimizer: one session cannot replay it.\n"
                    "Let it stay: [(at, {**values, "
                    + repr(name)
                    + ": ...}) for at, values in schedule]."
                )
        known = {json.dumps(self._given[0]): options}
        for given in self._given:
            word = json.dumps(given)
            if word not in known:
                known[word] = making.options(self.built(given).optimizer)
            self._options.append(known[word])

    def adopt(self, optimizer: torch.optim.Optimizer, found: Snapshot) -> None:
        """Have what a checkpoint has of the options that change: they differ on purpose."""
        moving = {
            name
            for options in self._options
            for first, group in zip(self._options[0], options, strict=True)
            for name, value in group.items()
            if value != first[name]
        }
        saved = trees.restore(found.state["trees"]["optimizer"], found.tensors)["param_groups"]
        for group, before in zip(optimizer.param_groups, saved, strict=False):
            for name in moving & before.keys():
                making.set_option(group, name, before[name])

    def rewind(self, progress: float) -> None:
        """Be where a session is that was loaded: the entry just here may not be in force yet."""
        self._at = max(sum(at < progress for at in self._places) - 1, 0)

    def follow(self, live: Live) -> None:
        """Let the values of this place come into force, if others are."""
        now = bisect_right(self._places, live.progress) - 1
        if now == self._at:
            return
        before, self._at = self._at, now
        place = live.step, live.progress
        for name, value in self._given[now].items():
            live.journal.note(*place, "replay", name, self._given[before][name], value)
        then, new = self._options[before], self._options[now]
        for group, was, wanted in zip(live.task.optimizer.param_groups, then, new, strict=True):
            for name, value in wanted.items():
                if value != was[name]:
                    making.set_option(group, name, value)
        rates = [group["lr"] for group in new]
        if rates != live.journal.group_lrs:
            live.journal.rebase(*place, "replay", rates)
        live.journal.edit(*place, "replay", **self._settings[now])


def of(
    build: Callable[..., task.Task] | None, schedule: list[list[Any]] | None, seed: int
) -> Replay | None:
    """Return what follows a schedule, if there is one.

    Raises:
        ValueError: there is no build, or a name is neither an argument of it nor a setting.
    """
    if schedule is None:
        return None
    if build is None:
        raise ValueError("replay= goes with build, which takes the hyperparameters by name.")
    return Replay(build, schedule, seed)
