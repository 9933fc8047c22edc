"""What a notebook shows of a population: panel and twin, as a session has them.

● running  mnist-pbt  stage 1, new                    told by `status()`, every two seconds
round, run and budget as bars
[Resume] [Pause] [Stop]                               labels follow the state, never the click
a line for each member: score, hyperparameters, from whom, what it does
Checkpoint: 48 MB, 2m10s ago, in ...
scores and hyperparameters of all members
the last lines of the log
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import ipywidgets as widgets

from nbtrain.face import Drawn, markup, members, twin
from nbtrain.face.board import Board
from nbtrain.face.markup import Facts, Trained
from nbtrain.face.twin import Outputs
from nbtrain.population import portrait
from nbtrain.population.evolution import Evolution
from nbtrain.population.portrait import Portrait
from nbtrain.population.table import Row


class Population(Trained, Protocol):
    """A population, as far as its face knows it."""

    @property
    def rows(self) -> list[Row]: ...
    @property
    def best_row(self) -> Row | None: ...


class HerdPanel(Board):
    """The widgets of one population.

    Args:
        population: What is shown and steered.
        picture: Is drawn.
        touched: Set whenever somebody clicked.
        clock: Monotonic seconds.
    """

    _shown: Population

    def __init__(
        self,
        population: Population,
        picture: Portrait,
        touched: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._portrait = picture
        super().__init__(population, touched, clock)

    def _rows(self) -> list[Any]:
        self._members = widgets.HTML()
        return [
            self._status,
            self._bars,
            self._line(self._buttons),
            self._alert,
            self._members,
            self._saved,
            self._picture,
            self._words,
            self._log,
        ]

    @property
    def _buttons(self) -> list[Any]:
        return [self._start, self._pause, self._stop]

    def _status_of(self, facts: Facts) -> str:
        return members.status(facts)

    def _numbers(self, facts: Facts) -> None:
        self._bars.value = members.bars(facts, time.time())
        self._members.value = members.table(facts)
        self._saved.value = markup.saved(facts, time.time(), steps=False)

    def _tell(self, facts: Facts) -> None:
        self._label(facts, has_begun=bool(facts["num_slices"]) or facts["resumed"] != "new")

    def draw(self, *, at_once: bool = False) -> None:
        """Draw the picture, if it is time and another slice is over."""
        facts, rows, best = self._shown.status(), self._shown.rows, self._shown.best_row
        place = len(rows), best.key if best is not None else None
        if not self._is_due(place, self._rest_s, at_once=at_once):
            return
        began = self._clock()
        self._portrait.draw(rows, best)
        self._picture.value = self._portrait.png()
        self._words.value = markup.small(portrait.words(rows, best, facts["metric"]))
        self._drew(place, began)


class HerdTwin(Outputs):
    """The outputs of one population.

    Args:
        population: What is told.
        picture: Is drawn.
    """

    def __init__(self, population: Population, picture: Portrait) -> None:
        super().__init__()
        self._population, self._portrait = population, picture

    def news(self) -> object:
        """Return state and checkpoints, and how far it is where it does not change all the time."""
        facts = self._population.status()
        return twin.news(facts, facts["num_slices"])

    def outputs(self) -> list[dict[str, Any]]:
        """Return the picture, and what is known of the population and its members."""
        population, facts = self._population, self._population.status()
        rows, best = population.rows, population.best_row
        self._portrait.draw(rows, best)
        words = portrait.words(rows, best, facts["metric"])
        below = members.table(facts, style="")
        return [
            {"image/png": self._portrait.png(), "text/plain": words},
            twin.bundle(facts, told(facts), below, members.text(facts)),
        ]


def told(facts: Facts) -> list[twin.Row]:
    """Return what the table tells: a name, and lines."""
    given, in_all = facts["arguments"], facts["num_slices_in_all"]
    slices = f"{facts['num_slices']:,}" + (f" of {in_all:,}" if in_all else "")
    shape = [f"{name} {given[name]}" for name in ("mode", "members", "interval", "epochs", "quantile")]
    tests = [
        f"member {test['member']} after round {test['round'] + 1}: "
        + ", ".join(f"{n} {members.value(v)}" for n, v in test.items() if n not in ("round", "member"))
        for test in facts["tests"]
    ]
    lines = [
        ("state", [twin.state(facts), *filter(None, [facts["error"]])]),
        ("slices", [slices]),
        ("arguments", [", ".join(shape)]),
        ("with the weights", [", ".join(facts["travels_with_weights"])]),
        ("tested", tests),
        ("saved", [twin.saved(place, steps=False) for place in facts["saved"]]),
        ("recipe", [facts["recipe"]]),
        ("goes on with", [] if facts["state"] == "done" else [facts["goes_on"]]),
        ("written", [twin.moment(time.time())]),
    ]
    return [(name, some) for name, some in lines if any(some)]


class Herd(Drawn):
    """What a notebook shows of a population.

    Args:
        population: Is drawn, and takes the orders.
        evolution: Has its space.
        clock: Monotonic seconds.
    """

    _session: Population

    def __init__(
        self,
        population: Population,
        evolution: Evolution,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        given = population.status()
        epochs = given["arguments"]["epochs"]
        self._portrait = Portrait(population.name, evolution, given["metric"], epochs)
        super().__init__(population, clock)

    def _new_twin(self) -> Outputs:
        return HerdTwin(self._session, self._portrait)

    def _new_panel(self) -> Board:
        return HerdPanel(self._session, self._portrait, self._touched, self._clock)
