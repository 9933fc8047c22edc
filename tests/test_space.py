"""Nothing leaves its domain: not what is drawn, not what is moved."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

import nbtrain
from nbtrain.population import space
from nbtrain.population.space import Domain, choice, loguniform, randint, uniform

DOMAINS = [
    uniform(-2.0, 3.0),
    uniform(0, 1),
    loguniform(1e-5, 1e-1),
    randint(32, 512),
    randint(-3, 3),
    randint(0, 1),
    choice([1, 2.0, "three", True]),
]


def inside(domain: Domain, value: Any) -> bool:
    if isinstance(domain, space.Choice):
        return any(type(v) is type(value) and v == value for v in domain.values)
    return domain.low <= value <= domain.high and isinstance(value, int) == domain.is_whole


@pytest.mark.parametrize("domain", DOMAINS, ids=str)
def test_what_is_drawn_and_moved_ever_so_often_stays_inside(domain: Domain) -> None:
    rng = random.Random(0)
    for _ in range(200):
        value = domain.sample(rng)
        assert inside(domain, value)
        for _ in range(20):
            value = domain.perturb(value, rng.choice([0.1, 0.8, 1.2, 9.0]))
            assert inside(domain, value)


@pytest.mark.parametrize("domain", DOMAINS, ids=str)
def test_equal_generators_draw_equal_values(domain: Domain) -> None:
    one, other = random.Random(3), random.Random(3)
    assert [domain.sample(one) for _ in range(9)] == [domain.sample(other) for _ in range(9)]


def test_both_bounds_of_whole_numbers_are_drawn() -> None:
    rng = random.Random(0)
    assert {randint(1, 3).sample(rng) for _ in range(100)} == {1, 2, 3}


def test_a_logarithmic_range_draws_as_many_below_its_geometric_middle_as_above() -> None:
    rng = random.Random(0)
    low = sum(loguniform(1e-4, 1e-2).sample(rng) < 1e-3 for _ in range(1000))
    assert 450 < low < 550


def test_an_integer_moves_by_one_at_least_and_never_over_a_bound() -> None:
    small = randint(1, 4)
    assert [small.perturb(2, 1.2), small.perturb(2, 0.8), small.perturb(1, 0.8)] == [3, 1, 1]
    assert small.perturb(4, 1.2) == 4
    assert randint(1, 100).perturb(50, 1.2) == 60


def test_a_choice_moves_to_its_neighbour_and_stops_at_the_ends() -> None:
    words = choice(["a", "b", "c"])
    assert [words.perturb("b", 1.2), words.perturb("b", 0.8)] == ["c", "a"]
    assert [words.perturb("c", 1.2), words.perturb("a", 0.8)] == ["c", "a"]
    assert choice([False, True]).perturb(False, 1.2) is True
    assert type(choice([1, True, 1.0]).perturb(True, 1.2)) is float


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: uniform(1, 1), "is empty"),
        (lambda: uniform(2, 1), "is inverted"),
        (lambda: randint(5, 3), "is inverted"),
        (lambda: randint(1, 2.5), "2.5 is none"),
        (lambda: loguniform(0, 1), "no logarithm"),
        (lambda: loguniform(-1, 1), "no logarithm"),
        (lambda: uniform(0, math.inf), "inf is none"),
        (lambda: uniform(math.nan, 1), "nan is none"),
        (lambda: uniform("0", 1), "'0' is none"),
        (lambda: uniform(False, 1), "False is none"),
        (lambda: choice([]), "leaves nothing to choose"),
        (lambda: choice([3]), "leaves nothing to choose"),
        (lambda: choice([1, 2, 1]), "1 twice"),
        (lambda: choice([max, min]), "which a checkpoint cannot hold"),
        (lambda: choice([1.0, math.inf]), "inf, which a checkpoint cannot hold"),
        (lambda: uniform(-1e308, 1e308), "too wide"),
        (lambda: space.read({"score": [1, 2]}), "'score', a column of the history"),
        (lambda: choice([1.0, math.nan]), "nan, which a checkpoint cannot hold"),
        (lambda: space.read({}), "no hyperparameter to search"),
        (lambda: space.read(["lr"]), "no hyperparameter to search"),
        (lambda: space.read({"lr": 0.1}), r"space\['lr'\]=0.1 is no domain"),
        (lambda: space.read({"lr": "abc"}), "is no domain"),
        (lambda: space.read({3: [1, 2]}), "has 3 where the name"),
        (lambda: space.read({"lr": []}), "leaves nothing to choose"),
        (lambda: space.read({"lr": (1e-3, 0.1)}), r"loguniform\(0.001, 0.1\) for all between"),
    ],
)
def test_a_domain_without_sense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_list_and_an_array_are_choices_of_plain_values() -> None:
    found = space.read({"a": [1, 2], "b": np.array([0.5, 1.5]), "c": [np.float64(0.1), np.float64(1)]})
    assert found == {"a": choice([1, 2]), "b": choice([0.5, 1.5]), "c": choice([0.1, 1.0])}
    assert space.read({"a": (1, 2, 3), "b": (True, False), "c": ("sgd", "adam")}).keys() == {*"abc"}
    assert {type(v) for domain in found.values() for v in domain.edges()} == {int, float}


def test_a_space_comes_back_from_plain_values() -> None:
    known = {str(number): domain for number, domain in enumerate(DOMAINS)}
    assert space.from_plain(space.plain(known)) == known


def test_the_three_ranges_are_public_and_cost_no_torch() -> None:
    assert (nbtrain.uniform, nbtrain.loguniform, nbtrain.randint) == (uniform, loguniform, randint)
