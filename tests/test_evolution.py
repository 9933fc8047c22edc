"""A plan is a function of scores, hyperparameters and seed: nothing else, and nothing is lost in it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from nbtrain.population.evolution import MODES, Evolution, Turn
from nbtrain.population.space import loguniform, randint, read, uniform

SPACE = read(
    {
        "lr": loguniform(1e-3, 1e-1),
        "momentum": uniform(0.1, 0.9),
        "hidden": randint(32, 512),
        "act": ["relu", "gelu", "tanh"],
    }
)


def evolution(**changes: Any) -> Evolution:
    return Evolution(**({"space": SPACE, "members": 10, "seed": 0, "quantile": 0.3} | changes))


def drawn(number: int, num_members: int) -> dict[int, float | None]:
    """Return scores with ties, failures and infinities among them."""
    rng = random.Random(number)
    odd = [None, math.nan, math.inf, -math.inf, 0.5]
    return {
        m: rng.choice(odd) if rng.random() < 0.4 else round(rng.random(), 1) for m in range(num_members)
    }


def values(plans: Evolution) -> dict[int, Any]:
    return {turn.member: turn.hyperparameters for turn in plans.first()}


def finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", ["max", "min"])
def test_whatever_the_scores_a_plan_keeps_its_promises(mode: str, direction: str) -> None:
    for number in range(300):
        size = 2 + number % 11
        plans = evolution(members=size, mode=mode, direction=direction, quantile=0.1 + number % 5 / 10)
        scores = drawn(number, size)
        order, turns = plans.order(scores), plans.plan(1, scores, values(plans))
        good = [m for m in order if finite(scores[m])]
        assert turns == plans.plan(1, dict(reversed(scores.items())), values(plans))
        assert [t.member for t in turns] == sorted({t.member for t in turns})
        donors = {t.source for t in turns if t.is_exploit}
        targets = {t.member for t in turns if t.is_exploit}
        assert not donors & targets, "a donor is replaced"
        assert donors <= set(good), "a failed member is copied"
        for turn in turns:
            assert turn.source is not None and finite(scores[turn.source])
            for name, value in turn.hyperparameters.items():
                assert value in SPACE[name].edges() if name == "act" else True
                assert name == "act" or SPACE[name].low <= value <= SPACE[name].high
        if mode == "pbt" and good:
            assert len(turns) == size
            assert {m for m in range(size) if not finite(scores[m])} <= targets
        if mode == "random":
            assert [t.member for t in turns] == sorted(good) and not targets
        if mode == "halving" and good:
            assert {t.member for t in turns} == set(good[: len(turns)]) and not targets
            assert 1 <= len(turns) < size
        assert bool(turns) == bool(good)


def test_members_are_ordered_by_score_and_number_and_what_is_not_finite_is_worst() -> None:
    scores = {0: 0.5, 1: math.inf, 2: 0.9, 3: None, 4: 0.5, 5: math.nan, 6: -math.inf}
    assert evolution().order(scores) == [2, 0, 4, 1, 3, 5, 6]
    assert evolution(direction="min").order(scores) == [0, 4, 2, 1, 3, 5, 6]


def test_ten_members_and_a_third_replace_three_by_copies_of_the_best_three() -> None:
    plans = evolution()
    turns = plans.plan(1, {m: float(m) for m in range(10)}, values(plans))
    assert {t.member for t in turns if t.is_exploit} == {0, 1, 2}
    assert {t.source for t in turns if t.is_exploit} <= {7, 8, 9}
    assert [t.member for t in turns] == list(range(10))
    assert all(not t.changes and t.source == t.member for t in turns[3:])


@pytest.mark.parametrize(
    ("members", "quantile", "replaced"),
    [(2, 0.25, 1), (3, 0.5, 1), (4, 0.25, 1), (10, 0.25, 3), (10, 0.3, 3), (100, 0.07, 7), (2, 0.5, 1)],
)
def test_as_many_are_replaced_as_ray_counts(members: int, quantile: float, replaced: int) -> None:
    plans = evolution(members=members, quantile=quantile)
    turns = plans.plan(1, {m: float(m) for m in range(members)}, values(plans))
    assert sum(t.is_exploit for t in turns) == replaced


def test_an_exploit_tells_each_change_and_is_the_donors_hyperparameters_with_these() -> None:
    plans = evolution(resample=0.5)
    seen = set()
    for round in range(1, 40):
        for turn in plans.plan(round, {m: float(m) for m in range(10)}, values(plans)):
            if turn.is_exploit:
                assert turn.source is not None
                expected = dict(values(plans)[turn.source])
                for change in turn.changes:
                    assert expected[change.what] == change.old != change.new
                    expected[change.what] = change.new
                    seen.add(change.how)
                assert turn.hyperparameters == expected
    assert seen == {"perturb", "resample"}


def test_what_shapes_the_model_travels_with_its_weights() -> None:
    plans = evolution(fixed=frozenset({"hidden"}))
    for turn in plans.plan(1, {m: float(m) for m in range(10)}, values(plans)):
        assert turn.source is not None
        assert turn.hyperparameters["hidden"] == values(plans)[turn.source]["hidden"]


def test_one_more_hyperparameter_moves_none_of_the_others() -> None:
    less = evolution(space={name: SPACE[name] for name in ("lr", "hidden")})
    scores = {m: float(m) for m in range(10)}
    for one, other in zip(
        evolution().plan(3, scores, values(evolution())),
        less.plan(3, scores, values(less)),
        strict=True,
    ):
        assert one.source == other.source
        assert {n: one.hyperparameters[n] for n in ("lr", "hidden")} == other.hyperparameters


def test_factors_are_those_that_were_given_and_no_value_is_drawn_where_resample_is_0() -> None:
    plans = evolution(space={"lr": loguniform(1e-9, 1e9)}, factors=(0.5, 3.0), resample=0.0)
    known = {m: {"lr": 1.0} for m in range(10)}
    turns = plans.plan(1, {m: float(m) for m in range(10)}, known)
    assert {t.hyperparameters["lr"] for t in turns if t.is_exploit} <= {0.5, 3.0}
    scores = {m: float(m) for m in range(10)}
    always = evolution(resample=1.0).plan(1, scores, values(evolution()))
    assert {c.how for t in always for c in t.changes} == {"resample"}


def test_rounds_seeds_and_members_draw_differently() -> None:
    scores = {m: float(m) for m in range(10)}

    def moves(plans: Evolution, round: int) -> list[Turn]:
        return [t for t in plans.plan(round, scores, values(evolution())) if t.is_exploit]

    def told(turns: list[Turn]) -> list[Any]:
        return [(t.source, t.hyperparameters) for t in turns]

    assert told(moves(evolution(), 1)) != told(moves(evolution(), 2))
    assert told(moves(evolution(), 1)) != told(moves(evolution(seed=1), 1))
    first = [tuple(t.hyperparameters.values()) for t in evolution().first()]
    assert len(set(first)) == len(first)


def test_halving_ends_with_one() -> None:
    plans = evolution(mode="halving", quantile=0.5)
    alive, sizes = dict.fromkeys(range(10), 0.0), []
    while len(alive) > 1:
        turns = plans.plan(1, {m: float(m) for m in alive}, values(plans))
        alive = {t.member: 0.0 for t in turns}
        sizes.append(len(alive))
    assert sizes == [5, 3, 2, 1]
    assert list(alive) == [9]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"members": 1}, "members=1 must be"),
        ({"members": 2.0}, "members=2.0 must be"),
        ({"quantile": 0.6}, "quantile=0.6 must be above 0 and at most 0.5"),
        ({"quantile": 0}, "quantile=0 must"),
        ({"mode": "asha"}, "mode='asha' is not known"),
        ({"direction": "up"}, "direction='up' is not known"),
        ({"resample": 1.5}, "resample=1.5 must be a probability"),
        ({"factors": ()}, "factors="),
        ({"factors": (1.0, 2.0)}, "factors="),
        ({"factors": (-1, 2)}, "factors="),
    ],
)
def test_an_argument_without_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evolution(**changes)
