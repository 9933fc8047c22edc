"""Who copied whom: an arrow for each copy, a line for each slice, and the winner's way over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from herds import grown
from matplotlib.patches import FancyArrowPatch

from nbtrain.frames import ORANGE
from nbtrain.population import ancestry, genealogy
from nbtrain.population.table import Table


def drawn(table: Table) -> Any:
    return genealogy.picture("herd", table.evolution, table.rows, table.best())


def place(key: Any) -> tuple[float, float]:
    return key[0] + 1.0, float(key[1])


def arrows(figure: Any) -> list[Any]:
    return [one for one in figure.axes[0].patches if isinstance(one, FancyArrowPatch)]


def lines(figure: Any) -> list[Any]:
    found = [c for c in figure.axes[0].collections if hasattr(c, "get_segments")]
    return [[tuple(map(float, end)) for end in s] for c in found for s in c.get_segments()]


def test_an_arrow_for_each_copy_and_a_line_for_who_goes_on() -> None:
    table = grown(rounds=5)
    figure = drawn(table)
    copies = [row for row in table.rows if row.source not in (None, row.member)]
    stays = [row for row in table.rows if row.source == row.member]
    ends = [tuple(map(tuple, arrow._posA_posB)) for arrow in arrows(figure)]
    assert copies and ends == [(place(row.source_key), place(row.key)) for row in copies]
    assert sorted(lines(figure)) == sorted([place(row.source_key), place(row.key)] for row in stays)


def test_the_winners_way_is_marked_and_its_score_stands_behind_its_row() -> None:
    table = grown(rounds=5)
    best = table.best()
    assert best is not None
    figure = drawn(table)
    winners = ancestry.of(best, ancestry.by_key(table.rows))
    (dots,) = [c for c in figure.axes[0].collections if hasattr(c, "get_sizes") and len(c.get_sizes())]
    edges = [tuple(edge) for edge in dots.get_edgecolors()]
    marked = {tuple(at) for at, edge in zip(dots.get_offsets(), edges, strict=True) if edge[2] < 0.1}
    assert ORANGE == "#e69f00" and marked == {place(row.key) for row in winners}
    last = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in last if "best" in text] == [f"{best.score:.4g} best"]
    assert len(last) == 4


@pytest.mark.parametrize("direction", ["max", "min"])
def test_the_better_the_darker(direction: str) -> None:
    table = grown(rounds=2, direction=direction)
    (dots,) = [
        c
        for c in drawn(table).axes[0].collections
        if hasattr(c, "get_array") and c.get_array() is not None
    ]
    sign = 1 if direction == "max" else -1
    scores = [sign * (row.score or 0.0) for row in table.rows]
    assert list(np.argsort(dots.get_array())) == list(np.argsort(scores))


def test_the_beginning_the_smallest_the_failed_and_the_ended() -> None:
    assert [t.get_text() for t in drawn(grown(rounds=0)).axes[0].texts] == ["no round yet"]
    assert arrows(drawn(grown(members=2, rounds=1))) == []
    failed = drawn(grown(rounds=3, failed={(2, 1)}))
    assert "failed" in [text.get_text() for text in failed.axes[0].texts]
    assert [line.get_marker() for line in failed.axes[0].lines] == ["x"]
    assert drawn(grown(rounds=1, failed={(0, member) for member in range(4)})).axes
    halving = drawn(grown(members=8, rounds=4, mode="halving"))
    assert arrows(halving) == [] and len(lines(halving)) < 24


def test_many_members_and_rounds_still_fit() -> None:
    figure = drawn(grown(members=60, rounds=30))
    assert figure.get_figheight() < 11 and len(figure.axes[0].get_xticks()) <= 24
