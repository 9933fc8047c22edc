"""Parameters that come and go between stages: a backbone unfrozen, another head.

`Task(fresh=["head.*"])` names what may differ from the checkpoint. It says what may, not what shall: a
parameter that fits goes on as it was, so the cell can be run again. What does not fit begins afresh, as
`build` has made it, without moments; all other weights and moments stay to the bit. The checkpoint is
changed on its way in, and then put back whole or not at all, as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from nbtrain import parts, trees
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import CheckpointError, explain
from nbtrain.journal import Journal
from nbtrain.task import Task

MAX_TOLD = 4  # names in one line


def fitted(found: Snapshot, task: Task) -> tuple[Snapshot, dict[str, str]]:
    """Return the snapshot as the task can take it, and in words what was changed in it, by kind.

    Kinds are "weights afresh", "moments afresh", "weights gone", "moments gone". Without
    `task.fresh`, or where everything fits, the snapshot is the one given.

    Raises:
        CheckpointError: the optimizer differs in what `fresh` does not name.
    """
    if not task.fresh:
        return found, {}
    trees_of = found.state["trees"]
    there, here = parts.weights(found.model, trees_of), dict(task.model.state_dict())
    late = parts.bound(task.model, trees_of)  # whose form says nothing
    named = [n for n in {**there, **here} if n not in late and _is_named(n, task.fresh)]
    anew = [n for n in named if n in here and parts.form(there, n) != parts.form(here, n)]
    gone = [n for n in named if n not in here]
    saved = trees.restore(trees_of["optimizer"], found.tensors)
    optimizer, without, dropped = _optimizer(saved, trees_of, task, anew)
    told = {
        "weights afresh": _words(anew),
        "moments afresh": _words([name for name in without if name not in anew]),
        "weights gone": _words(gone),
        "moments gone": _words([name for name in dropped if name not in gone]),
    }
    told = {kind: names for kind, names in told.items() if names}
    if not told:
        return found, {}
    state = {n: v for n, v in there.items() if n not in gone} | {n: here[n] for n in anew}
    model: dict[str, Tensor] = {}
    tensors = {n: t for n, t in found.tensors.items() if not n.startswith("optimizer/")}
    grown = trees_of | {
        "model": {name: trees.flatten(value, name, model) for name, value in state.items()},
        "tied": parts.tied(here),
        "optimizer": trees.flatten(optimizer, "optimizer", tensors),
    }
    if task.ema is not None and "ema" in trees_of:  # which names what it averages as module.*
        averaged, built = trees.restore(trees_of["ema"], found.tensors), task.ema.state_dict()
        averaged = {n: v for n, v in averaged.items() if n.removeprefix("module.") not in gone}
        averaged |= {f"module.{name}": built[f"module.{name}"] for name in anew}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema/")}
        grown["ema"] = trees.flatten(averaged, "ema", tensors)
    made = replace(found, model=model, tensors=tensors, state=found.state | {"trees": grown})
    return made, told


def note(
    told: Mapping[str, str], journal: Journal, step: int, progress: float, group_lrs: Sequence[float]
) -> list[str]:
    """Write into the journal what `fitted` has told, and the rates of other groups; say it in words."""
    for kind, names in told.items():
        journal.note(step, progress, "cell", kind, "", names)
    if len(group_lrs) != len(journal.group_lrs):
        journal.rebase(step, progress, "cell", group_lrs)
    return [f"{kind}: {names}, as Task(fresh=) says" for kind, names in told.items()]


def count(journal: Journal) -> int:
    """Return how often weights have come or gone; the best of before may fit the model no more."""
    return len({e.step for e in journal.entries if e.what in ("weights afresh", "weights gone")})


def _optimizer(
    saved: dict[str, Any], trees_of: Mapping[str, Any], task: Task, anew: Sequence[str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the optimizer's state over the task's parameters, whose moments are new, whose gone."""
    groups = parts.parameter_names(task)
    if "optimizer_names" not in trees_of:  # of an older nbtrain; its order is all that is known
        known = [n for n, p in task.model.named_parameters() if n not in anew]
        raise CheckpointError(
            explain(
                "The checkpoint does not say which parameters its optimizer held.",
                checkpoint=f"{sum(len(g['params']) for g in saved['param_groups'])} parameters",
                session=f"{len(known)} parameters that are not named in fresh=",
                way_out="Open the session as it was with this nbtrain, save(), then change it.",
            )
        )
    before = _places(trees_of["optimizer_names"])
    built = task.optimizer.state_dict()["param_groups"]
    state = {key: kept for key, kept in saved["state"].items() if not isinstance(key, int)}
    param_groups, without, index = [], [], 0
    for names, group in zip(_places(groups, nested=True), built, strict=True):
        mine: dict[str, Any] = {}
        for name in names:
            if name in before and name not in anew:
                number, old = before[name]
                mine = mine or saved["param_groups"][number]
                if old in saved["state"]:
                    state[index] = saved["state"][old]
            else:
                without.append(name)
            index += 1
        param_groups.append({**group, **mine, "params": group["params"]})
    held = {name for names in _places(groups, nested=True) for name in names}
    dropped = [name for name in before if name not in held]
    for name in (*without, *dropped):
        if not _is_named(name, task.fresh):
            sides = ["held" if name in side else "not held" for side in (before, held)]
            raise CheckpointError(
                explain(
                    f"The optimizer does not fit at {name!r}.",
                    checkpoint=sides[0],
                    session=sides[1],
                    way_out=f"Name it too, fresh=[..., {name!r}], or make the optimizer as it was.",
                )
            )
    return {"state": state, "param_groups": param_groups}, without, dropped


def _places(groups: Sequence[Sequence[str | None]], *, nested: bool = False) -> Any:
    """Give each parameter a name, also one that is not the model's: by its number among those.

    Returns:
        The names, a list a group; or by name (group, index in the optimizer).
    """
    count, others, named, found = 0, 0, [], {}
    for number, group in enumerate(groups):
        names = []
        for name in group:
            if name is None:
                name, others = f"parameter {others} besides the model's", others + 1
            names.append(name)
            found[name] = number, count
            count += 1
        named.append(names)
    return named if nested else found


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _words(names: Sequence[str]) -> str:
    if len(names) <= MAX_TOLD:
        return ", ".join(names)
    return f"{', '.join(names[: MAX_TOLD - 1])} ... {names[-1]} ({len(names)})"
