"""The loop waits for nobody: a slow or broken place costs checkpoints, never steps, never silently.

Near first, then far; a newer request replaces one that waits, but never one with a validation; and
what goes wrong in the background is handed to the loop, which raises or warns.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import build, session

import nbtrain
from nbtrain import NbtrainWarning, StoreError, checkpoint, opening
from nbtrain.budget import Budget
from nbtrain.checkpoint import Snapshot
from nbtrain.keeping import Keeping
from nbtrain.saving import Latest, Saver
from nbtrain.stores import MANIFEST, FolderStore, KaggleStore, MemoryStore, Store

WAIT_S = 60.0  # only ever waited for where a test fails


class Gate:
    """Work that begins, says so, and ends when it is let."""

    def __init__(self) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        self.done: list[int] = []

    def work(self, item: int) -> None:
        self.begun.set()
        assert self.let.wait(WAIT_S)
        self.done.append(item)


@pytest.fixture
def gate() -> Gate:
    return Gate()


# ---------------------------------------------------------------------------------------- Latest


def test_a_newer_request_replaces_a_waiting_one_but_never_one_that_is_worked_on(gate: Gate) -> None:
    latest = Latest(gate.work)
    latest.submit(1)
    assert gate.begun.wait(WAIT_S)
    for item in (2, 3, 4):
        latest.submit(item)
    gate.let.set()
    assert latest.join(WAIT_S)
    assert gate.done == [1, 4]


def test_a_needed_request_replaces_others_and_is_itself_waited_for(gate: Gate) -> None:
    latest = Latest(gate.work)
    latest.submit(1)
    assert gate.begun.wait(WAIT_S)
    latest.submit(2)
    latest.submit(3, needed=True)
    later = threading.Thread(target=latest.submit, args=(4,))
    later.start()
    gate.let.set()
    later.join(WAIT_S)
    assert latest.join(WAIT_S)
    assert gate.done == [1, 3, 4]


def test_join_says_whether_all_was_done_in_time(gate: Gate) -> None:
    latest = Latest(gate.work)
    assert latest.join(0.0)  # nothing to do is done
    latest.submit(1)
    assert not latest.join(0.0)
    gate.let.set()
    assert latest.join(WAIT_S)
    assert gate.done == [1]


def test_nothing_is_held_any_more_once_all_is_said_to_be_done() -> None:
    said_done: list[bool] = []
    latest: Latest[Any] = Latest(lambda item: None)

    class Held:  # a snapshot: to free its tensors takes a process that is not ending
        def __del__(self) -> None:
            said_done.append(latest.join(0.0))

    latest.submit(Held())
    assert latest.join(WAIT_S)
    latest.submit(None)
    assert latest.join(WAIT_S)
    assert said_done == [False]


def test_what_the_work_raises_is_handed_over_once_and_later_work_is_done() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise StoreError("refused")
        done.append(item)

    latest = Latest(work)
    latest.submit(1)
    assert latest.join(WAIT_S)
    failure = latest.failure()
    assert isinstance(failure, StoreError) and str(failure) == "refused"
    assert latest.failure() is None
    latest.submit(2)
    assert latest.join(WAIT_S)
    assert done == [2]


def test_a_failure_that_a_later_success_has_mended_is_told_as_such() -> None:
    def work(item: int) -> None:
        if item == 1:
            raise StoreError("refused")

    latest = Latest(work)
    for item in (1, 2):
        latest.submit(item)
        assert latest.join(WAIT_S)
        assert latest.is_failing == (item == 1)
    assert isinstance(latest.failure(), StoreError)
    assert latest.failure() is None


def test_no_thread_stays_when_nothing_is_left_to_do() -> None:
    before = threading.active_count()
    latest = Latest(lambda item: None)
    for item in range(3):
        latest.submit(item)
        assert latest.join(WAIT_S)
    assert latest._thread is None
    assert threading.active_count() <= before + 1  # the last one may be on its last line


# ----------------------------------------------------------------------------------------- Saver


class Place(MemoryStore):
    """A place that refuses and hangs on demand, and tells what it was asked to write."""

    def __init__(self, name: str, *, is_remote: bool = False) -> None:
        super().__init__(name)
        self.is_remote = is_remote
        self.refuses = self.refuses_delete = False
        self.refuses_next = 0
        self.hangs, self.let = threading.Event(), threading.Event()
        self.let.set()
        self.asked: list[str] = []

    def write(self, name: str, data: Any) -> None:
        self.asked.append(name)
        if not self.let.is_set():
            self.hangs.set()
            assert self.let.wait(WAIT_S)
        if self.refuses or self.refuses_next > 0:
            self.refuses_next -= 1
            raise StoreError(f"{self.place} is full")
        super().write(name, data)

    def delete(self, name: str) -> None:
        if self.refuses_delete:
            raise StoreError(f"{self.place} keeps everything")
        super().delete(name)


def snapshot(saver: Saver, valid_loss: float | None = None) -> Snapshot:
    number = saver.next_number()
    facts = {"step": 10 * number, "valid_loss": valid_loss}
    return Snapshot(number, {"weight": torch.ones(3)}, {}, {"number": number}, "", facts)


def open_saver(near: Store, far: Store | None = None, keep: int = 2) -> Saver:
    """Open as a session does: with what is there, newest first, and the first that is whole."""
    stores = [near] if far is None else [near, far]
    found = checkpoint.find(stores, "s")
    newest = checkpoint.load_newest(found)[0] if found else None
    return Saver("s", stores, keep, Budget(None, 0.0, lambda: 0.0), found, newest)


def save(saver: Saver, *valid_losses: float | None) -> None:
    """Save so often, each to its end, and hand over no failure."""
    for valid_loss in valid_losses:
        saver.request(snapshot(saver, valid_loss))
        assert saver.wait(timeout_s=WAIT_S)
        assert saver.failure() is None


def good(store: Store) -> list[int]:
    return [checkpoint.load(manifest).number for manifest in checkpoint.find([store], "s")]


@pytest.fixture
def near() -> Place:
    return Place("near")


@pytest.fixture
def far() -> Place:
    return Place("far")


def test_every_save_is_committed_near_and_copied_far_and_both_are_told(near: Place, far: Place) -> None:
    saver = open_saver(near, far)
    save(saver, None, None, None)
    assert good(near) == good(far) == [3, 2]
    told = {place: (saved.step, saved.degree) for place, saved in saver.saved.items()}
    assert told == {near.place: (30, "local"), far.place: (30, "local")}
    assert saver.saved[far.place].num_bytes == checkpoint.find([far], "s")[0].num_bytes


def test_the_best_is_copied_although_a_newer_one_took_its_place_in_the_queue(
    near: Place, far: Place
) -> None:
    saver = open_saver(near, far)
    far.let.clear()
    saver.request(snapshot(saver))
    assert far.hangs.wait(WAIT_S)
    for valid_loss in (0.1, 0.5, None):
        saver.request(snapshot(saver, valid_loss))
        saver.wait(copies=False)
    far.let.set()
    assert saver.wait(timeout_s=WAIT_S)
    assert saver.failure() is None
    assert good(near) == [4, 3, 2]
    assert good(far) == [4, 2]
    best = saver.best()
    assert best is not None and best.number == 2


def test_a_copy_that_is_slower_than_retention_is_still_whole(near: Place, far: Place) -> None:
    saver = open_saver(near, far)
    far.let.clear()
    saver.request(snapshot(saver))
    assert far.hangs.wait(WAIT_S)
    for _ in range(3):
        saver.request(snapshot(saver))
        saver.wait(copies=False)
    assert good(near) == [4, 3]  # what is being copied is gone here already
    far.let.set()
    assert saver.wait(timeout_s=WAIT_S)
    assert saver.failure() is None
    assert good(far) == [4, 1]


def test_waiting_says_no_while_a_copy_hangs_and_yes_when_it_is_done(near: Place, far: Place) -> None:
    saver = open_saver(near, far)
    far.let.clear()
    saver.request(snapshot(saver))
    assert not saver.wait(timeout_s=0.0)
    assert good(near) == [1] and good(far) == []
    far.let.set()
    assert saver.wait(timeout_s=WAIT_S)
    assert good(far) == [1]


def test_a_far_place_that_refuses_is_told_once_and_made_up_for_by_the_next_copy(
    near: Place, far: Place
) -> None:
    saver = open_saver(near, far)
    far.refuses = True
    saver.request(snapshot(saver, 0.1))
    assert saver.wait(timeout_s=WAIT_S)
    failure = saver.failure()
    assert isinstance(failure, StoreError) and far.place in str(failure)
    assert saver.failure() is None
    assert good(near) == [1] and good(far) == []
    assert list(saver.saved) == [near.place]
    far.refuses = False
    save(saver, 0.2)
    assert good(far) == [2, 1]  # the newest, and the best that was refused


def test_a_near_place_that_refuses_is_told_and_later_commits_are_made(near: Place, far: Place) -> None:
    saver = open_saver(near, far)
    save(saver, None)
    near.refuses_next = 1
    saver.request(snapshot(saver))
    assert saver.wait(timeout_s=WAIT_S)
    assert near.place in str(saver.failure())
    assert good(near) == good(far) == [1]
    save(saver, None)
    assert good(near) == good(far) == [3, 1]


def test_a_place_that_lets_nothing_be_removed_still_gets_every_checkpoint(
    near: Place, far: Place
) -> None:
    saver = open_saver(near, far)
    save(saver, None, None)
    near.refuses_delete = True
    saver.request(snapshot(saver))
    assert saver.wait(timeout_s=WAIT_S)
    assert "keeps everything" in str(saver.failure())
    assert good(near) == [3, 2, 1] and good(far) == [3, 2]


def test_the_best_of_an_earlier_kernel_is_known_kept_and_never_copied_again(
    near: Place, far: Place
) -> None:
    save(open_saver(near, far), 0.1, None, None, None)
    assert good(far) == [4, 3, 1]
    fresh = Place("another machine")
    saver = open_saver(fresh, far)
    far.asked = []
    save(saver, 0.7, 0.5, None, None)
    assert good(fresh) == [8, 7, 6] and good(far) == [8, 7, 1]
    best = saver.best()
    assert best is not None and (best.number, best.store) == (1, far)
    written = [name for name in far.asked if name.endswith(MANIFEST)]
    assert len(written) == len(set(written)) == 4
    save(saver, 0.05, None, None)
    assert good(far) == [11, 10, 9]


def test_the_best_is_read_from_the_nearest_place_that_has_it_whole(near: Place, far: Place) -> None:
    saver = open_saver(near, far)
    save(saver, 0.1, None)
    best = saver.best()
    assert best is not None and best.store is near
    far._files.clear()  # the mount is gone
    assert saver.load_best(best).number == 1
    save(saver, 0.05)
    best = saver.best()
    assert best is not None and best.number == 3
    near._files[best.path("state.json")] = b"{"
    with pytest.warns(NbtrainWarning, match="000003.* in memory of this process .near. is damaged"):
        assert saver.load_best(best).number == 3


def test_a_copy_whose_receipt_a_kill_has_cut_off_is_made_again(near: Place, far: Place) -> None:
    save(open_saver(near, far), 0.1)
    [torn] = checkpoint.find([far], "s")
    name = torn.path(MANIFEST)
    far._files[name] = far._files[name][:50]
    with pytest.warns(NbtrainWarning, match="cannot be read"):
        saver = open_saver(near, far)
    assert saver.is_behind and saver.pending_bytes == torn.num_bytes
    save(saver, 0.2)
    assert good(far) == [2, 1]
    assert not saver.is_behind and saver.pending_bytes == 0


def test_what_is_not_copied_yet_is_told_whatever_ended_last(near: Place, far: Place) -> None:
    saver = open_saver(near, far)
    far.let.clear()
    saver.request(snapshot(saver))
    assert far.hangs.wait(WAIT_S)
    saver.request(snapshot(saver))
    saver.wait(copies=False)
    newest = checkpoint.find([near], "s")[0].num_bytes
    assert saver.pending_bytes == newest
    saver._note(checkpoint.copy(checkpoint.find([near], "s")[1], Place("far")))  # of the older one
    assert saver.pending_bytes == newest
    far.let.set()
    assert saver.wait(timeout_s=WAIT_S)
    assert saver.pending_bytes == 0


def test_the_best_goes_from_one_kaggle_version_to_the_next_by_each_output_alone(tmp_path: Path) -> None:
    def version(number: int) -> KaggleStore:
        return KaggleStore(tmp_path / f"{number}/nbtrain", [tmp_path / f"{number - 1}"])

    save(open_saver(version(1)), 0.1, 0.7)
    for number in (2, 3):
        saver = open_saver(version(number))
        save(saver, 0.5, 0.6, None)
        best = open_saver(FolderStore(tmp_path / f"{number}/nbtrain")).best()
        assert best is not None and checkpoint.load(best).number == 1
    save(saver, 0.05)
    assert [m.number for m in checkpoint.find([saver._near.output], "s")] == [9, 8]  # type: ignore[attr-defined]


def test_a_damaged_best_in_a_kaggle_input_is_told_once_and_stops_no_save(tmp_path: Path) -> None:
    save(open_saver(KaggleStore(tmp_path / "1")), 0.1, None, None)
    [path] = tmp_path.glob("1/s/000001-*/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    saver = open_saver(KaggleStore(tmp_path / "2", [tmp_path / "1"]))
    saver.request(snapshot(saver))
    assert saver.wait(timeout_s=WAIT_S)
    assert "has changed since it was written" in str(saver.failure())
    save(saver, None, 0.2)
    assert good(FolderStore(tmp_path / "2")) == [6, 5]


def test_a_new_machine_goes_on_numbering_where_the_far_place_is(near: Place, far: Place) -> None:
    save(open_saver(near, far), None, None, None)
    saver = open_saver(Place("another machine"), far)
    assert saver.next_number() == 4


def test_what_a_save_and_a_copy_cost_is_told_to_the_budget(near: Place, far: Place) -> None:
    ticks = iter(range(100))
    budget = Budget(None, 0.0, lambda: float(next(ticks)))
    saver = Saver("s", [near, far], 2, budget, [])
    save(saver, None)
    assert budget.cost_s("save") > 0 and budget.cost_s("mirror") > 0


# ----------------------------------------------------------------------------- what the loop does


class Clock:
    """A second for every look: each boundary then looks at what has failed."""

    def __init__(self, tick_s: float = 1.0) -> None:
        self.now_s, self.tick_s = 1000.0, tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    return Place("Drive", is_remote=True)


def open_session(store: Place, tick_s: float = 1.0, **changes: Any) -> nbtrain.Session:
    """Open the tiny run; each forward pass waits until the background has nothing to do."""
    run = session(Path(), build=build, store=store, budget=None, clock=Clock(tick_s), **changes)
    run.task.model.register_forward_pre_hook(lambda *_: run._loop.keeping.saver.wait() and None)
    return run


def steps(store: Store) -> list[int]:
    return [m.facts["step"] for m in checkpoint.find([store], "tiny")]


def test_a_place_that_never_took_anything_ends_the_run_before_its_first_step() -> None:
    place = Place("disk")
    place.refuses = True
    run = open_session(place)
    called: list[int] = []
    run.task.model.register_forward_pre_hook(lambda *_: called.append(1))
    for _ in range(2):  # and again, where nothing was mended
        with pytest.raises(StoreError, match="is full"):
            run.run()
        assert (run.state, run.reason, run.step, called) == ("failed", "error", 0, [])
    place.refuses = False
    assert run.run().is_done
    assert steps(place)[0] == run.step


def test_a_far_place_that_never_took_anything_ends_the_run_at_a_first_boundary(
    remote: Place,
) -> None:
    remote.refuses = True
    run = open_session(remote)
    with pytest.raises(StoreError, match="is full"):
        run.run()
    assert run.step <= 1
    assert steps(run._opened.stores[0])[0] == run.step  # what was trained is on this machine
    remote.refuses = False
    assert run.run().is_done
    assert steps(remote)[0] == run.step


def test_a_far_place_that_refuses_later_is_warned_of_and_training_goes_on(remote: Place) -> None:
    run = open_session(remote)
    run.task.model.register_forward_pre_hook(lambda *_: setattr(remote, "refuses", run.step >= 2))
    with (
        pytest.warns(NbtrainWarning, match=r"(?s)A save failed, training goes on: .*Drive.*is full"),
        pytest.raises(StoreError, match="is full"),  # the last copy, too
    ):
        run.run()
    assert run.is_done and run.state == "done"
    assert steps(run._opened.stores[0])[0] == run.step == 6
    assert steps(remote) == [0]
    with pytest.raises(StoreError, match="is full"):
        run.run()
    remote.refuses = False
    assert run.run().state == "done"
    assert steps(remote)[0] == 6


def test_a_run_that_was_done_before_its_last_copy_is_copied_when_it_is_run_again(
    remote: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(Path(), store=remote, budget=None).run()
    last = checkpoint.find([remote], "tiny")[0]
    for manifest in checkpoint.find([remote], "tiny"):  # the kernel was killed before its copy
        if manifest.facts["step"] == 6:
            checkpoint.remove(remote, remote.list(f"tiny/{manifest.id}"))
    monkeypatch.setattr(opening, "IMPORTED", "another kernel")
    opening._open.clear()
    run = session(Path(), store=remote, budget=None)
    near = run._opened.stores[0].place
    assert run.step == 6 and steps(remote)[0] == 3
    assert f"from {near}." in run.lines[-1] and run.status()["pending_bytes"] == last.num_bytes
    assert run.run().state == "done"
    assert steps(remote)[0] == 6 and run.status()["pending_bytes"] == 0
    remote.asked = []
    assert run.run().state == "done" and remote.asked == []


def test_a_place_that_refuses_for_a_while_costs_checkpoints_and_no_steps() -> None:
    place = Place("disk")
    run = open_session(place, save_every=1e-9)
    run.task.model.register_forward_pre_hook(lambda *_: setattr(place, "refuses", run.step == 2))
    with pytest.warns(NbtrainWarning, match="A save failed, training goes on"):
        run.run()
    assert run.is_done
    assert steps(place)[0] == 6


def test_a_failure_made_up_for_before_anybody_looked_is_a_warning_at_the_end(remote: Place) -> None:
    run = open_session(remote, tick_s=0.0)  # no boundary looks after the first
    refused: list[int] = []

    def refuse_once(*_: Any) -> None:
        if run.step == 1 and not refused:
            refused.append(run.step)
            remote.refuses_next = 1
            run._loop.keeping.request("")

    run.task.model.register_forward_pre_hook(refuse_once)
    with pytest.warns(NbtrainWarning, match=r"(?s)A save failed.*Drive.*is full"):
        run.run()
    assert run.is_done and refused and remote.refuses_next == 0
    assert steps(remote)[0] == 6


def test_a_run_ends_with_a_warning_where_the_last_copy_hangs(
    remote: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeping, "patience_s", 0.0)
    run = session(Path(), store=remote, budget=None)
    remote.let.clear()
    with pytest.warns(NbtrainWarning, match=r"(?s)was not done in .*Run session\.save\(\)"):
        run.run()
    assert run.is_done
    assert steps(run._opened.stores[0])[0] == 6 and steps(remote) == []
    monkeypatch.undo()
    remote.let.set()
    run.save()
    assert steps(remote)[0] == 6
