"""Equal words give equal random numbers: in any process, and whatever ran before."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from nbtrain.randomness import WORKSPACE, deterministic, generator, key, sample_rng, seed


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


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Put torch's switches back, and let no workspace be set."""
    monkeypatch.setenv(WORKSPACE, "")  # so that it is put back in any case
    monkeypatch.delenv(WORKSPACE)
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(cudnn, "benchmark", True)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def is_switched() -> list[bool]:
    cudnn = torch.backends.cudnn
    return [torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, not cudnn.benchmark]


def test_deterministic_turns_all_switches_and_refuses_an_operation(
    switches: pytest.MonkeyPatch,
) -> None:
    assert not any(is_switched())
    deterministic()
    assert all(is_switched())
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.parametrize(
    ("version", "workspace"), [("2.9.1+cu128", ":4096:8"), ("2.10.0", None), ("3.0.0", None)]
)
def test_a_workspace_is_set_for_a_torch_that_needs_it(
    switches: pytest.MonkeyPatch, version: str, workspace: str | None
) -> None:
    switches.setattr(torch, "__version__", type(torch.__version__)(version))
    switches.setattr(torch.cuda, "is_initialized", lambda: workspace is None)
    deterministic()
    assert os.environ.get(WORKSPACE) == workspace and all(is_switched())


def test_a_workspace_that_comes_too_late_is_refused_before_anything_is_changed(
    switches: pytest.MonkeyPatch,
) -> None:
    switches.setattr(torch, "__version__", type(torch.__version__)("2.9.1"))
    switches.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=r"(?s)too late.*2\.9\.1.*Restart the kernel"):
        deterministic()
    assert not any(is_switched()) and WORKSPACE not in os.environ
    switches.setenv(WORKSPACE, ":16:8")
    deterministic()
    assert all(is_switched()) and os.environ[WORKSPACE] == ":16:8"


def test_a_samples_own_numpy_generator_is_a_function_of_its_key() -> None:
    found = []
    for before in range(2):
        random.Random(before)
        np.random.default_rng(before)
        seed(0, "train", 0, 7)
        found.append([sample_rng().normal(size=3), sample_rng().normal(size=3)])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(*found[0]), "a second one in the same sample goes on"
    seed(0, "train", 0, 8)
    assert not np.array_equal(sample_rng().normal(size=3), found[0][0])
