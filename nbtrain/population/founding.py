"""A population at its beginning: found in its store, or new and tried out.

What can be refused is refused here, before any training: a metric that the validation does not give is
seen on one batch, and which hyperparameters shape the model is seen by building at the space's edges.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Subset

from nbtrain import checkpoint, data, opening
from nbtrain.arguments import SPEED
from nbtrain.checkpoint import Manifest, Snapshot
from nbtrain.errors import CheckpointError, SessionError, explain
from nbtrain.grades import NEW, Grade
from nbtrain.journal import SETTINGS
from nbtrain.judging import direction_of
from nbtrain.opening import Ground
from nbtrain.population import cluster, making
from nbtrain.population import space as spaces
from nbtrain.population.evolution import Evolution
from nbtrain.population.making import Maker
from nbtrain.population.member import NOT_ITS_FAULT, Interval, Member, score_of
from nbtrain.population.shelf import Shelf, newest_whole, parts
from nbtrain.population.table import Key, Row, Table
from nbtrain.validation import validate

# The plan of each round follows from these, and so does what the store still has of the one before.
FROZEN = (
    *("members", "interval", "mode", "quantile", "space", "metric", "direction"),
    *("factors", "resample", "seed"),
)
SAID = (*(n for n in SETTINGS if n != "lr"), *("clip_norm", "deterministic"), *SPEED)
ENGINES = ("local", "ray")
WAY_OUT = "Give what it was, or give the new one another name; the checkpoints are untouched."


@dataclass
class Founded:
    """What a population begins with in this kernel.

    Args:
        table: The rows, and what follows.
        shelf: Has the states.
        states: Those that it goes on from, read.
        parts: Of slices that were cut, as far as they had come.
        stage: The number of this stretch in one kernel.
        tests: What the test set was touched with.
        notes: In words, what is now other than it was, or worth knowing.
        grade: How good it is to go on in this process; where workers train, they tell.
    """

    table: Table
    shelf: Shelf
    states: dict[Key, Snapshot] = field(default_factory=dict)
    parts: dict[Key, Snapshot] = field(default_factory=dict)
    stage: int = 1
    tests: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    grade: Grade = NEW

    @property
    def is_new(self) -> bool:
        """Whether nothing was found."""
        return not self.shelf.manifests()


def evolution(arguments: dict[str, Any]) -> Evolution:
    """Check the arguments, make them those that are stored, and return what plans the rounds.

    Raises:
        ValueError: one of them makes no sense.
        ModuleNotFoundError: the engine's package is not installed.
    """
    if (engine := arguments["engine"]) not in ENGINES:
        raise ValueError(f"engine={engine!r} is not known. Use one of: {', '.join(ENGINES)}.")
    if engine == "ray":
        cluster.package()  # where it is missing, nothing has been touched yet
    elif arguments["resources"]:
        raise ValueError(
            f"resources={arguments['resources']!r} is for Ray's workers, and engine={engine!r} trains "
            'in this process. Leave it out, or give engine="ray".'
        )
    Interval.read(arguments["interval"])
    direction = direction_of(arguments["metric"], arguments["direction"])
    made = Evolution(
        space=spaces.read(arguments["space"]),
        members=arguments["members"],
        seed=arguments["seed"],
        mode=arguments["mode"],
        quantile=arguments["quantile"],
        factors=tuple(arguments["factors"]),
        resample=arguments["resample"],
        direction=direction,
    )
    arguments |= {
        "space": spaces.plain(made.space),
        "direction": direction,
        "factors": list(made.factors),
        "resources": cluster.check(arguments["resources"]),
        "keep": 2,
    }
    return made


def found(name: str, ground: Ground, maker: Maker, evolution: Evolution) -> Founded:
    """Return the population that is stored under this name, or else a new one.

    Raises:
        CheckpointError: what is stored is another population, or no set of checkpoints is whole.
        SessionError: what is stored is a session.
        TaskError: a new one's validation does not give the metric, or members share what is trained.
        CheckpointError, OSError: what build gives does not fit what is stored, or cannot be made here.
    """
    manifests = checkpoint.find(ground.stores, name)
    epochs = ground.arguments["epochs"]
    if not manifests:
        evolution, notes = _tried(ground, maker, evolution)
        interval = Interval.read(ground.arguments["interval"])
        if epochs is not None and interval.unit == "epochs" and interval.amount >= epochs:
            notes.append(f"an interval of {interval.amount:g} epochs is the whole run, in one round")
        shelf = Shelf(name, ground.stores, ground.budget, [], None)
        return Founded(Table(evolution, epochs), shelf, notes=notes)
    for manifest in manifests:
        if "needs" not in manifest.facts:
            raise SessionError(f"{name!r} is a session. Give the population another name.")
    newest, snapshot, states = _gone_on_from(manifests, evolution, epochs)
    state = snapshot.state
    for argument in FROZEN:
        there, here = state["arguments"][argument], ground.arguments[argument]
        if there != here:
            what = f"{argument} of the population has changed."
            raise CheckpointError(explain(what, checkpoint=there, session=here, way_out=WAY_OUT))
    maker.split = state["split"]
    evolution = replace(evolution, fixed=frozenset(state["fixed"]))
    notes = _changes(state["arguments"], ground.arguments)
    if ground.recipe is not None and snapshot.recipe != ground.recipe.source:
        notes.append("the code of build is not what it was; the new one is used")
    table = Table(evolution, epochs, map(Row.from_plain, state["rows"]))
    told = Founded(
        table,
        Shelf(name, ground.stores, ground.budget, manifests, newest),
        states,
        parts(manifests, newest, {turn.key for turn in table.left}),
        # A stage is a stretch in one process, however often its cells are run.
        newest.facts["stage"] + (state["kernel"] != opening.kernel()),
        state["tests"],
        notes,
    )
    _try_next(told, maker, ground)
    return told


def _gone_on_from(
    manifests: list[Manifest], evolution: Evolution, epochs: int | None
) -> tuple[Manifest, Snapshot, dict[Key, Snapshot]]:
    """Return the newest that is whole; where all is done, one damaged state hides no other."""
    try:
        return newest_whole(manifests)
    except CheckpointError:
        partly = newest_whole(manifests, partly=True)
        if Table(evolution, epochs, map(Row.from_plain, partly[1].state["rows"])).left:
            raise
        return partly


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say which settings are other ones from here on."""
    return [
        f"{name}: {there[name]!r} -> {here[name]!r}, as the cell says now"
        for name in SAID
        if name in there and _plain(there[name]) != _plain(here[name])
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _try_next(told: Founded, maker: Maker, ground: Ground) -> None:
    """Begin the next slice, and forget it: what build gives now must fit what is stored."""
    for turn in told.table.left[:1]:
        source = None if turn.source is None else told.states[turn.round - 1, turn.source]
        member = Member(turn.member, maker, Interval.read(ground.arguments["interval"]))
        try:
            member.begin(turn, told.parts.get(turn.key, source), told.stage)
        except NOT_ITS_FAULT:
            raise
        except Exception:  # the member's own, which is named and replaced when its slice comes
            return
        else:
            assert member.live is not None
            if ground.arguments["engine"] == "local":
                told.grade = member.live.grade
        finally:
            member.drop()


def identity(ground: Ground, maker: Maker, told: Founded) -> dict[str, Any]:
    """Return what a later kernel goes on from, besides a member's state, as plain values."""
    return {
        "kind": "population",
        "arguments": ground.arguments,
        "entry": ground.recipe.entry if ground.recipe else None,
        "problems": list(ground.recipe.problems) if ground.recipe else [],
        "kernel": opening.kernel(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "rows": told.table.plain(),
        "fixed": sorted(told.table.evolution.fixed),
        "split": maker.split,
        "tests": list(told.tests),
    }


def _tried(ground: Ground, maker: Maker, evolution: Evolution) -> tuple[Evolution, list[str]]:
    values = evolution.first()[0].hyperparameters
    try:
        read = maker.make(0, values)
    except Exception as error:
        error.add_note(f"build was tried with {values}.")
        raise
    making.refuse_shared(read.task, maker.built(values))
    source = data.source(read.task.valid, "valid", shuffle=False, collate=read.task.collate)
    few = range(min(read.valid_batch, len(source.dataset)))
    source.dataset, source.sampler = Subset(source.dataset, few), None
    words = (ground.seed, "valid")
    loader = data.Loader(source, words, data.Order(source, ground.seed), read.valid_batch, 0)
    metrics = validate(
        read.task,
        loader,
        read.valid_batch,
        seed=ground.seed,
        forward=maker.forward,
        proceed=lambda: True,
    )
    score_of(metrics or {}, ground.arguments["metric"])
    fixed = _shaping(maker, evolution, values, making.shape(read.task))
    if not fixed:
        return evolution, []
    told = f"{', '.join(sorted(fixed))}: shapes the model, so it is drawn once for each member"
    return replace(evolution, fixed=fixed), [f"{told} and travels with its weights"]


def _shaping(
    maker: Maker, evolution: Evolution, values: Mapping[str, Any], shape: list[Any]
) -> frozenset[str]:
    """Return the hyperparameters with which weights of another one's do not fit."""
    edges = {name: evolution.space[name].edges() for name in maker.given}

    def differs(changes: Mapping[str, Any]) -> bool:
        try:
            return making.shape(maker.built({**values, **changes})) != shape
        except Exception as error:
            error.add_note(f"build was tried at the edges of the space, with {dict(changes)}.")
            raise

    # All at once first: mostly there is none.
    num_edges = max(map(len, edges.values()), default=0)
    together = [{n: e[min(i, len(e) - 1)] for n, e in edges.items()} for i in range(num_edges)]
    if not any(differs(changes) for changes in together):
        return frozenset()
    return frozenset(n for n, found in edges.items() if any(differs({n: value}) for value in found))
