"""What a session or population is and what is stored, in plain text for a cell that shows no better."""

from __future__ import annotations

import ast
import difflib
import re
import time
from typing import Any

from IPython.core.error import UsageError

from nbtrain.budget import size, words
from nbtrain.magics.listing import Found
from nbtrain.magics.said import WORDS
from nbtrain.recipe import Recipe

NUM_ROWS = 10  # of the history
OBVIOUS = ("", "done", "pause", "stop", "error")  # reasons that the state tells already


def help(text: str, word: str) -> str:
    """Return the help, or what it says of one word.

    Raises:
        UsageError: there is no such word.
    """
    if not word:
        return text
    blocks = re.findall(r"^%%?nbtrain.*\n(?:    .*\n)*", text, flags=re.MULTILINE)
    found = [b for b in blocks if word in b.split("  ")[0].replace(",", " ").split()]
    if not found:
        raise no_word(word, "help ")
    return "".join(found).rstrip()


def no_word(word: str, behind: str = "") -> UsageError:
    """Return the error that says which word was perhaps meant, behind another one."""
    near = difflib.get_close_matches(word.lower(), WORDS, 1)
    hint = f"Did you mean %nbtrain {behind}{near[0]}?" if near else "%nbtrain help has them all."
    return UsageError(f"There is no word {word!r}. {hint}")


def refuse_a_loop(now: dict[str, Any]) -> None:
    """Refuse to train what a loop of the user's own has trained, as the panel's button does.

    Raises:
        UsageError: it would be trained by another loss than that of the loop.
    """
    if now.get("own_loop") and now["step"] and now["state"] != "running":
        raise UsageError(
            f"{now['name']} is trained by a loop of your own, and only its cell knows the loss: run it."
            " To train on by the task's loss, write session.run()."
        )


def status(now: dict[str, Any]) -> str:
    """Return what `Session.status` gave, as a few lines."""
    from nbtrain.bar import number  # with widgets, where there are some

    why = "" if now["reason"] in OBVIOUS else f" ({now['reason']})"
    asked = f", {now['asked']} asked for" if now["asked"] else ""
    of = f" of {now['epochs']}" if now["epochs"] else ""
    pace = f", {now['samples_per_s']:.0f} samples/s" if now["samples_per_s"] else ""
    lines = {
        "place": f"epoch {now['progress']:.2f}{of}, step {now['step']}",
        "seen": f"loss {number(now['loss'])}, lr {now['lr']:.4g}{pace}",
        "settings": settings(now["settings"]),
        "budget": _budget(now),
        "saved": saved(now),
        "recipe": now["recipe"],
        "error": now["error"],
    }
    told = [f"  {name:10}{line}" for name, line in lines.items() if line]
    return "\n".join(
        [f"{now['name']}: {now['state']}{why}{asked}, stage {now['stage']}, {now['resumed']}", *told]
    )


def population(now: dict[str, Any]) -> str:
    """Return what `Population.status` gave, as a few lines and one for each member."""
    from nbtrain.bar import number

    why = "" if now["reason"] in OBVIOUS else f" ({now['reason']})"
    asked = f", {now['asked']} asked for" if now["asked"] else ""
    of = f" of {now['num_slices_in_all']}" if now["num_slices_in_all"] else ""
    score = "-" if now["best_score"] is None else number(now["best_score"])
    whose = "" if now["best_member"] is None else f" (member {now['best_member']})"
    lines = {
        "place": f"round {now['round'] + (now['state'] != 'done')}, {now['num_slices']}{of} slices",
        "best": f"{now['metric']} {score}{whose}",
        "budget": _budget(now),
        "saved": saved(now),
        "recipe": now["recipe"],
        "error": now["error"],
    }
    members = now["members"]
    names = [*dict.fromkeys(name for member in members for name in member["hyperparameters"])]
    rows = [
        [
            member["id"],
            member["score"],
            *(member["hyperparameters"].get(name) for name in names),
            "" if member["donor"] is None else f"<- {member['donor']}",
            member["state"],
        ]
        for member in members
    ]
    return "\n".join(
        [
            f"{now['name']}: {now['state']}{why}{asked}, stage {now['stage']}, {now['resumed']}",
            *(f"  {name:10}{line}" for name, line in lines.items() if line),
            table(["member", now["metric"], *names, "from", "now"], rows),
        ]
    )


def _budget(now: dict[str, Any]) -> str:
    budget = f"{now['budget']}; {words(now['budget_left_s'])} left"
    if now["budget_limit_s"] is not None:
        budget += f", {words(now['reserve_s'])} of it kept for the last save"
    return budget


def saved(now: dict[str, Any]) -> str:
    """Say where the newest bytes are, in the place that matters most."""
    if not now["saved"]:
        return "nothing yet"
    last = now["saved"][-1]
    step = "" if now.get("kind") == "population" else f"step {last['step']}, "  # one member's
    left = f", {size(now['pending_bytes'])} not copied yet" if now["pending_bytes"] else ""
    ago = words(time.time() - last["at"])
    return f"{step}{last['degree']}, {last['place']}, {ago} ago{left}"


def settings(values: dict[str, Any]) -> str:
    """Return settings as they are written behind `%nbtrain set`, but for those that are not made."""
    return " ".join(f"{name}={value}" for name, value in values.items() if value not in (None, ()))


def history(epochs: list[dict[str, Any]], last: dict[str, Any] | None) -> str:
    """Return the last epochs' rows, and the last step's if it is a later one, as a table."""
    from nbtrain.history import COLUMNS, WHOLE  # with torch

    rows = epochs[-NUM_ROWS:]
    if last is not None and (not rows or last["step"] > rows[-1]["step"]):
        rows = [*rows, last | {name: int(last[name]) for name in WHOLE}]
    rows = [row | {"epoch": row["epoch"] + 1} for row in rows]  # as in every line that is said
    if not rows:
        return "There is no step yet."
    scores = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    names = [*COLUMNS[:-1], *scores, COLUMNS[-1]]
    return table(names, [[row.get(name) for name in names] for row in rows])


def slices(rows: list[dict[str, Any]]) -> str:
    """Return the last slices of a population, as a table."""
    if not rows:
        return "There is no slice yet."
    names = [*dict.fromkeys(name for row in rows for name in row if name != "error")]
    return table(names, [[row.get(name) for name in names] for row in rows[-2 * NUM_ROWS :]])


def sessions(found: list[Found]) -> str:
    """Return what was found in all places, as a table."""
    names = ["name", "step", "epoch", "stage", "best", "size", "age", "place"]
    rows: list[list[Any]] = []
    for one in found:
        age = None if one.saved_at is None else words(time.time() - one.saved_at)
        facts = [one.step, one.progress, one.stage, one.best]
        rows.append([one.name, *facts, size(one.num_bytes), age, one.place])
    if any(one.kind != "session" for one in found):
        names.insert(1, "what")
        for row, one in zip(rows, found, strict=True):
            row.insert(1, one.kind)
    return table(names, rows)


def recipe(kept: Recipe, made: set[str]) -> str:
    """Say what a recipe holds, and what of it is not among the names that its cell made."""
    body = ast.parse(kept.source).body
    names = [getattr(node, "name", None) for node in body]
    names += [target.id for node in body for target in _targets(node)]
    others = [name for name in names if name and name not in made]
    told = [f"{kept.entry} is the recipe, {len(kept.source.splitlines())} lines with all it needs."]
    if others:
        told.append(f"Taken from other cells: {', '.join(others)}.")
    if kept.problems:
        told[0] = f"{kept.entry} is the recipe, but a fresh kernel could not rebuild it:"
        told += [f"  {problem}" for problem in kept.problems]
    return "\n".join([*told, "Train it: %nbtrain start NAME epochs=20"])


def _targets(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


def table(names: list[str], rows: list[list[Any]]) -> str:
    """Return rows as plain text under the names of their columns; "-" stands for None."""
    lines = [names, *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_text = [any(isinstance(row[i], str) for row in rows) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
