"""One window of a run, trained and told as hashes, so that two processes can be compared.

Only the task is changed by it: the place, the losses and the history of the run itself stay, since a
second `Live` counts, which nobody keeps. Nothing is saved. What is told is::

    place      step, epoch, position
    loaded     weights, buffers, optimizer, parts, history, settings, as they were before the window
    samples    the window's batches, as the data set gave them
    trained    the window's loss; weights, buffers, optimizer and parts after it
    kernel     what the process computes with: its fingerprint, and autocast
    beyond     in words, where the window is another than the very next, or ""
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from nbtrain import parts, trees
from nbtrain.errors import CheckpointError
from nbtrain.history import History
from nbtrain.journal import Journal
from nbtrain.live import Live
from nbtrain.opening import Opened
from nbtrain.task import Task


def seen(opened: Opened, live: Live, *, trains: bool) -> dict[str, Any]:
    """Train the next window, and return what it began with, took and made, as plain values.

    Args:
        opened: The data.
        live: Where the run is; only its task changes.
        trains: False only reads the samples, and leaves "trained" out.
    """
    task, settings = opened.task, live.journal.settings
    journal = Journal.from_state_dict(live.journal.state_dict(), live.journal)
    twin = opened.live()
    twin.journal = journal
    scaling = None if live.scaler is None else live.scaler.state_dict()
    twin.adopt(scaling)
    twin.step, twin.epoch, twin.position = live.place
    twin.num_samples, beyond = live.num_samples, ""
    twin.rooms = live.rooms
    window, epochs = twin.next_window(), settings["epochs"]
    if window is None:  # the epoch is to be validated first, which changes nothing of the next one
        twin.epoch, twin.position = live.epoch + 1, 0
        twin.num_samples = opened.order.length(twin.epoch)
        window, beyond = twin.next_window(), "with the first window of the next epoch"
    if twin.is_done:
        epochs, beyond = None, "with a window of one epoch more, since all are done"
    assert window is not None
    is_autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    found: dict[str, Any] = {
        "place": list(live.place),
        "beyond": beyond,
        "kernel": opened.fingerprint(live) | {"autocast": is_autocast},
        "loaded": _bits(task, live.history)
        | {
            "settings": _hash(journal.state_dict()),
            "scaler": _hash(scaling),
        },
    }
    if not task.model.training:
        task.model.train()
    twin.begin(window)
    opened.train.start(twin.epoch, twin.position, settings["batch_size"], epochs, twin.room)
    given: list[tuple[int, Any]] = []
    samples: dict[str, str] = {}
    while len(given) < window.num_micro_steps:
        given.append(next(opened.train))
        num_samples, batch = given[-1]
        samples[f"micro-batch {len(given)}"] = _hash_of_batch(batch)
        if trains:
            # A copy, because the user's step may write into what is to be given again.
            twin.micro_step((num_samples, copy.deepcopy(batch)), opened.seed)
    opened.train.put_back(given)
    found["samples"] = samples
    if trains:
        assert window.loss is not None
        found["trained"] = hashed({"loss": window.loss}) | _bits(task, History())
    return found


def _bits(task: Task, history: History) -> dict[str, str]:
    """Hash all that a task and a history hold; also buffers that no state_dict has."""
    model, tensors, plain = parts.take(task, history, None)
    buffers = {name: b for name, b in task.model.named_buffers() if name not in model}
    hashes = hashed({f"model/{name}": tensor for name, tensor in (model | buffers).items()})
    rest = {f"{name}, its plain values": _hash(tree) for name, tree in plain.items()}
    return hashes | hashed(tensors) | rest


def hashed(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each tensor's sha256, over its dtype, shape and bytes."""
    return {name: _hash_of_tensor(tensor) for name, tensor in tensors.items()}


def _hash_of_tensor(tensor: Tensor) -> str:
    form = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return sha256(form + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _hash_of_batch(batch: Any) -> str:
    tensors: dict[str, Tensor] = {}
    try:
        tree = trees.flatten(batch, "batch", tensors)
    except CheckpointError:  # of the user's own class: what it led to is compared all the same
        return ""
    return _hash([tree, hashed(tensors)])


def _hash(tree: Any) -> str:
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
