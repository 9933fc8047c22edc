"""Digests are of bits; watching sees what moved, who was asked, and leaves the profiler as it was."""

from __future__ import annotations

import datetime
import itertools
import random
import sys
import time
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from nbtrain.evidence import MAX_OBJECTS, digest, holdings, watch

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(1), torch.nextafter(torch.ones(1), torch.zeros(1)), False),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16), True),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64), True),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse(), True),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous(), True),
        (torch.empty(0), torch.empty(0, 3), False),
        (np.arange(3), np.arange(3), True),
        (np.arange(3), np.arange(3.0), False),
        ([torch.ones(1), "a"], [torch.ones(1), "b"], False),
        ([[1], [2]], [[1, 2]], False),
        (Pair(1, 2), Pair(1, 2), True),
        (OrderedDict(a=1), OrderedDict(b=1), False),
        ({"a": None}, {"a": 0}, False),
    ],
)
def test_a_digest_is_of_all_bits_and_of_nothing_else(one: Any, other: Any, are_equal: bool) -> None:
    assert (digest(one) == digest(other)) is are_equal


def test_an_object_is_what_its_attributes_are_and_not_where_it_lies() -> None:
    class Batch:
        def __init__(self, x: float) -> None:
            self.x = torch.tensor(x)

    assert digest(Batch(1.0)) == digest(Batch(1.0)) != digest(Batch(2.0))


def test_the_processs_own_generators_are_not_among_what_is_held() -> None:
    held = {
        "torch": torch.default_generator,
        "numpy": np.random.mtrand._rand,
        "python": random._inst,  # type: ignore[attr-defined]
        "own": random.Random(0),
    }
    assert list(holdings({"x": held})) == ["x", "x['own']"]


def test_a_walk_ends_also_in_circles_and_in_large_data() -> None:
    circle: list[Any] = [1, np.random.default_rng(0)]
    circle += [circle, {"again": circle}]
    assert "x[1]" in holdings({"x": circle})
    deep: list[Any] = []
    for _ in range(2 * MAX_OBJECTS):
        deep = [deep]
    began = time.monotonic()
    holdings({"x": deep, "many": [(i, str(i)) for i in range(1_000_000)]})
    assert time.monotonic() - began < 20


def test_watching_names_what_moved_and_can_put_generators_back() -> None:
    class Thing:
        def __init__(self) -> None:
            self.rng, self.still, self.count = random.Random(0), random.Random(0), itertools.count()
            self.size = [1]

    thing = Thing()

    def act() -> float:
        next(thing.count)
        thing.size.append(1)
        return thing.rng.random()

    seen = watch(act, thing=thing)
    assert seen.names == ["thing.rng, a python Random"]
    assert "thing.size (of 1 items before, 2 after)" in seen.others
    assert "thing.count (count(0) before, count(1) after)" in seen.others
    assert seen.put_back()
    assert act() == seen.result
    assert not watch(lambda: None, thing=thing).put_back()


def test_a_generator_made_meanwhile_is_named_but_cannot_be_put_back() -> None:
    class Lazy:
        rng: Any = None

    lazy = Lazy()
    seen = watch(lambda: setattr(lazy, "rng", np.random.default_rng(0)), lazy=lazy)
    assert seen.names == ["lazy.rng, a numpy Generator"]
    assert not seen.put_back()


@pytest.mark.parametrize(
    ("ask", "is_asked"),
    [
        (lambda: np.random.default_rng(), True),
        (lambda: np.random.RandomState(), True),
        (lambda: random.Random(), True),
        (lambda: random.seed(), True),
        (lambda: torch.Generator().seed(), True),
        (lambda: torch.seed(), True),
        (lambda: time.time(), True),
        (lambda: datetime.datetime.now(), True),
        (lambda: np.random.default_rng(1), False),
        (lambda: random.Random(1), False),
        (lambda: torch.Generator().manual_seed(1), False),
        (lambda: torch.rand(1) + np.random.normal() + random.random(), False),
    ],
)
def test_who_is_asked_for_entropy_is_seen_at_the_users_line(ask: Any, is_asked: bool) -> None:
    state = random.getstate(), torch.get_rng_state()
    seen = watch(ask)
    random.setstate(state[0])
    torch.set_rng_state(state[1])
    assert bool(seen.entropy) is is_asked
    assert all("(lambda: " in line for line in seen.entropy), "the line, as it is written"


def test_the_profiler_is_what_it_was_also_after_an_error() -> None:
    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        watch(lambda: 1 / 0)
    assert sys.getprofile() is before
