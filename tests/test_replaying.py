"""A session replays a population's best schedule: these values at these places, after a cut too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import herds
import pytest
import torch
from runs import Noisy
from torch import nn

import nbtrain
from nbtrain.errors import CheckpointError, SessionError
from nbtrain.population import replaying
from nbtrain.population.making import options

SCHEDULE: list[tuple[float, dict[str, Any]]] = [
    (0.0, {"lr": 0.05, "weight_decay": 0.1, "accumulate": 1}),
    (1.0, {"lr": 0.02, "weight_decay": 0.1, "accumulate": 2}),
    (2.0, {"lr": 0.02, "weight_decay": 0.03, "accumulate": 2}),
]
CONSTANT = {"warmup_epochs": 0, "decay": "constant"}


def session(folder: Path, **changes: Any) -> nbtrain.Session:
    """Open a session that replays, without a schedule of its own unless one is given."""
    arguments: dict[str, Any] = {"store": folder, "epochs": 3, "batch_size": 3, "num_workers": 0}
    arguments |= {"budget": None, "bar": False, "device": "cpu", "replay": SCHEDULE}
    return nbtrain.Session("alone", changes.pop("build", herds.build), **(arguments | changes))


def in_force(found: nbtrain.Session) -> dict[str, Any]:
    group = options(found.task.optimizer)[0]
    return {
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "accumulate": found.journal.settings["accumulate"],
    }


def seen(found: nbtrain.Session) -> list[tuple[float, dict[str, Any]]]:
    """Train in a loop of its own; return what each window was trained with, and where it began."""
    told, before = [], (-1, 0)
    for x, y in found:
        place = found.step, found.epoch
        if place[0] != before[0]:
            told.append((found.progress, in_force(found)))
            before = place
        found.update(found.task.loss(found.task.model(x), y))
    return told


def wanted(at: float) -> dict[str, Any]:
    return [values for place, values in SCHEDULE if place <= at][-1]


def test_every_window_is_trained_with_the_values_of_its_place(tmp_path: Path) -> None:
    told = seen(session(tmp_path))
    assert [at for at, _ in told if at in (0.0, 1.0, 2.0)] == [0.0, 1.0, 2.0]
    assert [values for _, values in told] == [wanted(at) for at, _ in told]


def test_each_change_is_in_the_journal_by_name(tmp_path: Path) -> None:
    found = session(tmp_path).run()
    entries = [(e.progress, e.what, e.old, e.new, e.by) for e in found.journal.entries]
    assert entries == [
        (1.0, "lr", 0.05, 0.02, "replay"),
        (1.0, "group_lrs", [0.05], [0.02], "replay"),
        (1.0, "accumulate", 1, 2, "replay"),
        (2.0, "weight_decay", 0.1, 0.03, "replay"),
    ]
    assert next(row["lr"] for row in found.history if row["progress"] > 1.0) == 0.02


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 12, 13])
def test_cut_anywhere_and_gone_on_with_it_is_the_run_that_was_never_cut(
    tmp_path: Path, cut: int
) -> None:
    whole = session(tmp_path / "whole").run()
    first = session(tmp_path / "cut")
    for x, y in first:
        first.update(first.task.loss(first.task.model(x), y))
        if first.step == cut:
            break
    del first
    found = nbtrain.resume("alone", herds.build, store=tmp_path / "cut", budget=None).run()
    assert isinstance(found, nbtrain.Session) and found.step == whole.step
    for name, value in whole.task.model.state_dict().items():
        assert torch.equal(value, found.task.model.state_dict()[name]), name
    assert found.journal.entries == whole.journal.entries
    assert in_force(found) == SCHEDULE[-1][1]


def test_the_best_of_a_population_is_replayed_and_compared(tmp_path: Path) -> None:
    space = {**herds.SPACE, "weight_decay": nbtrain.uniform(0.01, 0.1)}
    herd = herds.population(tmp_path, epochs=4, space=space, seed=3, resample=1.0).run()
    schedule = herd.schedule
    assert schedule[0][0] == 0.0 and json.loads(json.dumps(schedule))
    alone = herd.replay("alone", **CONSTANT)
    told = seen(alone)
    assert [v for _, v in told] == [
        [values for place, values in schedule if place <= at][-1] for at, _ in told
    ]
    assert alone.is_done and alone.journal.settings["epochs"] == 4
    figure = alone.plot(compare=[herd.replay("again", **CONSTANT)])
    assert len(figure.axes) == 2
    with pytest.raises(SessionError, match="no best yet"):
        herds.population(tmp_path, name="fresh").replay("early")


def test_what_acts_elsewhere_than_in_the_optimizer_is_refused(tmp_path: Path) -> None:
    def build(dropout: float = 0.1, width: int = 8, lr: float = 0.1) -> nbtrain.Task:
        model = nn.Sequential(nn.Linear(6, width), nn.Dropout(dropout), nn.Linear(width, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy())

    stays = {"dropout": 0.1, "width": 8, "lr": 0.1}
    for name, value in {"dropout": 0.5, "width": 16}.items():
        with pytest.raises(SessionError, match=f"'{name}' changes on the way"):
            session(tmp_path, build=build, replay=[(0, stays), (1, {**stays, name: value})])
    found = session(tmp_path, build=build, replay=[(0, {**stays, "dropout": 0.5, "width": 16})])
    assert found.task.model[0].weight.shape[0] == 16 and found.task.model[1].p == 0.5


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([], "must begin at 0"),
        ([(1, {"lr": 0.1})], "must begin at 0"),
        ([(0, {"lr": 0.1}), (0, {"lr": 0.2})], "must begin at 0"),
        ([(0, {"lr": 0.1}), (1, {"weight_decay": 0.2})], "name the same"),
        ([0.1, 0.2], "is no schedule"),
        ("fast", "is no schedule"),
        ([(0, {"speed": 1})], "'speed'"),
        ([(0, {"accumulate": 0})], "accumulate=0"),
    ],
)
def test_what_is_no_schedule_is_refused_before_anything_is_trained(
    tmp_path: Path, schedule: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        session(tmp_path, replay=schedule)
    assert not list(tmp_path.iterdir())


def test_another_schedule_is_another_session(tmp_path: Path) -> None:
    session(tmp_path).run()
    with pytest.raises(CheckpointError, match="schedule to replay has changed"):
        session(tmp_path, replay=SCHEDULE[:2])
    assert session(tmp_path, replay=replaying.read(SCHEDULE)).is_done


def test_a_loop_without_build_has_nothing_to_give_values_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replay= goes with build"):
        nbtrain.Session("alone", store=tmp_path, replay=SCHEDULE, **vars(herds.build()))
