"""Members that train at once end in the bits of members that take turns, whoever is lost on the way.

Workers are in this process here, and give back the newest slice first; `test_cluster` has real ones.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from herds import EPOCHS, MEMBERS, assert_same_bits, bits, build, population
from torch import nn

import nbtrain
from nbtrain import checkpoint
from nbtrain.errors import DataError, NbtrainError, NbtrainWarning, RecipeError, TaskError
from nbtrain.population import cluster, engines
from nbtrain.population.cluster import Done
from nbtrain.population.evolution import Turn
from nbtrain.population.worker import Kit, Worker
from nbtrain.stores import FolderStore


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> nbtrain.Population:
    return population(tmp_path_factory.mktemp("local")).run()


class Near:
    """A cluster of two workers here; what Ray would carry is pickled.

    Attributes:
        lose: How many of the next slices lose their worker.
        cuts: Whether `cut` reaches the workers.
        act: What each loss in a worker does too, if anything.
        now: The worker that is at a slice, and what that is called.
    """

    lose, cuts = 0, True
    act: Callable[[], None] | None = None
    now: tuple[Worker, int]
    made: list[Near]

    def __init__(self, resources: dict[str, Any], *, wants_gpu: bool | None) -> None:
        self.has_gpu, self.kinds = False, set[str]()
        self._workers: deque[Worker] = deque()
        self._at: list[tuple[int, Worker, Turn, Any]] = []
        self._number, self._is_open = 0, False
        Near.made.append(self)

    def open(self) -> bool:
        was, self._is_open = self._is_open, True
        return not was

    def hire(self, count: int, kit: Kit) -> None:
        while len(self._workers) + len(self._at) < min(count, 2):
            worker = Worker()
            kind, error = pickle.loads(pickle.dumps(worker.enter(pickle.loads(pickle.dumps(kit)))))
            if error is not None:
                raise error
            if Near.act is not None:
                vars(sys.modules["nbtrain_recipe_herd"])["HOOK"][:] = [Near.act]
            self.kinds.add(kind)
            self._workers.append(worker)

    @property
    def has_rest(self) -> bool:
        return bool(self._workers)

    @property
    def busy(self) -> list[Turn]:
        return [turn for _, _, turn, _ in self._at]

    def put(self, found: Any) -> Any:
        return pickle.dumps(found)

    def begin(self, turn: Turn, state: Any) -> None:
        self._number += 1
        self._at.append((self._number, self._workers.popleft(), turn, state))

    def wait(self, timeout_s: float) -> list[Done]:
        if not self._at:
            return []
        number, worker, turn, state = self._at.pop()
        if Near.lose:
            Near.lose -= 1
            return [Done(turn, lost="ActorDiedError: killed")]
        Near.now = worker, number
        found = pickle.loads(state) if state is not None else None
        sent = pickle.dumps(worker.slice(number, pickle.loads(pickle.dumps(turn)), found))
        self._workers.append(worker)
        outcome, end = pickle.loads(sent)
        return [Done(turn, outcome, end, pickle.dumps(end))]

    def cut(self) -> list[Any]:
        for number, worker, _, _ in self._at if Near.cuts else []:
            worker.cut(number)
        return []

    def dismiss_busy(self) -> None:
        self._at = []

    def close(self) -> None:
        self._workers.clear()
        self._is_open = False


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> type[Near]:
    Near.made, Near.lose, Near.cuts, Near.act = [], 0, True, None
    monkeypatch.setattr(engines, "Cluster", Near)
    monkeypatch.setattr(cluster, "package", lambda: None)
    return Near


SICK: list[float] = []  # rates that fail; a constant of the recipe
HOOK: list[Any] = []  # called by each loss; the recipe's module has a list of its own
KIND = "user"


class Unwell(Exception):
    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")


def watched(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
    task = build(lr, weight_decay)
    model = task.model

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for act in HOOK:
            act()
        if lr in SICK and model.training:
            if KIND == "data":
                raise DataError("the sample is gone")
            if KIND == "user":
                raise Unwell("by the user", "unwell")
            return nn.functional.cross_entropy(output, target) * float("nan")
        return nn.functional.cross_entropy(output, target)

    task.loss = loss
    return task


def test_whichever_slice_comes_back_first_all_is_as_in_turn(
    local: nbtrain.Population, near: type[Near], tmp_path: Path
) -> None:
    found = population(tmp_path, engine="ray").run()
    assert_same_bits(bits(found), bits(local))
    assert [one.state for one in found.members] == ["done"] * MEMBERS
    for one, other in zip(found.members, local.members, strict=True):
        assert one.scores == other.scores and one.hyperparameters == other.hyperparameters
    assert all(
        torch.equal(v, local.best().state_dict()[n]) for n, v in found.best().state_dict().items()
    )


def test_a_slice_whose_worker_is_lost_is_begun_again(
    local: nbtrain.Population, near: type[Near], tmp_path: Path
) -> None:
    near.lose = 2
    with pytest.warns(NbtrainWarning, match="A worker was lost, member [12]'s slice of round 1"):
        found = population(tmp_path, engine="ray").run()
    assert_same_bits(bits(found), bits(local))


def test_a_slice_that_loses_every_worker_ends_the_training_and_nothing_is_lost(
    local: nbtrain.Population, near: type[Near], tmp_path: Path
) -> None:
    found = population(tmp_path, engine="ray")
    near.lose = 10
    with (
        pytest.warns(NbtrainWarning, match="A worker was lost|'s slice is begun again"),
        pytest.raises(NbtrainError, match=r"has lost its worker 3 times.\n  the last time: ActorDied"),
    ):
        found.run()
    assert found.state == "failed"
    near.lose = 0
    assert_same_bits(bits(found.run()), bits(local))


@pytest.mark.parametrize("kind", ["user", "nan"])
def test_a_member_that_fails_in_a_worker_fails_as_it_does_here(
    local: nbtrain.Population, near: type[Near], tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "KIND", kind)
    SICK[:] = [row["lr"] for row in local.history[:2]]
    try:
        here = population(tmp_path / "here", build=watched).run()
        there = population(tmp_path / "there", build=watched, engine="ray").run()
        assert [row["score"] is None for row in here.history[:MEMBERS]] == [True, True, False]
        assert_same_bits(bits(there), bits(here))
        assert [row["error"] for row in there.history] == [row["error"] for row in here.history]
    finally:
        SICK.clear()


def test_where_all_fail_the_first_error_is_raised_with_the_workers_traceback(
    local: nbtrain.Population, near: type[Near], tmp_path: Path
) -> None:
    SICK[:] = [row["lr"] for row in local.history[:MEMBERS]]
    try:
        found = population(tmp_path, build=watched, engine="ray")
        with pytest.raises(TaskError, match="Unwell: by the user: unwell") as told:
            found.run()
    finally:
        SICK.clear()
    notes = "\n".join(told.value.__notes__)
    assert "in loss" in notes and "All members have failed in round 1" in notes


def test_an_error_of_the_data_in_a_worker_ends_the_training_and_nothing_is_lost(
    local: nbtrain.Population, near: type[Near], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "KIND", "data")
    SICK[:] = [local.history[1]["lr"]]
    try:
        found = population(tmp_path, build=watched, engine="ray")
        with pytest.raises(DataError, match="the sample is gone"):
            found.run()
    finally:
        SICK.clear()
    assert found.state == "failed" and all(row["score"] is not None for row in found.history)
    assert_same_bits(bits(population(tmp_path, engine="ray").run()), bits(local))


@pytest.mark.parametrize("cut_at", [3, 12, 40, 75])
@pytest.mark.parametrize("again", ["ray", "local", "here"])
def test_stopped_inside_a_slice_its_part_is_gone_on_with_by_any_engine(
    local: nbtrain.Population, near: type[Near], tmp_path: Path, cut_at: int, again: str
) -> None:
    found = population(tmp_path, build=watched, engine="ray")
    calls = [0]

    def cut() -> None:
        calls[0] += 1
        if calls[0] == cut_at:
            found.pause() if again == "here" else found.stop()
            near.now[0].cut(near.now[1])

    near.act = cut
    found.run()
    assert found.state == ("paused" if again == "here" else "stopped")
    assert checkpoint.find([FolderStore(tmp_path)], "herd")[0].facts["partial"]
    other = found if again == "here" else population(tmp_path, build=watched, engine=again)
    assert_same_bits(bits(other.run()), bits(local))
    assert calls[0] - MEMBERS * EPOCHS * 16 <= 8, "a validation at most is done again"


def test_several_parts_are_kept_and_all_of_them_gone_on_with(
    local: nbtrain.Population, near: type[Near], tmp_path: Path
) -> None:
    found = population(tmp_path, build=watched, engine="ray")
    calls = [0]

    def cut() -> None:
        calls[0] += 1
        if calls[0] in (5, 8):  # five losses of one member's slice, then three of another's
            found.stop()
            near.now[0].cut(near.now[1])

    near.act, near.cuts = cut, False
    found.run()
    parts = [m for m in checkpoint.find([FolderStore(tmp_path)], "herd") if m.facts["partial"]]
    assert len({m.facts["member"] for m in parts}) == len(parts) == 2
    again = population(tmp_path)
    assert again._rounds.founded.parts.keys() == {(0, m.facts["member"]) for m in parts}
    assert_same_bits(bits(again.run()), bits(local))
    left = checkpoint.find([FolderStore(tmp_path)], "herd")
    assert not any(m.facts["partial"] for m in left)


def test_one_line_goes_on_with_the_engine_that_it_had(near: type[Near], tmp_path: Path) -> None:
    asked = {"num_cpus": 2, "resources": {"tape": 0.5}}
    population(tmp_path, epochs=1, engine="ray", resources=asked).run()
    again = nbtrain.resume("herd", store=tmp_path, trust_code=True, device="cpu", epochs=2, bar=False)
    assert again.status()["arguments"]["resources"] == asked
    assert len(near.made) == 2 and again.run().is_done
    other = nbtrain.resume("herd", store=tmp_path, trust_code=True, engine="local", device="cpu")
    assert len(near.made) == 2 and len(other.history) == 2 * MEMBERS


def test_where_workers_train_they_grade_what_they_go_on_from(near: type[Near], tmp_path: Path) -> None:
    population(tmp_path, epochs=1, engine="ray").run()
    again = population(tmp_path, epochs=2, engine="ray")
    assert "(" not in again.status()["resumed"], "what they compute with is not known yet"
    assert again.run().status()["resumed"].endswith("(exact)")
    before, threads = population(tmp_path, epochs=3, engine="ray"), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        before.run()
    finally:
        torch.set_num_threads(threads)
    said = f"herd: goes on (same order: CPU threads {threads} -> {threads + 1})."
    assert before.lines.count(said) == 1


def test_workers_that_are_not_alike_are_told_of(near: type[Near], tmp_path: Path) -> None:
    found = population(tmp_path, epochs=1, engine="ray")
    near.made[0].kinds.add("torch 0.4 on cpu")
    with pytest.warns(NbtrainWarning, match="not all are alike: torch 0.4 on cpu; torch"):
        found.run()


# ---- what is refused


@pytest.mark.parametrize(
    "resources", ["gpu", {"num_gpus": -1}, {1: 2}, {"num_cpus": "two"}, {"memory": [1]}]
)
def test_resources_that_are_none_are_refused(near: type[Near], tmp_path: Path, resources: Any) -> None:
    with pytest.raises(ValueError, match="resources="):
        population(tmp_path, engine="ray", resources=resources)
    assert not any(tmp_path.iterdir())


def test_a_recipe_that_is_not_complete_is_refused_with_what_is_missing(
    near: type[Near], tmp_path: Path
) -> None:
    lock = object()

    def closed(lr: float = 0.1) -> nbtrain.Task:
        assert lock is not None
        return build(lr)

    with (
        pytest.warns(NbtrainWarning, match="A fresh kernel could not rebuild"),
        pytest.raises(RecipeError, match=r"A Ray worker cannot build the task.*\n.*`lock`"),
    ):
        population(tmp_path, build=closed, space={"lr": [0.1, 0.2]}, engine="ray")


def test_where_ray_is_missing_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nbtrain\[ray\]'"):
        population(tmp_path, engine="ray")
    assert not any(tmp_path.iterdir())


def test_nothing_of_ray_is_imported_before_it_is_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from herds import population;"
        f"population(Path({str(tmp_path)!r}), epochs=1).run(); print('ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    where = Path(__file__).parent
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=where)
    assert found.stdout.split()[-1] == "False"
