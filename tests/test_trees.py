"""What a state_dict gives comes back as it was, through strict JSON and named tensors alone."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nbtrain.errors import CheckpointError
from nbtrain.trees import flatten, restore


def there_and_back(tree: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(flatten(tree, "part", tensors), allow_nan=False)
    return restore(json.loads(text), tensors)


def assert_same(one: Any, other: Any) -> None:
    """Compare types and bits, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, (np.ndarray, np.generic)):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for (a, x), (b, y) in zip(one.items(), other.items(), strict=True):
            assert_same(a, b)
            assert_same(x, y)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            assert_same(x, y)
    else:
        assert one == other or (math.isnan(one) and math.isnan(other))


TREES: dict[str, Any] = {
    "plain values": [None, True, False, 0, -1, 2**80, "", "\u00e4\n\x00", 0.1, -0.0, 5e-324],
    "floats that JSON has no word for": [math.nan, math.inf, -math.inf],
    "tuples in lists in tuples": ((), [()], (1, [2, (3,)], {"a": (4,)})),
    "empty things": [{}, [], (), {"": {}}],
    "keys that are no strings": {0: "a", "0": "b", (1, 2): "c", None: "d", 1.5: "e", True: "f"},
    "a key of ours": {"$": "tensor", "name": "nothing", "x": {"$": None}},
    "tensors": {
        "float": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
        "bf16": torch.tensor([0.1, math.inf], dtype=torch.bfloat16),
        "no dimension": torch.tensor(3.5, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "int": torch.tensor([2**62]),
        "empty": torch.empty(0, 3),
    },
    "arrays": {
        "float": np.array([0.1, np.nan]),
        "half": np.array([0.5], dtype=np.float16),
        "no dimension": np.array(7),
        "bool": np.array([[True], [False]]),
        "uint32": np.arange(624, dtype=np.uint32),
        "empty": np.zeros((0, 2)),
        "complex": np.array([1j]),
    },
    "scalars of numpy": [np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True), np.uint8(255)],
    "paths alike": {
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2), "b'": torch.tensor(3)},
        "a/b'": torch.tensor(4),
    },
    "keys alike": {0: torch.tensor(1), "0": torch.tensor(2), (0,): [torch.tensor(3)]},
}


@pytest.mark.parametrize("name", TREES)
def test_what_goes_in_comes_back(name: str) -> None:
    assert_same(there_and_back(TREES[name]), TREES[name])


def test_the_state_of_a_real_optimizer_and_generator_comes_back() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for state in (optimizer.state_dict(), np.random.default_rng(3).bit_generator.state):
        assert_same(there_and_back(state), state)


def test_views_become_what_they_show() -> None:
    x = torch.arange(12).reshape(3, 4)
    tree = {"t": x.T, "part": x[1:, ::2], "expanded": torch.tensor([5]).expand(3)}
    assert_same(there_and_back(tree), tree)
    tensors: dict[str, torch.Tensor] = {}
    flatten(tree, "x", tensors)
    assert all(t.is_contiguous() for t in tensors.values())
    backwards = np.arange(5)[::-1]
    assert there_and_back(backwards).tolist() == [4, 3, 2, 1, 0]
    assert there_and_back(np.array([0.1], dtype=">f8")).tolist() == [0.1]


def test_mappings_and_parameters_become_plain_ones() -> None:
    state = OrderedDict(w=nn.Parameter(torch.ones(2)))
    found = there_and_back(state)
    assert type(found) is dict
    assert type(found["w"]) is torch.Tensor
    assert not found["w"].requires_grad


def test_the_copies_share_nothing_with_the_originals() -> None:
    t, a, mapping = torch.zeros(3), np.zeros(3), {"x": [1]}
    tensors: dict[str, torch.Tensor] = {}
    tree = flatten({"t": t, "view": t[:1], "a": a, "m": mapping}, "part", tensors)
    t += 1
    a += 1
    mapping["x"].append(2)
    mapping["y"] = []
    assert_same(
        restore(tree, tensors),
        {"t": torch.zeros(3), "view": torch.zeros(1), "a": np.zeros(3), "m": {"x": [1]}},
    )


def test_tensors_are_named_by_their_place() -> None:
    tensors: dict[str, torch.Tensor] = {}
    flatten({"state": {0: {"exp_avg": torch.ones(1)}}, "l": [torch.ones(1)]}, "optimizer", tensors)
    assert list(tensors) == ["optimizer/state/0/exp_avg", "optimizer/l/0"]


class Stranger:
    pass


@pytest.mark.parametrize(
    "value",
    [
        Stranger(),
        Stranger,
        {1, 2},
        b"bytes",
        1j,
        Path("x"),
        np.array(["text"]),
        np.array([object()]),
        np.datetime64("2020-01-01"),
        np.longdouble(1),
        torch.eye(2).to_sparse(),
    ],
    ids=repr,
)
def test_what_has_no_form_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"parts/mine/a/1/b is a .* without pickle") as caught:
        flatten({"a": [0, {"b": value}]}, "parts/mine", {})
    assert type(value).__name__ in str(caught.value)


def test_a_key_without_form_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"part is a test_trees\.Stranger"):
        flatten({Stranger(): 1}, "part", {})
