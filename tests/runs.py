"""A tiny run with everything in it that is random, and a way to run things in a fresh process."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import nbtrain
from nbtrain import trees

U8 = torch.uint8
NUM_SAMPLES = 23  # windows of 9, 9, 5, the last one of micro-batches of 3 and 2
BATCH, ACCUMULATE, EPOCHS = 3, 3, 2
MICRO_STEPS = 16


class Noisy(Dataset[Any]):
    """Samples whose augmentation uses torch, numpy and python's random."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x = torch.full((6,), index / NUM_SAMPLES)
        x = x + 0.1 * torch.randn(6) + float(np.random.normal()) + random.random()
        return x, index % 3


def build() -> nbtrain.Task:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy())


def session(folder: Path, **changes: Any) -> nbtrain.Session:
    """Open the tiny run in a folder."""
    arguments: dict[str, Any] = {
        "store": folder,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "accumulate": ACCUMULATE,
        "num_workers": 0,
        "warmup_epochs": 1,
        "decay": "cosine",
        "bar": False,
        "device": "cpu",
    }
    return nbtrain.Session("tiny", changes.pop("build", build), **(arguments | changes))


def bits(session: nbtrain.Session) -> dict[str, torch.Tensor]:
    """Return all that must be equal: weights, buffers, optimizer, average, parts, scaler, history."""
    task = session.task
    found = {f"model.{k}": v.clone() for k, v in task.model.state_dict().items()}
    for index, state in task.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
    for name, part in {"ema": task.ema, "scaler": session._live.scaler, **task.parts}.items():
        if part is not None:
            plain = trees.flatten(part.state_dict(), name, found)
            found[f"{name}, plain"] = torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=U8)
    for column in {key for row in session.history for key in row} - {"seconds", "stage"}:
        values = [float("nan") if v is None else v for v in session.history[column]]
        found[f"history.{column}"] = torch.tensor(values, dtype=torch.float64).nan_to_num(-1.0)
    return found


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    unequal = [name for name in one if not torch.equal(one[name], other[name])]
    assert not unequal, f"differ: {unequal}"


def die() -> None:
    """End this process as a taken-away machine does."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut_and_die(folder: Path, micro_step: int, **changes: Any) -> None:
    """Train in a loop of one's own so many micro-steps, save before the next update, and die."""
    run = session(folder, **changes)
    for count, batch in enumerate(run):
        with run.autocast():
            loss, n, output = run.task.run(batch)
        if count == micro_step:
            run.save()
            die()
        run.update(loss, n=n, **run.task.named(output))
    run.save()
    die()


def run_and_die(folder: Path, calls: int, **changes: Any) -> None:
    """Train with `run()`, saving at every boundary, and die in a call of the loss."""
    task = changes.pop("build", build)
    left = iter(range(calls))

    def dying(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            die()
        return nn.functional.cross_entropy(output, target)

    run = session(folder, save_every=1e-9, build=task, **changes)
    run.task.loss = dying
    run.run()
    die()


def finish(folder: Path, result: Path, **changes: Any) -> None:
    """Open the run, train it to its end, and write its bits down."""
    run = session(folder, **changes)
    run.run()
    torch.save(bits(run), result)


def finished(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train the run to its end in a fresh process, and return its bits."""
    result = folder.with_suffix(".pt")
    assert in_fresh_process(finish, folder, result, **changes) == 0
    return torch.load(result)


def assert_exact_wherever_cut(
    folder: Path, micro_steps: Iterable[int], **changes: Any
) -> dict[str, torch.Tensor]:
    """Kill the run at each micro-step, and compare it with one never cut; return the bits of that."""
    expected = finished(folder / "whole", **changes)
    for micro_step in micro_steps:
        cut = folder / f"cut-{micro_step}"
        assert in_fresh_process(cut_and_die, cut, micro_step, **changes) == -signal.SIGKILL
        assert_same_bits(finished(cut, **changes), expected)
    return expected


_fresh = multiprocessing.get_context("forkserver")
# The server imports but never computes, so its forks are as good as fresh interpreters.
_fresh.set_forkserver_preload(["nbtrain.resuming", "torch._dynamo", "torch.utils.data"])


def in_fresh_process(function: Callable[..., None], *args: Any, **kwargs: Any) -> int:
    """Call a function in a process that shares nothing with this one; return its exit code."""
    process = _fresh.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(600)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode
