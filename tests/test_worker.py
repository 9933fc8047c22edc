"""A worker computes as the process does that it works for, and what it raises can travel."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch
from herds import build

from nbtrain import recipe
from nbtrain.errors import DataError, RecipeError, TaskError
from nbtrain.population.worker import Kit, Switches, Worker, sendable
from nbtrain.recipe import Recipe

ARGUMENTS = {"interval": "1 epoch", "seed": 0, "clip_norm": None}


def kit(source: Recipe | None = None) -> Kit:
    found = recipe.capture(build) if source is None else source
    return Kit("herd", found, {"lr": ["choice", 0.1, 0.2]}, ARGUMENTS, [], "cpu", 1)


@pytest.fixture
def as_before() -> Iterator[None]:
    switches = Switches()
    yield
    switches.throw()


def state() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        (cudnn.benchmark, cudnn.deterministic),
    )


def test_a_worker_takes_over_the_threads_and_the_switches_of_torch(as_before: None) -> None:
    plain = Switches()
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, True
    wanted, sent = state(), pickle.dumps(kit())
    plain.throw()
    assert all(one != other for one, other in zip(state(), wanted, strict=True))
    words, error = Worker().enter(pickle.loads(sent))
    assert error is None and words == f"torch {torch.__version__} on cpu"
    assert state() == wanted


def test_a_recipe_that_fails_in_the_worker_is_told(as_before: None) -> None:
    words, error = Worker().enter(kit(Recipe("import nowhere_at_all\n", "build")))
    assert words == "" and isinstance(error, RecipeError)
    assert "`import nowhere_at_all`" in str(pickle.loads(pickle.dumps(error)))


class Odd(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class OddData(DataError):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ZeroDivisionError("by the user"), ZeroDivisionError, "by the user"),
        (DataError("the sample is gone"), DataError, "the sample is gone"),
        (Odd("a", "b"), TaskError, "Odd: a b"),
        (ValueError(lambda: 1), TaskError, "ValueError: <function"),
    ],
)
def test_what_a_worker_raises_can_travel(error: Exception, kind: type[Exception], words: str) -> None:
    try:
        raise error
    except Exception as raised:
        found = pickle.loads(pickle.dumps(sendable(raised)))
    assert type(found) is kind and str(found).startswith(words)
    assert "In the worker:\nTraceback" in found.__notes__[0]


def test_an_error_of_ours_that_cannot_travel_stays_of_its_kind() -> None:
    with pytest.raises(DataError, match="OddData: a b"):
        raise sendable(OddData("a", "b"))
