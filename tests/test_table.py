"""The rows are the truth: what is to be done, and which states that takes, follow from them."""

from __future__ import annotations

import json
import random

from nbtrain.population.evolution import Evolution
from nbtrain.population.space import loguniform
from nbtrain.population.table import Key, Row, Table

EPOCHS = 5


def table(mode: str = "pbt", members: int = 4, rows: list[Row] | None = None) -> Table:
    evolution = Evolution({"lr": loguniform(1e-3, 1e-1)}, members, seed=0, mode=mode, quantile=0.4)
    return Table(evolution, EPOCHS, rows or [])


def walk(found: Table, rng: random.Random, failing: float = 0.0) -> list[tuple[set[Key], Row]]:
    """Do slice after slice; return what was needed before each, and its row."""
    seen = []
    while turns := found.left:
        turn, before = turns[0], set(found.needs())
        score = None if rng.random() < failing else rng.random()
        row = Row.of(turn, score=score, epoch=turn.round + 1, metrics={"x": score}, error="e")
        found.add(row)
        seen.append((before, row))
    return seen


def test_needs_are_never_more_than_there_are_members() -> None:
    for seed in range(60):
        found = table(members=5)
        for before, _ in walk(found, random.Random(seed), 0.2):
            assert len(before) <= 5


def test_a_state_once_let_go_is_never_needed_again() -> None:
    """Each set of needs is made of the one before and of the state that has just ended."""
    for mode in ("pbt", "random", "halving"):
        for seed in range(60):
            rng, found, held = random.Random(seed), table(mode, 5), set[Key]()
            while turns := found.left:
                assert turns[0].source is None or (turns[0].round - 1, turns[0].source) in held
                score = None if rng.random() < 0.3 else rng.random()
                found.add(Row.of(turns[0], score=score, epoch=turns[0].round + 1))
                now = set(found.needs())
                assert now <= held | {found.rows[-1].key}, (mode, seed)
                held = now
            if found.has_failed:
                found.forget_failures()
                assert set(found.needs()) <= held, "another try finds its states"


def test_a_table_goes_on_from_any_of_its_rows_as_if_it_had_not_been_cut() -> None:
    whole = table()
    walk(whole, random.Random(1), 0.2)
    for cut in range(len(whole.rows)):
        part = table(rows=whole.rows[:cut])
        assert part.left[0].member == whole.rows[cut].member
        assert Row.of(part.left[0]).source_key == whole.rows[cut].source_key
        assert part.left[0].hyperparameters == whole.rows[cut].hyperparameters
        assert part.left[0].changes == whole.rows[cut].changes


def test_in_whichever_order_the_slices_of_a_round_end_the_table_is_the_same() -> None:
    whole = table()
    walk(whole, random.Random(1))
    other = table()
    for round in range(EPOCHS):
        ends = [row for row in whole.rows if row.round == round]
        for row in random.Random(round).sample(ends, len(ends)):
            other.add(row)
    assert other.rows == whole.rows and other.plain() == whole.plain() and other.is_done


def test_rows_survive_strict_json() -> None:
    found = table()
    walk(found, random.Random(1), 0.2)
    text = json.dumps(found.plain(), allow_nan=False)
    assert [Row.from_plain(row) for row in json.loads(text)] == found.rows
    assert any(row.changes for row in found.rows)


def test_all_is_done_when_every_member_has_reached_the_end() -> None:
    found = table()
    walk(found, random.Random(0))
    assert found.is_done and len(found.rows) == 4 * EPOCHS and not found.left
    assert found.needs() == [(EPOCHS - 1, member) for member in range(4)]
    longer = Table(found.evolution, EPOCHS + 1, found.rows)
    assert len(longer.left) == 4


def test_a_round_in_which_all_fail_is_taken_back() -> None:
    found = table()
    for score in (0.1, 0.2, 0.3, 0.4, None, None, None, None):
        found.add(Row.of(found.left[0], score=score))
    assert found.has_failed and not found.left and not found.is_done
    states = {Row.of(turn).source_key for turn in found.turns(1)}
    assert set(found.needs()) == states
    assert [row.member for row in found.forget_failures()] == [0, 1, 2, 3]
    assert found.round == 1 and len(found.left) == 4 and not found.forget_failures()


def test_the_best_is_the_best_state_that_is_there() -> None:
    found = table()
    assert found.best() is None
    for score in (0.1, 0.9, 0.3, None):
        found.add(Row.of(found.left[0], score=score, epoch=1))
    best = found.best()
    assert best is not None and best.key == (0, 1)
    assert found.newest(3) is found.rows[3]
