"""The static twin of the panel: a picture and a table that need no kernel to be seen.

Widgets are gone when a notebook is opened again, on the web or in tomorrow's kernel. These are plain
outputs, each under a display id and renewed where it stands: PNG, and HTML without script; as text
too. While a live panel is in the page, its style hides them.
"""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np
from IPython.display import display

from nbtrain import plots
from nbtrain.bar import number
from nbtrain.budget import size
from nbtrain.face import markup
from nbtrain.face.markup import Facts, Run

NUM_ENTRIES = 10  # of the journal, the newest
SETTINGS = ("batch_size", "accumulate", "warmup_epochs", "warmup", "decay", "epochs")

Row = tuple[str, list[str]]

WIDTH_PX = 700


class Outputs(ABC):
    """Two outputs, a picture and a table, shown in any number of cells and the same in all of them."""

    def __init__(self) -> None:
        self._ids = [f"nbtrain-{kind}-{uuid.uuid4().hex}" for kind in ("picture", "table")]
        self._told: object = None

    @abstractmethod
    def news(self) -> object:
        """Return what is other when there is something to tell."""

    @abstractmethod
    def outputs(self) -> list[dict[str, Any]]:
        """Return the picture and the table, each as a bundle of MIME types."""

    def show(self) -> None:
        """Show both in the cell that runs."""
        self._send(update=False)

    def renew(self) -> None:
        """Show what is known now, in every cell where they stand."""
        self._send(update=True)

    @property
    def is_stale(self) -> bool:
        """Whether there is something to tell: another state, or another checkpoint."""
        return self.news() != self._told

    def _send(self, *, update: bool) -> None:
        self._told = self.news()
        for id, output in zip(self._ids, self.outputs(), strict=True):
            metadata = {"image/png": {"width": WIDTH_PX}} if "image/png" in output else {}
            display(output, metadata=metadata, raw=True, display_id=id, update=update)  # type: ignore[no-untyped-call]


class Twin(Outputs):
    """The outputs of one session.

    Args:
        session: What is told.
        curves: Draws the picture.
    """

    def __init__(self, session: Run, curves: plots.Curves) -> None:
        super().__init__()
        self._session, self._curves = session, curves

    def news(self) -> object:
        """Return state and checkpoints, and the step where it does not change all the time."""
        facts = self._session.status()
        return news(facts, facts["step"])

    def outputs(self) -> list[dict[str, Any]]:
        """Return the curves, and what is known of the session."""
        session, facts = self._session, self._session.status()
        arrays, epochs = session.history.arrays(), list(session.history.epochs)
        self._curves.draw(arrays, epochs, session.journal, facts["progress"])
        told = rows(facts, session, arrays)
        return [
            {"image/png": self._curves.png(), "text/plain": plots.words(arrays, epochs)},
            bundle(facts, told),
        ]


def news(facts: Facts, place: object) -> object:
    """Return what a twin tells at once: the state, what is saved, and the place where it rests."""
    runs = facts["state"] == "running"  # then only what is saved is told
    saved = [(s["place"], s["step"], s["at"], s["degree"]) for s in facts["saved"]]
    return facts["state"], facts["reason"], None if runs else place, saved, facts["error"]


def rows(facts: Facts, session: Run, arrays: plots.Columns) -> list[Row]:
    """Return what the table tells: a name, and lines."""
    settings = facts["settings"]
    in_force = [f"{name} {settings[name]}" for name in SETTINGS if settings[name] is not None]
    told = [
        ("state", [state(facts), *filter(None, [facts["error"]])]),
        ("epoch", [markup.epochs_words(facts)]),
        ("step", [f"{facts['step']:,}"]),
        ("loss", [number(facts["loss"])]),
        ("best validation", _best(session.history.epochs, facts["metric"], facts["direction"])),
        ("learning rate", [f"{facts['lr']:.3g}, peak {facts['peak_lr']:.3g}"]),
        ("settings", [", ".join(in_force)]),
        ("changed", _changes(session)),
        ("stages", _stages(arrays)),
        ("saved", [saved(place) for place in facts["saved"]]),
        ("recipe", [facts["recipe"]]),
        ("goes on with", [] if facts["state"] == "done" else [facts["goes_on"]]),
        ("written", [moment(time.time())]),
    ]
    return [(name, lines) for name, lines in told if lines]


def state(facts: Facts) -> str:
    """Say the state as it may stand in a saved page."""
    # No later word may reach this output: a page that was reloaded drops them.
    was = "was running when this was written"
    return was if facts["state"] == "running" else markup.state_words(facts)


def _best(epochs: Iterable[dict[str, Any]], metric: str, direction: str) -> list[str]:
    seen = [row for row in epochs if math.isfinite(row.get(metric, math.nan))]
    if not seen:
        return []
    best = (min if direction == "min" else max)(seen, key=lambda row: row[metric])
    named = "" if metric == "valid_loss" else f"{metric} "
    # Its progress says more than the epoch's number, for it may have been in the middle.
    return [f"{named}{number(best[metric])} at epoch {best['progress']:.2f}, step {best['step']:,}"]


def _changes(session: Run) -> list[str]:
    entries = session.journal.entries
    before = len(entries) - NUM_ENTRIES
    return [
        *([f"({before} before these)"] if before > 0 else []),
        *map(str, entries[-NUM_ENTRIES:]),
    ]


def _stages(arrays: plots.Columns) -> list[str]:
    """Say from where to where each stretch in one kernel went."""
    told = []
    for stage in np.unique(arrays["stage"]):
        of = {name: column[arrays["stage"] == stage] for name, column in arrays.items()}
        steps, epochs = of["step"], of["progress"]
        told.append(
            f"{stage:.0f}: step {steps[0]:,.0f} to {steps[-1]:,.0f}, "
            f"epoch {epochs[0]:.2f} to {epochs[-1]:.2f}"
        )
    return told


def saved(place: Facts, *, steps: bool = True) -> str:
    """Say what one place holds, as it may stand in a saved page."""
    at, num_bytes = moment(place["at"]), size(place["num_bytes"])
    step = f"step {place['step']:,}, " if steps else ""
    return f"{step}{num_bytes}, {at}, in {place['place']} ({place['degree']})"


def moment(at_s: float) -> str:
    """Write a date, a time and its zone."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at_s)).strip()


def bundle(facts: Facts, told: list[Row], below: str = "", text: str = "") -> dict[str, Any]:
    """Return a table as a bundle of MIME types, with something more below it."""
    page, plain = _html(facts, told), _text(facts, told)
    return {"text/html": page + below, "text/plain": "\n".join(filter(None, (plain, text)))}


def _html(facts: Facts, told: list[Row]) -> str:
    """Write a table that keeps its shape where styles and classes are taken out."""
    cell = "text-align: left; vertical-align: top; padding: 1px 12px 1px 0; border: none"
    lines = "".join(
        f'<tr><th scope="row" style="{cell}; white-space: nowrap">{escape(name)}</th>'
        f'<td style="{cell}">{"<br>".join(escape(line) for line in some)}</td></tr>'
        for name, some in told
    )
    title = f'<caption style="text-align: left"><b>{escape(facts["name"])}</b></caption>'
    return f'<table class="nbt-twin" style="border: none">{title}<tbody>{lines}</tbody></table>'


def _text(facts: Facts, told: list[Row]) -> str:
    lines = [f"{name:16} {line}" for name, some in told for line in some]
    return "\n".join([facts["name"], *lines])
