"""What a session may be told, and what of it makes sense."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from nbtrain import journal, task
from nbtrain.budget import seconds
from nbtrain.errors import near
from nbtrain.forward import PRECISIONS
from nbtrain.journal import OPTIONS, SETTINGS
from nbtrain.judging import Judging
from nbtrain.reading import DEFAULT_BATCH

ARGUMENTS = (
    *(name for name in SETTINGS if name != "lr"),
    *("num_workers", "seed", "clip_norm", "keep", "save_every", "budget", "deterministic", "replay"),
    *("precision", "channels_last", "compile", "tf32"),
    *("metric", "direction", "patience", "validate_every"),
)
SPEED = {"precision": "fp32", "channels_last": False, "compile": False, "tf32": None}
SHARED = SPEED | dict.fromkeys((*OPTIONS, "plateau_patience"))  # by all members of a population
OF_POPULATION = (
    *("members", "interval", "space", "quantile", "mode", "factors", "resample"),
    *("engine", "resources"),
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> None:
    """Refuse a name that is no plain folder name, such as "../x"."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"name={name!r} is no name for a session. Use letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )


def check(arguments: dict[str, Any]) -> None:
    """Refuse what makes no sense before `build` is called, which may take minutes."""
    keep, seed, clip_norm = (arguments[name] for name in ("keep", "seed", "clip_norm"))
    if type(arguments.get("deterministic", False)) is not bool:
        raise ValueError(f"deterministic={arguments['deterministic']!r} must be True or False.")
    if type(keep) is not int or keep < 2:
        raise ValueError(
            f"keep={keep!r} must be a whole number from 2 up: one damaged file is then not the end."
        )
    if type(seed) is not int:
        raise ValueError(f"seed={seed!r} must be a whole number.")
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
        raise ValueError(f"clip_norm={clip_norm!r} must be a number above 0, or None.")
    check_speed(arguments)
    Judging.of(arguments)
    seconds(arguments["save_every"])
    settings = {name: arguments.get(name) for name in SETTINGS}
    if settings["batch_size"] is None:  # the DataLoader's, which is not known yet
        settings["batch_size"] = DEFAULT_BATCH
    journal.check(settings)


def traced(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what shapes a run and is no setting of its journal, as plain values of one spelling."""
    judging = Judging.of(arguments)
    every = None
    if judging.every is not None:
        amount, unit = judging.every
        every = f"{amount} {unit if amount > 1 else unit[:-1]}"
    return {
        "clip_norm": arguments.get("clip_norm"),
        "metric": judging.metric,
        "direction": judging.direction,
        "patience": judging.patience,
        "validate_every": every,
    }


def shared(given: dict[str, Any]) -> dict[str, Any]:
    """Return the further arguments that all members share: those that are given, and the rest of them.

    Raises:
        ValueError: one is no such argument.
    """
    for name in given.keys() - SHARED.keys():
        if name in ARGUMENTS:
            raise ValueError(f"{name}= is an argument of Session alone. Leave it out.")
        rate = "or of the space, where members differ in it"
        raise _unknown(name, (*ARGUMENTS, *OF_POPULATION), "Population", rate)
    return SHARED | given


def check_speed(given: dict[str, Any]) -> None:
    """Refuse a speed that makes no sense; what is not given is off."""
    arguments: dict[str, Any] = SPEED | given
    precision, compile = arguments["precision"], arguments["compile"]
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known. Use one of: {', '.join(PRECISIONS)}.")
    if type(arguments["channels_last"]) is not bool:
        raise ValueError(f"channels_last={arguments['channels_last']!r} must be True or False.")
    if arguments["tf32"] not in (True, False, None) or type(arguments["tf32"]) is int:
        raise ValueError(f"tf32={arguments['tf32']!r} must be True, False, or None: as torch is.")
    if type(compile) is not bool:
        try:
            json.dumps(dict(compile))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"compile={compile!r} must be True, False, or a dict of torch.compile's arguments in "
                'plain values: {"mode": "max-autotune"}.'
            ) from error


def task_of(build: Callable[[], task.Task] | None, fields: dict[str, Any]) -> task.Task:
    """Return what `build` gives, or what its fields make.

    Raises:
        ValueError: a field is none, or stands beside build.
        TaskError: it cannot be trained.
    """
    known = task.Task.__dataclass_fields__
    for name in fields:
        if name not in known:
            raise _unknown(name, (*ARGUMENTS, *known), "Session", "or session.set(lr=...) from here on")
    if build is not None:
        if fields:
            belong = "belongs" if len(fields) == 1 else "belong"
            raise ValueError(f"{', '.join(fields)} {belong} into the Task that build returns.")
        return task.call(build)
    if not {"model", "optimizer", "train"} <= fields.keys():
        raise ValueError("Give build, or at least model=, optimizer= and train=.")
    return task.Task(**fields).check()


def _unknown(name: str, known: tuple[str, ...], kind: str, rate: str) -> ValueError:
    if name == "lr":
        return ValueError(f"There is no argument lr=. The rate is the optimizer's, in build; {rate}.")
    meant = near(name, known)
    hint = f"Did you mean {meant}=?" if meant else f"See help(nbtrain.{kind})."
    return ValueError(f"There is no argument {name}=. {hint}")
