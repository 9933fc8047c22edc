"""A population is a function of its arguments and its seed, however it was stopped and gone on with."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from herds import EPOCHS, MEMBERS, SPACE, Noisy, assert_same_bits, bits, build, population
from runs import in_fresh_process, session
from torch import nn

import nbtrain
from nbtrain import checkpoint, opening
from nbtrain.errors import (
    CheckpointError,
    DataError,
    LossError,
    NbtrainWarning,
    SessionError,
    StoreError,
    TaskError,
    TrustError,
)
from nbtrain.population.rounds import Rounds
from nbtrain.stores import FolderStore, KaggleStore


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> nbtrain.Population:
    return population(tmp_path_factory.mktemp("whole")).run()


def calling(act: Callable[[int], None], **fields: Any) -> Callable[..., nbtrain.Task]:
    """Return a build whose loss calls back with the number of its call, then does its work."""
    calls = iter(range(10**9))

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        act(next(calls))
        return nn.functional.cross_entropy(output, target)

    def watched(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
        task = build(lr, weight_decay)
        task.loss = loss
        for name, value in fields.items():
            setattr(task, name, value)
        return task

    return watched


QUIET = pytest.mark.filterwarnings("ignore:A fresh kernel could not rebuild")


# ---- the same bits


def test_the_line_counts_no_round_that_never_comes(whole: nbtrain.Population, tmp_path: Path) -> None:
    class Line:
        def put(self, done: int, text: str) -> None:
            said.append(f"{done}: {text}")

    said: list[str] = []
    for found in (population(tmp_path), whole):
        found._rounds.draw(Line())  # type: ignore[arg-type]
    assert said[0].startswith("0: round 1, best") and said[1].startswith("9: round 3, best")


def test_two_plain_runs_are_equal(whole: nbtrain.Population, tmp_path: Path) -> None:
    torch.manual_seed(1)
    again = population(tmp_path).run()
    assert_same_bits(bits(again), bits(whole))
    assert any(one.lineage for one in whole.members)
    assert again.history != population(tmp_path / "other", seed=1).run().history


@QUIET
@pytest.mark.parametrize("stop_at", [2, 9, 16, 21, 47, 70, 100])
def test_stopped_inside_a_slice_and_run_again_it_ends_in_the_same_bits(
    whole: nbtrain.Population, tmp_path: Path, stop_at: int
) -> None:
    made: list[nbtrain.Population] = []
    stopping = calling(lambda call: made[0].stop() if call == stop_at and made else None)
    made.append(population(tmp_path, build=stopping))
    made[0].run()
    assert (made[0].state, made[0].reason) == ("stopped", "stop")
    made[0].run()
    assert made[0].state == "done"
    assert_same_bits(bits(made[0]), bits(whole))


@QUIET
@pytest.mark.parametrize("stop_at", [2, 12, 30, 60, 90])
def test_a_cut_slice_is_saved_and_gone_on_with_where_it_was(
    whole: nbtrain.Population, tmp_path: Path, stop_at: int
) -> None:
    made: list[nbtrain.Population] = []
    calls = [0]

    def count(call: int) -> None:
        calls[0] += 1
        if call == stop_at and made:
            made[0].stop()

    made.append(population(tmp_path, build=calling(count)))
    tried = calls[0]
    made[0].run()
    newest = checkpoint.find([FolderStore(tmp_path)], "herd")[0]
    # A slice is 8 losses of training and 8 of validation; at an end of these nothing is under way.
    assert newest.facts["partial"] == (stop_at % 16 != 0)
    again = population(tmp_path, build=calling(count)).run()
    assert_same_bits(bits(again), bits(whole))
    done_twice = calls[0] - tried - MEMBERS * EPOCHS * 16
    assert done_twice <= 8, "a validation at most is done again"


@QUIET
def test_cut_by_its_budget_again_and_again_it_ends_in_the_same_bits(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    """A clock that goes a second with each loss, and kernels of a minute."""
    now = [0.0]

    def tick(call: int) -> None:
        now[0] += 1.0

    reasons = []
    for _ in range(20):
        found = population(
            tmp_path,
            build=calling(tick),
            budget=40,
            started_at=time.time(),
            clock=lambda: now[0],
        )
        found.run()
        reasons.append(found.reason)
        assert found.budget.left_s >= 0
        if found.state == "done":
            break
    assert reasons == ["budget"] * (len(reasons) - 1) + ["done"] and len(reasons) >= 4
    assert_same_bits(bits(found), bits(whole))


@QUIET
def test_paused_it_goes_on_in_this_kernel_and_saved_often_it_is_the_same(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    made: list[nbtrain.Population] = []
    pausing = calling(lambda call: made[0].pause() if call % 37 == 36 and made else None)
    made.append(population(tmp_path, build=pausing, save_every=1e-9))
    seen = []
    while made[0].state != "done":
        made[0].start().wait()
        seen.append(made[0].state)
    assert set(seen) == {"paused", "done"} and len(seen) >= 3
    assert_same_bits(bits(made[0]), bits(whole))


def resume_and_finish(folder: Path, result: Path) -> None:
    found = nbtrain.resume("herd", store=folder, trust_code=True, device="cpu", bar=False)
    assert isinstance(found, nbtrain.Population)
    torch.save((found.status()["resumed"], bits(found.run())), result)


def test_one_line_in_a_fresh_kernel_goes_on(whole: nbtrain.Population, tmp_path: Path) -> None:
    first = population(tmp_path / "herd")
    close = first._rounds._close

    def stopping(*args: Any) -> None:
        close(*args)
        if len(first.history) == 4:
            first.stop()

    first._rounds._close = stopping  # type: ignore[method-assign]
    first.run()
    with pytest.raises(TrustError, match=r"(?s)a population of 3 in round 2, best score .*def build"):
        nbtrain.resume("herd", store=tmp_path / "herd")
    result = tmp_path / "bits.pt"
    assert in_fresh_process(resume_and_finish, tmp_path / "herd", result) == 0
    at, found = torch.load(result, weights_only=False)
    assert at.startswith("resumed in round 2, 4 slices, ")
    assert at.endswith(", stage 2 (exact)")
    assert_same_bits(found, bits(whole))


@pytest.fixture
def threads() -> Iterator[int]:
    """How many there are, now and afterwards."""
    num_threads = torch.get_num_threads()
    yield num_threads
    torch.set_num_threads(num_threads)


def test_a_kernel_that_computes_otherwise_is_told_when_it_is_opened(
    tmp_path: Path, threads: int
) -> None:
    population(tmp_path, epochs=1).run()
    torch.set_num_threads(threads + 1)
    again = population(tmp_path, epochs=2)
    differs = f"CPU threads {threads} -> {threads + 1}"
    assert again.status()["resumed"].endswith(f"(same order: {differs})")
    assert again.lines[0].count("same order") == 1
    again.run()
    assert not [line for line in again.lines[1:] if "same order" in line], "it was said"


def test_a_kernel_that_computes_otherwise_since_is_told_when_it_goes_on(
    tmp_path: Path, threads: int
) -> None:
    population(tmp_path, epochs=1).run()
    again = population(tmp_path, epochs=2)
    assert again.status()["grade"] == "exact"
    torch.set_num_threads(threads + 1)
    again.run()
    said = [line for line in again.lines if "same order" in line]
    assert said == [f"herd: goes on (same order: CPU threads {threads} -> {threads + 1})."]
    assert again.status()["differences"] == [f"CPU threads: {threads} -> {threads + 1}"]


def test_another_code_of_build_is_told_and_the_resume_is_approximate(tmp_path: Path) -> None:
    population(tmp_path, epochs=1).run()

    def other(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
        return build(lr, weight_decay)

    again = population(tmp_path, epochs=2, build=other).status()
    assert again["grade"] == "approximate"
    assert [told.partition(":")[0] for told in again["differences"]] == ["code of build"]


def test_longer_runs_go_on_from_the_end_of_shorter_ones(tmp_path: Path) -> None:
    short = population(tmp_path, decay="constant", epochs=2).run()
    assert short.is_done and len(short.history) == 6
    longer = population(tmp_path, decay="constant", epochs=4).run()
    assert longer.is_done and len(longer.history) == 12
    straight = population(tmp_path / "straight", decay="constant", epochs=4).run()
    assert longer.history == straight.history


# ---- rounds


def test_nobody_is_replaced_in_a_random_search_and_the_first_draw_is_the_same(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    found = population(tmp_path, mode="random").run()
    assert [row["source"] for row in found.history[MEMBERS:]] == [0, 1, 2] * (EPOCHS - 1)
    assert found.history[:MEMBERS] == whole.history[:MEMBERS]
    assert not any(one.lineage for one in found.members)


def test_halving_ends_the_worst_and_their_states_are_still_there(tmp_path: Path) -> None:
    found = population(tmp_path, mode="halving", members=4, quantile=0.5).run()
    sizes = [sum(row["round"] == round for row in found.history) for round in range(1, EPOCHS + 1)]
    assert sizes == [4, 2, 1] and found.is_done
    again = population(tmp_path, mode="halving", members=4, quantile=0.5)
    states = [one.state for one in again.members]
    assert sorted(states) == ["done", "ended", "ended", "ended"]
    for one, other in zip(found.members, again.members, strict=True):
        for name, value in one.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], value)


def test_who_ends_in_a_halving_is_said(tmp_path: Path) -> None:
    found = population(tmp_path, mode="halving").run()
    ended = [member.id for member in found.members if member.state == "ended"]
    told = " ".join(line for line in found.lines if line.startswith("round"))
    assert ended and told.count(" ends") == len(ended)
    assert all(f"{member} ends" in told for member in ended)


def test_every_exploit_is_in_the_lineage_and_its_changes_are_in_force(
    whole: nbtrain.Population,
) -> None:
    seen = 0
    for one in whole.members:
        for event in one.lineage:
            row = next(r for r in one.rows if r.round + 1 == event["round"])
            donor = whole.members[event["donor"]].rows[event["round"] - 2]
            expected = donor.hyperparameters | {c["what"]: c["new"] for c in event["changes"]}
            assert row.hyperparameters == expected
            seen += 1
        assert one.journal.settings["accumulate"] == one.hyperparameters["accumulate"]
        assert one.journal.group_lrs == [one.hyperparameters["lr"]]
    assert seen >= 2


def test_the_best_is_a_copy_of_the_best_members_model(whole: nbtrain.Population) -> None:
    best = min(whole.members, key=lambda one: (one.score, one.id))
    model = whole.best()
    assert not model.training and model is not best.model
    for name, value in best.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert whole.status()["best_member"] == best.id


def test_status_is_plain_and_members_say_where_they_stand(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    status = whole.status()
    json.dumps(status)
    assert (status["state"], status["num_slices"], status["round"]) == ("done", 9, EPOCHS)
    (saved,) = status["saved"]  # all that is kept, not the newest checkpoint alone
    folder = Path(saved["place"].removeprefix("folder "))
    kept = [file.stat().st_size for file in folder.rglob("*.safetensors")]
    assert len(kept) >= 2 * MEMBERS and saved["num_bytes"] > sum(kept)
    assert {one.state for one in whole.members} == {"done"}
    assert len(whole.members[0].scores) == EPOCHS
    new = population(tmp_path)
    assert {one.state for one in new.members} == {"ready"} and new.members[0].score is None
    with pytest.raises(SessionError, match="no best yet"):
        new.best()
    with pytest.raises(SessionError, match="Member 1 has no state yet"):
        _ = new.members[1].model
    assert "3 members, round 1, no best yet" in repr(new)


def widths(lr: float = 0.1, hidden: int = 8, depth: int = 1) -> nbtrain.Task:
    layers = [nn.Linear(6, hidden), *(nn.Linear(hidden, hidden) for _ in range(depth))]
    model = nn.Sequential(*layers, nn.Linear(hidden, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy())


def test_what_shapes_the_model_travels_with_its_weights_and_the_user_is_told(tmp_path: Path) -> None:
    space = {"lr": SPACE["lr"], "hidden": nbtrain.randint(4, 32), "depth": [1, 2]}
    found = population(tmp_path, build=widths, space=space, members=4, resample=1.0, epochs=4)
    assert any("depth, hidden: shapes the model" in line for line in found.lines)
    assert found.status()["travels_with_weights"] == ["depth", "hidden"]
    found.run()
    events = [event for one in found.members for event in one.lineage]
    assert events and all(c["what"] == "lr" for event in events for c in event["changes"])
    for one in found.members:
        assert one.model[0].out_features == one.hyperparameters["hidden"]
    again = population(tmp_path, build=widths, space=space, members=4, resample=1.0, epochs=4)
    assert again.status()["travels_with_weights"] == ["depth", "hidden"]


# ---- failures


def failing(when: Callable[[float], bool], raises: Callable[[], Exception] | None) -> Any:
    def sick(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
        task = build(lr, weight_decay)

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            value = nn.functional.cross_entropy(output, target)
            if when(lr) and task.model.training:
                if raises is not None:
                    raise raises()
                return value * math.nan
            return value

        task.loss = loss
        return task

    return sick


@QUIET
@pytest.mark.parametrize("raises", [None, lambda: ZeroDivisionError("by the user")])
def test_a_member_that_fails_is_named_and_replaced(tmp_path: Path, raises: Any) -> None:
    first = population(tmp_path / "look").run()
    worst = [row["lr"] for row in first.history[:MEMBERS]]
    # Two of three, more than the quantile: the one that is left is copied by both.
    sick = failing(lambda lr: lr in worst[:2], raises)
    found = population(tmp_path / "herd", build=sick).run()
    rows = found.history
    assert [row["score"] is None for row in rows[:MEMBERS]] == [True, True, False]
    assert [row["source"] for row in rows[MEMBERS : 2 * MEMBERS]] == [2, 2, 2]
    assert found.is_done and all(one.score is not None for one in found.members)
    words = "LossError: The loss is nan" if raises is None else "ZeroDivisionError: by the user"
    assert any(f"member 0 has failed in round 1: {words}" in line for line in found.lines)
    assert words in rows[0]["error"]
    again = population(tmp_path / "herd", build=sick)
    assert again.history == rows


def test_one_damaged_state_of_a_finished_population_does_not_hide_the_others(tmp_path: Path) -> None:
    done = population(tmp_path, members=2, quantile=0.5).run()
    best = done.best_row
    assert best is not None
    (other,) = {0, 1} - {best.member}
    wanted = done.best().state_dict()
    found = checkpoint.find([FolderStore(tmp_path)], "herd")
    last = next(m for m in found if m.facts["member"] == other)
    file = tmp_path / last.path(checkpoint.MODEL)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(NbtrainWarning, match="is damaged and set aside"):
        again = population(tmp_path, members=2, quantile=0.5)
    if again.is_done:  # else its last slice is trained again
        assert all(torch.equal(v, wanted[k]) for k, v in again.best().state_dict().items())
        with pytest.raises(CheckpointError, match=f"member {other} after round"):
            _ = again.members[other].model
    else:
        assert_same_bits(bits(again.run()), bits(done))
    with pytest.warns(NbtrainWarning), pytest.raises(CheckpointError, match="No checkpoint is whole"):
        population(tmp_path, members=2, quantile=0.5, epochs=EPOCHS + 1)


@QUIET
def test_where_all_fail_the_first_error_is_raised_and_the_round_can_be_tried_again(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    ill = [False]
    sick = failing(lambda lr: ill[0], lambda: ZeroDivisionError("by the user"))
    found = population(tmp_path, build=sick)
    close = found._rounds._close

    def falling_ill(row: Any, taken: Any) -> None:
        close(row, taken)
        ill[0] = (row.round, row.member) >= (0, 2)

    found._rounds._close = falling_ill  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError, match="by the user") as told:
        found.run()
    assert "All members have failed in round 2" in told.value.__notes__[0]
    assert found.state == "failed" and len(found.history) == 6
    found._rounds._close = close  # type: ignore[method-assign]
    for again in (population(tmp_path, build=sick), found):
        ill[0] = False
        if again is not found:
            assert len(again.history) == MEMBERS
            assert_same_bits(bits(again.run()), bits(whole))


@QUIET
def test_where_all_diverge_the_advice_is_for_a_population(tmp_path: Path) -> None:
    found = population(tmp_path, build=failing(lambda lr: True, None))
    with pytest.raises(LossError, match=r"loss is nan at step .*\nGive the space lower rates") as told:
        found.run()
    assert "session.set" not in str(told.value)


@QUIET
def test_in_the_same_kernel_too_a_failed_round_is_tried_again(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    ill = [True]
    sick = failing(lambda lr: ill[0], lambda: ZeroDivisionError("by the user"))
    found = population(tmp_path, build=sick)
    with pytest.raises(ZeroDivisionError):
        found.run()
    ill[0] = False
    assert_same_bits(bits(found.run()), bits(whole))


@QUIET
def test_an_error_of_the_data_is_no_members_fault_and_nothing_is_lost(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    broken = [False]

    class Torn(Noisy):
        def __getitem__(self, index: int) -> Any:
            if broken[0] and index == 13:
                raise OSError("the sample is gone")
            return super().__getitem__(index)

    def tear(call: int) -> None:
        broken[0] = broken[0] or call == 50

    found = population(tmp_path, build=calling(tear, train=Torn()))
    with pytest.raises(DataError, match="the sample is gone"):
        found.run()
    assert found.state == "failed" and all(row["score"] is not None for row in found.history)
    broken[0] = False
    assert_same_bits(bits(found.run()), bits(whole))


def test_a_save_that_fails_is_told_and_made_up_for(
    whole: nbtrain.Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = population(tmp_path)
    commit, commits = checkpoint.commit, iter(range(100))

    def refusing(*args: Any) -> Any:
        if next(commits) in (2, 3):
            raise StoreError("The disk is full.")
        return commit(*args)

    monkeypatch.setattr(checkpoint, "commit", refusing)
    with pytest.warns(NbtrainWarning, match="A save failed, training goes on: The disk is full"):
        found.run()
    assert_same_bits(bits(population(tmp_path)), bits(whole))


def test_where_the_last_save_fails_that_is_raised_and_run_again_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = population(tmp_path, epochs=1)
    commit, full = checkpoint.commit, [False]

    def refusing(*args: Any) -> Any:
        if full[0]:
            raise StoreError("The disk is full.")
        return commit(*args)

    monkeypatch.setattr(checkpoint, "commit", refusing)
    close = found._rounds._close

    def filling(row: Any, taken: Any) -> None:
        full[0] = row.member == MEMBERS - 1
        close(row, taken)

    found._rounds._close = filling  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="The disk is full"):
        found.run()
    full[0] = False
    assert found.run().state == "done"
    assert len(population(tmp_path, epochs=1).history) == MEMBERS


@QUIET
def test_an_interrupt_ends_the_window_and_saves_the_part_of_the_slice(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    def press(call: int) -> None:
        if call == 50:
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 30
            while not found.asked and time.monotonic() < deadline:
                time.sleep(0.001)  # else so small a population may be done before it is heard

    found = population(tmp_path, build=calling(press))
    with pytest.raises(KeyboardInterrupt, match="everything is saved"):
        found.run()
    assert (found.state, found.reason) == ("stopped", "interrupt")
    assert_same_bits(bits(population(tmp_path).run()), bits(whole))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"members": 1}, ValueError, "members=1"),
        ({"quantile": 0.51}, ValueError, "quantile=0.51"),
        ({"space": {}}, ValueError, "no hyperparameter to search"),
        ({"space": {"widht": [1, 2]}}, ValueError, "'widht', which build does not take"),
        ({"interval": "soon"}, ValueError, "interval='soon'"),
        ({"mode": "grid"}, ValueError, "mode='grid'"),
        ({"direction": "up"}, ValueError, "direction='up'"),
        ({"engine": "cloud"}, ValueError, "engine='cloud'"),
        ({"resources": {"num_cpus": 2}}, ValueError, "is for Ray's workers, and engine='local'"),
        ({"metric": "f1"}, TaskError, "metric='f1' is not among .* valid_loss, accuracy"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"seed": 1.5}, ValueError, "seed=1.5"),
        ({"name": "../herd"}, ValueError, "is no name"),
    ],
)
def test_an_argument_without_sense_is_refused_before_any_training(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        population(tmp_path, **changes)
    assert not any(tmp_path.iterdir())


CACHED = torch.nn.Linear(6, 8)


def sharing(lr: float = 0.1) -> nbtrain.Task:
    model = nn.Sequential(CACHED, nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy())


@QUIET
def test_members_that_would_train_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"two members the same parameter '0\.weight', made outside"):
        population(tmp_path, build=sharing, space={"lr": [0.1, 0.2]})
    CACHED.requires_grad_(False)
    try:  # a frozen backbone is nobody's
        population(tmp_path, build=sharing, space={"lr": [0.1, 0.2]})
    finally:
        CACHED.requires_grad_(True)


def unreachable(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
    raise OSError("<urlopen error: Temporary failure in name resolution>")


def sightless(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
    return blind(lr)


def wider(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
    task = build(lr, weight_decay)
    task.model[0], task.model[1], task.model[4] = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)
    task.optimizer = torch.optim.AdamW(task.model.parameters(), lr=lr, weight_decay=weight_decay)
    return task


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (unreachable, OSError, "name resolution"),
        (wider, CheckpointError, "does not fit at '0.weight'"),
        (sightless, TaskError, "Give valid="),
    ],
)
@QUIET
def test_a_build_that_is_at_fault_is_no_failure_of_a_member(
    whole: nbtrain.Population, tmp_path: Path, given: Any, kind: type[Exception], words: str
) -> None:
    first = population(tmp_path)
    first._rounds.table.add, add = (lambda row: (add(row), first.stop())), first._rounds.table.add
    first.run()
    assert 0 < len(first.history) < len(whole.history)
    with pytest.raises(kind, match=words):
        population(tmp_path, build=given)
    again = population(tmp_path)
    for member in again._rounds.members:  # only when a slice begins
        member._maker.build = given
    with pytest.raises(kind, match=words):
        again.run()
    assert_same_bits(bits(population(tmp_path).run()), bits(whole))


def test_another_model_is_not_built_while_it_trains(whole: nbtrain.Population, tmp_path: Path) -> None:
    found = population(tmp_path)
    goes_on, end = threading.Event(), found._rounds.storing.end
    found._rounds.storing.end = lambda *given: (end(*given), goes_on.wait(30))
    found.start()
    until = time.monotonic() + 30
    while not found.best_row and time.monotonic() < until:
        time.sleep(0.001)
    with pytest.raises(SessionError, match="Pause it first"):
        found.best()
    goes_on.set()
    assert found.wait().best() is not None
    assert_same_bits(bits(found), bits(whole))


def test_settings_that_change_are_told_on_opening(tmp_path: Path) -> None:
    population(tmp_path, epochs=1).run()
    changed = population(tmp_path, epochs=2, batch_size=6, clip_norm=0.5, precision="bf16")
    told = changed.lines[0]
    for words in ("epochs: 1 -> 2", "batch_size: 3 -> 6", "clip_norm: None -> 0.5", "'fp32' -> 'bf16'"):
        assert words in told
    assert "->" not in population(tmp_path, epochs=2, batch_size=6, clip_norm=0.5).lines[0].replace(
        "epochs: 1 -> 2", ""
    ).replace("batch_size: 3 -> 6", "").replace("clip_norm: None -> 0.5", "")


def test_an_interval_over_the_whole_run_is_told(tmp_path: Path) -> None:
    found = population(tmp_path, interval="5 epochs", epochs=2)
    assert any("interval of 5 epochs is the whole run, in one round" in line for line in found.lines)


def blind(lr: float = 0.1) -> nbtrain.Task:
    task = build(lr)
    task.valid = None
    return task


def brittle(lr: float = 0.1, hidden: int = 8) -> nbtrain.Task:
    if hidden == 1:
        raise MemoryError("too narrow")
    return widths(lr, hidden)


def test_a_build_that_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"Task\(valid=\) is None"):
        population(tmp_path, build=blind, space={"lr": [0.1, 0.2]})
    with pytest.raises(MemoryError, match="too narrow") as told:
        population(tmp_path, build=brittle, space={"hidden": nbtrain.randint(1, 32)})
    assert told.value.__notes__ == ["build was tried at the edges of the space, with {'hidden': 1}."]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed of the population has changed"),
        ({"quantile": 0.5}, "quantile of the population has changed"),
        ({"members": 4}, "members of the population has changed"),
        ({"space": {"lr": SPACE["lr"]}}, "space of the population has changed"),
        ({"metric": "accuracy"}, "metric of the population has changed"),
    ],
)
def test_another_search_under_the_same_name_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    population(tmp_path, epochs=1).run()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=words):
        population(tmp_path, epochs=1, **changes)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_session_and_a_population_do_not_take_each_other_for_their_own(tmp_path: Path) -> None:
    session(tmp_path).run()
    with pytest.raises(SessionError, match="'tiny' is a session"):
        population(tmp_path, name="tiny")
    population(tmp_path, epochs=1).run()
    with pytest.raises(SessionError, match="'herd' is a population"):
        nbtrain.Session("herd", build, store=tmp_path, device="cpu", bar=False)


def test_a_population_is_trained_once_at_a_time(tmp_path: Path) -> None:
    one = population(tmp_path)
    other = population(tmp_path)
    with pytest.raises(SessionError, match="newer session 'herd'"):
        one.run()
    assert other.run().state == "done"


# ---- the test set


def test_a_test_set_is_touched_once_and_that_is_kept(tmp_path: Path) -> None:
    found = population(tmp_path).run()
    first = found.test(Noisy())
    assert first.keys() == {"test_loss", "accuracy"}
    with pytest.warns(NbtrainWarning, match="test set was used before, 1 times"):
        assert found.test(Noisy()) == first
    again = population(tmp_path)
    assert len(again.status()["tests"]) == 2 and again.is_done
    with pytest.raises(nbtrain.SessionError, match="A newer session"):
        found.test(Noisy())
    with pytest.warns(NbtrainWarning, match="2 times"):
        assert again.test(torch.utils.data.DataLoader(Noisy(), 32)).keys() == first.keys()


# ---- parts of it


def test_orders_wait_for_nobody_and_the_members_are_seen_while_it_trains(tmp_path: Path) -> None:
    found = population(tmp_path, epochs=None, decay="constant")
    seen: list[Any] = []
    close = Rounds._close

    def looking(*args: Any) -> None:
        close(found._rounds, *args)
        seen.append((found.state, [one.state for one in found.members], repr(found.members[0])))
        if len(seen) == 7:
            found.stop()

    found._rounds._close = looking  # type: ignore[method-assign]
    found.run()
    assert (found.state, len(found.history)) == ("stopped", 7)
    assert all(state == "running" for state, _, _ in seen)
    assert found.status()["num_slices_in_all"] is None


def test_members_that_are_parked_train_the_same(
    whole: nbtrain.Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbtrain.population.parking import Room

    monkeypatch.setattr(Room, "is_tight", lambda self: True)
    found = population(tmp_path).run()
    assert all(one._member.is_parked for one in found.members)
    assert_same_bits(bits(found), bits(whole))


@QUIET
def test_a_device_that_is_full_is_cleared_and_the_slice_begun_again(
    whole: nbtrain.Population, tmp_path: Path
) -> None:
    def burst(call: int) -> None:
        if call in (60, 110):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    found = population(tmp_path, build=calling(burst)).run()
    assert_same_bits(bits(found), bits(whole))


def test_a_population_that_nobody_holds_lives_as_long_as_it_trains(tmp_path: Path) -> None:
    """Else its panel would say that it is gone while it trains."""
    seen = weakref.ref(population(tmp_path).start())
    found = seen()
    assert found is not None and found.wait().state == "done"


def test_beside_a_population_that_trains_no_session_does(tmp_path: Path) -> None:
    run = session(tmp_path / "run")
    found = population(tmp_path / "herd").start()
    with pytest.raises(SessionError, match=r"'herd' is training in this kernel, and a second"):
        run.start()
    found.stop()
    assert run.run().state == "done" and found.state == "stopped"


def test_plots_are_figures_of_what_is_there(tmp_path: Path) -> None:
    found = population(tmp_path)
    assert found.schedule == [] and found.best_row is None
    for what in ("scores", "lineage"):
        assert "no round yet" in [t.get_text() for t in found.plot(what).axes[0].texts]
    found.run()
    assert len(found.plot().axes) == 4 and len(found.plot("lineage").axes) == 1
    assert found.schedule[-1][1] == found.status()["best_hyperparameters"]
    with pytest.raises(ValueError, match='"scores" and "lineage"'):
        found.plot("loss")
    with pytest.raises(SessionError, match="A panel needs a notebook"):
        found.panel()


@QUIET
def test_on_a_device_that_stays_full_micro_batches_are_halved(tmp_path: Path) -> None:
    def narrow(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if len(target) > 4 and output.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return nn.functional.cross_entropy(output, target)

    def full(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
        task = build(lr, weight_decay)
        task.loss = narrow
        return task

    found = population(tmp_path, build=full, batch_size=8).run()
    assert found.state == "done" and not any(row["error"] for row in found.history)
    rooms = [m.live.rooms["cpu"] for m in found._rounds.members if m.live is not None]
    assert rooms and max(rooms) <= 4


class Far(FolderStore):
    """A mount that takes so many files, and then no more."""

    is_remote, room = True, 25

    def write(self, name: str, data: Any) -> None:
        if not self.room:
            raise StoreError("The mount is gone.")
        self.room -= 1
        super().write(name, data)


@pytest.mark.filterwarnings("ignore:A save failed")
def test_one_that_was_done_before_its_last_copies_is_copied_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    far = Far(tmp_path / "far")
    with pytest.raises(StoreError, match="mount is gone"):
        population(far).run()
    monkeypatch.setattr(opening, "IMPORTED", "another kernel")
    opening._open.clear()
    far.room = 1000
    found = population(far)
    expected, behind = bits(found), found.status()["pending_bytes"]
    assert behind and str(tmp_path / "machine") in found.lines[-1]
    assert found.run().state == "done" and found.status()["pending_bytes"] == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    opening._open.clear()
    assert_same_bits(bits(population(far)), expected)


def test_the_output_of_each_kaggle_version_is_enough_for_the_next(
    whole: nbtrain.Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slices(version: int, number: int) -> nbtrain.Population:
        monkeypatch.setattr(opening, "IMPORTED", f"kernel {version}")
        found = population(KaggleStore(tmp_path / f"{version}/nbtrain", [tmp_path / f"{version - 1}"]))
        close, left = found._rounds._close, iter(range(number))

        def closing(row: Any, taken: Any) -> None:
            close(row, taken)
            if next(left) == number - 1:
                found.stop()

        found._rounds._close = closing  # type: ignore[method-assign]
        return found.run()

    for version, number in enumerate((2, 1, 3), 1):  # ended within a round
        assert slices(version, number).state == "stopped"
    assert_same_bits(bits(slices(4, 100)), bits(whole))
    assert_same_bits(bits(population(tmp_path / "4/nbtrain")), bits(whole))
