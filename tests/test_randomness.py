"""Equal words give equal random numbers: in any process, and whatever ran before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from nbtrain.randomness import generator, key, seed


def drawn() -> list[Any]:
    """Draw from everything that a sample or a layer may draw from."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.normal()),
        int(np.random.randint(1000)),
        torch.rand(3).tolist(),
        torch.randperm(5).tolist(),
        torch.nn.functional.dropout(torch.ones(8), 0.5).tolist(),
    ]


def test_equal_words_give_equal_numbers_whatever_was_drawn_before() -> None:
    seed(0, "step", 3, 1)
    expected = drawn()
    for before in range(1, 4):
        for _ in range(before):
            drawn()
        random.gauss(0, 1)  # gauss and normal keep a second value back for their next call
        np.random.normal()
        seed(0, "step", 3, 1)
        assert drawn() == expected


def test_another_word_gives_other_numbers_everywhere() -> None:
    seed(0, "step", 3, 1)
    one = drawn()
    for words in ((1, "step", 3, 1), (0, "valid", 3, 1), (0, "step", 4, 1), (0, "step", 3, 2)):
        seed(*words)
        assert not [a for a, b in zip(one[:3], drawn()[:3], strict=True) if a == b]


def test_keys_are_hashed_so_that_neighbours_share_nothing() -> None:
    words = [
        (0, 1),
        (1, 0),
        (1,),
        ("1",),
        (1, 1),
        (11,),
        ("1", 1),
        (1, "1"),
        ("a", "b"),
        ("ab",),
        ("a', 'b",),
        (-1,),
        (),
    ]
    assert len({key(*w) for w in words}) == len(words)
    assert len({key(s, "order", e) for s in range(30) for e in range(30)}) == 900


def test_a_key_is_what_it_has_always_been() -> None:
    """Every run that was ever saved depends on it: a change here ends exact resume for all of them.

    Two numbers written down also show that it is the same in every process and on every machine.
    """
    assert key(0, "train", 3, 41_234) == 0x825FC5AB777EABBF
    assert key(0, "build") == 0x72F365C4435D94A8
    assert 0 <= key() < 2**64


def test_a_generator_of_its_own_leaves_the_global_ones_alone() -> None:
    seed(5)
    expected = drawn()
    seed(5)
    first = torch.rand(4, generator=generator(0, "order", 0))
    assert drawn() == expected
    assert torch.equal(first, torch.rand(4, generator=generator(0, "order", 0)))
    assert not torch.equal(first, torch.rand(4, generator=generator(0, "order", 1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_on_the_gpu_is_keyed_too() -> None:
    found = []
    for _ in range(2):
        seed(0, "step", 1, 0)
        found.append(torch.nn.functional.dropout(torch.ones(99, device="cuda"), 0.5))
        torch.rand(3, device="cuda")
    assert torch.equal(*found)
