"""Scores and hyperparameters of all members: every slice is drawn, and the best's over the others."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from herds import grown
from matplotlib.collections import LineCollection
from PIL import Image

import nbtrain
from nbtrain.population import ancestry, portrait
from nbtrain.population.portrait import Portrait
from nbtrain.population.table import Table


def drawn(table: Table) -> Any:
    return portrait.picture("herd", table.evolution, "accuracy", table.epochs, table.rows, table.best())


def segments(axes: Any) -> list[Any]:
    return [np.asarray(s).tolist() for c in axes.collections for s in c.get_segments()]


def paths(axes: Any) -> list[list[tuple[float, float]]]:
    """Return the lines, and with them the dots."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines]


def names(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_copy_branches_off_from_its_donor() -> None:
    table = grown(rounds=3)
    scores = drawn(table).axes[0]
    known = ancestry.by_key(table.rows)
    expected = [
        [[known[row.source_key].progress, known[row.source_key].score], [row.progress, row.score]]
        for row in table.rows
        if row.source_key is not None
    ]
    assert any(row.source not in (None, row.member) for row in table.rows)
    assert segments(scores) == expected


def test_the_way_to_the_best_is_the_schedule_that_is_exported() -> None:
    table = grown(rounds=5)
    best = table.best()
    assert best is not None
    figure, known = drawn(table), ancestry.by_key(table.rows)
    chain = ancestry.of(best, known)
    assert [(row.progress, row.score) for row in chain] in paths(figure.axes[0])
    lr = [
        (x, row.hyperparameters["lr"])
        for row in chain
        for x in (ancestry.begins(row, known), row.progress)
    ]
    assert lr in paths(figure.axes[1])


def test_a_member_jumps_to_what_it_goes_on_with() -> None:
    table = grown(rounds=4)
    known = ancestry.by_key(table.rows)
    jumps = [
        [[at, known[row.round - 1, row.member].hyperparameters["lr"]], [at, row.hyperparameters["lr"]]]
        for row in table.rows
        if row.source not in (None, row.member)
        for at in [ancestry.begins(row, known)]
    ]
    assert jumps and all(jump in segments(drawn(table).axes[1]) for jump in jumps)


def test_each_hyperparameter_has_axes_of_its_kind() -> None:
    space = {
        "lr": nbtrain.loguniform(1e-4, 1e-1),
        "momentum": nbtrain.uniform(0.1, 0.9),
        "optimizer": ["sgd", "an optimizer of many letters"],
    }
    _, lr, momentum, optimizer = drawn(grown(space=space)).axes
    assert lr.get_yscale() == "log" and momentum.get_yscale() == "linear"
    low, high = momentum.get_ylim()
    assert low < 0.1 < 0.9 < high
    assert [label.get_text() for label in optimizer.get_yticklabels()] == ["sgd", "an optim…"]


def test_the_beginning_and_the_smallest_population_can_be_drawn() -> None:
    begin = drawn(grown(rounds=0))
    assert [text.get_text() for text in begin.axes[0].texts][1:] == ["no round yet"]
    assert names(begin) == []
    small = drawn(grown(members=2, rounds=1))
    assert names(small) == ["leads to the best", "others"]
    assert segments(small.axes[0]) == []


@pytest.mark.parametrize("direction", ["max", "min"])
def test_who_failed_is_marked_where_its_slice_began(direction: str) -> None:
    table = grown(rounds=3, failed={(1, 2)}, direction=direction)
    figure = drawn(table)
    assert "failed" in names(figure)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[2.0]]
    assert all(math.isfinite(y) for segment in segments(figure.axes[0]) for _, y in segment)


def test_one_where_all_failed_is_drawn_too() -> None:
    table = grown(rounds=1, failed={(0, member) for member in range(4)})
    assert names(drawn(table)) == ["leads to the best", "others", "failed"]
    assert portrait.words(table.rows, None, "accuracy").endswith("no score yet")


def test_the_live_picture_is_renewed_as_a_new_one_would_be() -> None:
    whole = grown(rounds=4)
    live = Portrait("herd", whole.evolution, "accuracy", 6)
    for rounds in (0, 1, 2, 2, 4):
        table = grown(rounds=rounds)
        live.draw(table.rows, table.best())
        renewed = live.png()
        fresh = Portrait("herd", whole.evolution, "accuracy", 6)
        fresh.draw(table.rows, table.best())
        assert np.array_equal(pixels(renewed), pixels(fresh.png())), rounds
    assert sum(isinstance(c, LineCollection) for c in live.figure.axes[0].collections) == 1


def test_a_line_for_who_does_not_see_it() -> None:
    table = grown(rounds=2)
    assert portrait.words([], None, "accuracy") == "no round yet"
    best = table.best()
    assert best is not None
    said = portrait.words(table.rows, best, "accuracy")
    assert said.startswith("8 slices of 4 members in 2 rounds, best accuracy 3.1: member 3 with lr ")


def pixels(picture: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
