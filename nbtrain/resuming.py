"""One line in a fresh kernel: find a session, show it, rebuild it from its recipe, go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbtrain import checkpoint, host, judging, opening
from nbtrain.arguments import ARGUMENTS, check_name
from nbtrain.checkpoint import Manifest
from nbtrain.errors import CheckpointError, RecipeError, SessionError, TrustError
from nbtrain.population.population import Population
from nbtrain.recipe import Recipe
from nbtrain.session import Session


def resume(
    name: str | None = None,
    build: Callable[[], Any] | None = None,
    *,
    store: Any = None,
    trust_code: bool = False,
    at_least: int | None = None,
    **changes: Any,
) -> Session | Population:
    """Open a stored session or population with the settings it had, ready to `run()`.

    Without `build` it is rebuilt from the recipe that is stored with it, once you have said
    `trust_code=True`; without that word you are shown what was found and nothing of it is run.

    Args:
        name: The session; None takes the only one there is.
        build: Your own code for it, as given to `Session`; needs no trust.
        store: Where to look, as for `Session`.
        trust_code: Whether the stored recipe may run.
        at_least: The step that the newest checkpoint must have reached, where a listing may be old.
        **changes: Arguments of `Session` that shall differ, such as budget="4h" or num_workers=2; or
            of `Population`.

    Raises:
        SessionError: there is no such session, none so far on, or several to choose from; or it is a
            trial of Ray Tune.
        TrustError: it would run stored code; the message shows what was found, and the code.
        RecipeError: what is stored cannot rebuild it; says why.
    """
    places = opening.stores(store, host.detect())
    name = _only_one(places) if name is None else name
    found = _found(name, places)
    manifest, state, source = _readable(found)
    _check_far_enough(name, manifest, at_least)
    if "entry" not in state:
        raise SessionError(
            f"{name!r} is a trial of Ray Tune, which alone goes on with it: Tuner.restore(path, ...). "
            f"Its weights are plain: safetensors.torch.load_file of {manifest.path(checkpoint.MODEL)}."
        )
    if build is None:
        stored = Recipe(source, state["entry"] or "", tuple(state["problems"]))
        _check_recipe(name, stored)
        if not trust_code:
            raise TrustError(_shown(name, store, manifest, checkpoint.best_of(found), stored))
        build = stored.load(name)
    if state.get("kind") == "population":
        return Population.reopened(name, build, state["arguments"], store=store, **changes)
    arguments = {k: v for k, v in state["arguments"].items() if k in ARGUMENTS}
    return Session(name, build, store=store, **(arguments | changes))


def _found(name: str, places: list[Any]) -> list[Manifest]:
    check_name(name)
    if found := checkpoint.find(places, name):
        return found
    there = ", ".join(checkpoint.sessions(places)) or "no session at all"
    raise SessionError(
        f"There is no session {name!r} in {places[-1].place}; there is: {there}.\n"
        "Check the name, give store=, or attach the output that holds it."
    )


def _check_far_enough(name: str, newest: Manifest, at_least: int | None) -> None:
    if at_least is not None and newest.facts["step"] < at_least:
        raise SessionError(
            f"The newest checkpoint of {name!r} is not as far as it should be.\n"
            f"  in checkpoint: step {newest.facts['step']}\n"
            f"  in session:    at least step {at_least}\n"
            "A mounted folder may show an old listing: mount it again, or lower at_least."
        )


def _only_one(places: list[Any]) -> str:
    names = checkpoint.sessions(places)
    if len(names) == 1:
        return names[0]
    what = f"are {len(names)} sessions: {', '.join(names)}," if names else "is no session"
    raise SessionError(
        f"There {what} in {places[-1].place}. "
        + ("Say which: nbtrain.resume(name)." if names else "Give store=, or start one.")
    )


def _readable(found: list[Manifest]) -> tuple[Manifest, dict[str, Any], str]:
    problems = []
    for manifest in found:
        try:
            return manifest, checkpoint.state(manifest), checkpoint.recipe(manifest)
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("No checkpoint can be read:\n  " + "\n  ".join(problems))


def _check_recipe(name: str, stored: Recipe) -> None:
    if not stored.entry:
        raise RecipeError(
            f"{name!r} was trained by a loop of its own and keeps no recipe. "
            "Run the cells that made it; the session goes on by itself."
        )
    if stored.problems:
        raise RecipeError(
            f"The recipe of {name!r} is not complete:\n  "
            + "\n  ".join(stored.problems)
            + f"\nDefine build in this kernel and say nbtrain.resume({name!r}, build)."
        )


def _shown(name: str, store: Any, newest: Manifest, best: Manifest | None, stored: Recipe) -> str:
    facts = newest.facts
    judged = judging.score(best.facts) if best else None
    metric = "validation loss" if judged and judged[0] == "valid_loss" else judged and judged[0]
    score = f"best {metric} {judged[2]:.4g}" if judged else "no validation yet"
    if "population" in facts:
        members, round, value = facts["population"]
        best_of = "no score yet" if value is None else f"best score {value:.4g}"
        score = f"a population of {members} in round {round}, {best_of}"
    lines = stored.source.splitlines()
    code = "\n".join(f"{number:4d} | {line}" for number, line in enumerate(lines, 1))
    where = "" if store is None else f"store={str(store)!r}, "
    return (
        f"Found {name!r} in {newest.store.place}: step {facts['step']}, "
        f"epoch {facts['progress']:.2f}, stage {facts['stage']}, {score}.\n"
        f"It keeps the code that built it ({len(lines)} lines, sha256 {stored.sha256}):\n\n"
        f"{code}\n\n"
        f"If you trust this code: nbtrain.resume({name!r}, {where}trust_code=True).run()"
    )
