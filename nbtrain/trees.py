"""What `state_dict` gives, as strict JSON and named tensors, and back.

A tree of dicts, lists, tuples, plain values and tensors becomes JSON in which each tensor is a name;
what JSON does not know, a tuple, a key that is no string, a NaN, is a small object with a "$". The
tensors are copied to the CPU on the way, so the originals may change afterwards. There is no pickle:
reading back can run no code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from nbtrain.errors import CheckpointError


def flatten(tree: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Turn a state_dict into strict JSON, moving a CPU copy of each tensor into `tensors`.

    Args:
        tree: Dicts with any plain keys, lists, tuples, numbers, strings, None, tensors, arrays.
        path: The name that tensors in it get, with their place behind it.
        tensors: Receives the copies; the originals may change afterwards.

    Raises:
        CheckpointError: something in it cannot be written without pickle; names the place.
    """
    # First, because most of a history is that, and what follows asks abstract classes.
    if tree is None or type(tree) in (bool, int, str) or (type(tree) is float and math.isfinite(tree)):
        return tree
    if isinstance(tree, torch.Tensor) and tree.layout == torch.strided:
        copy = tree.detach().to("cpu", copy=True).contiguous()
        return {"$": "tensor", "name": _put(copy, path, tensors)}
    if isinstance(tree, Mapping):
        items = [[k, flatten(v, f"{path}/{k}", tensors)] for k, v in tree.items()]
        if all(isinstance(k, str) and k != "$" for k in tree):
            return dict(items)
        return {"$": "dict", "items": [[flatten(k, path, tensors), v] for k, v in items]}
    if isinstance(tree, (list, tuple)):
        items = [flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(tree)]
        return items if isinstance(tree, list) else {"$": "tuple", "items": items}
    if isinstance(tree, (np.ndarray, np.generic)):
        native = np.array(tree, dtype=tree.dtype.newbyteorder("="), copy=True)
        kind = "array" if isinstance(tree, np.ndarray) else "scalar"
        with suppress(TypeError):  # there are no tensors of strings, dates and objects
            return {"$": kind, "name": _put(torch.from_numpy(native), path, tensors)}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"$": "float", "value": str(tree)}
    raise CheckpointError(
        f"{path} is a {type(tree).__module__}.{type(tree).__qualname__}, which a checkpoint cannot "
        "hold without pickle. Let state_dict() return plain values, tensors or arrays there."
    )


def _put(tensor: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> str:
    """Keep a tensor under its path, or one like it: {"a/b": x} and {"a": {"b": y}} have the same."""
    while path in tensors:
        path += "'"
    tensors[path] = tensor
    return path


def restore(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo `flatten`."""
    if isinstance(tree, list):
        return [restore(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get("$")
    if kind is None:
        return {k: restore(v, tensors) for k, v in tree.items()}
    if kind == "dict":
        return {restore(k, tensors): restore(v, tensors) for k, v in tree["items"]}
    if kind == "tuple":
        return tuple(restore(v, tensors) for v in tree["items"])
    if kind == "float":
        return float(tree["value"])
    tensor = tensors[tree["name"]]
    if kind == "tensor":
        return tensor
    return tensor.numpy() if kind == "array" else tensor.numpy()[()]
