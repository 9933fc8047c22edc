"""A tiny population with everything in it that is random, and what must be equal of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from runs import Noisy
from torch import nn

import nbtrain
from nbtrain.population import space as spaces
from nbtrain.population.evolution import Evolution
from nbtrain.population.table import Row, Table

MEMBERS, EPOCHS = 3, 3


def build(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    return nbtrain.Task(
        model=model, optimizer=optimizer, train=Noisy(), valid=Noisy(), metrics={"accuracy": accuracy}
    )


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).double()


SPACE = {
    "lr": nbtrain.loguniform(1e-3, 1e-1),
    "weight_decay": nbtrain.uniform(0.0, 0.1),
    "accumulate": nbtrain.randint(1, 3),
}


def population(folder: Any, **changes: Any) -> nbtrain.Population:
    """Open the tiny population in a folder."""
    arguments: dict[str, Any] = {
        "members": MEMBERS,
        "interval": "1 epoch",
        "space": SPACE,
        "quantile": 0.4,
        "store": folder,
        "epochs": EPOCHS,
        "batch_size": 3,
        "num_workers": 0,
        "warmup_epochs": 0.5,
        "decay": "cosine",
        "budget": None,
        "bar": False,
        "device": "cpu",
    }
    name = changes.pop("name", "herd")
    return nbtrain.Population(name, changes.pop("build", build), **(arguments | changes))


def bits(found: nbtrain.Population) -> dict[str, Any]:
    """Return all that must be equal: rows, and each member's newest state to the last value."""
    rounds = found._rounds
    all_of: dict[str, Any] = {"rows": found.history, "lineage": [m.lineage for m in found.members]}
    for key in rounds.table.needs():
        state = rounds.shelf.load(key)
        all_of |= {f"{key}.model.{name}": value for name, value in state.model.items()}
        all_of |= {f"{key}.{name}": value for name, value in state.tensors.items()}
        for name in ("place", "loss", "journal", "trees", "options", "logged"):
            all_of[f"{key}.{name}"] = timeless(state.state[name])
    clocks = ("history/steps/seconds", "history/steps/stage")
    return {name: value for name, value in all_of.items() if not name.endswith(clocks)}


def timeless(value: Any) -> Any:
    """Return a tree without what a clock or a kernel wrote into it."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "stage")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    unequal = [name for name in one if not same(one[name], other[name])]
    assert not unequal, f"differ: {unequal}"


def finish(folder: Path, result: Path, **changes: Any) -> None:
    """Open the population, train it to its end, and write its bits down."""
    found = population(folder, **changes).run()
    assert found.state == "done"
    torch.save(bits(found), result)


def grown(
    members: int = 4,
    rounds: int = 3,
    space: Any = None,
    failed: Any = (),
    epochs: int | None = 6,
    **how: Any,
) -> Table:
    """Return a table of rounds that nobody trained: member m scores m + round, or fails."""
    domains = spaces.read(space or {"lr": nbtrain.loguniform(1e-3, 1e-1), "units": [8, 16]})
    table = Table(Evolution(domains, members, 0, **how), epochs)
    for round in range(rounds):
        for turn in table.turns(round):
            if (round, turn.member) in failed:
                table.add(Row.of(turn, error="LossError: nan"))
                continue
            end: dict[str, Any] = {"step": 10 * (round + 1), "epoch": 2 * (round + 1)}
            score = turn.member + round / 10
            table.add(Row.of(turn, score=score, progress=2.0 * (round + 1), **end))
    return table
