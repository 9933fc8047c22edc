"""The cell waits, another thread trains: the same bits, and every order, signal and error arrives."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Noisy, assert_same_bits, bits, build, in_fresh_process, session

import nbtrain
from nbtrain import checkpoint, waiting
from nbtrain.bar import Bar
from nbtrain.stores import FolderStore

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


def endless(folder: Path, **changes: Any) -> nbtrain.Session:
    return session(folder, epochs=None, decay="constant", **changes)


def at_forward(run: nbtrain.Session, number: int, act: Callable[[], object]) -> None:
    """Do something in the thread that trains, in the forward pass of that number."""
    counted = iter(range(10**9))

    def look(*_: object) -> None:
        if next(counted) == number:
            act()

    run.task.model.register_forward_pre_hook(look)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_run_has_the_bits_of_a_loop_of_ones_own_on_the_main_thread(tmp_path: Path) -> None:
    own = session(tmp_path / "own")
    for batch in own:
        loss, _, _ = own.task.run(batch)
        own.update(loss)
    seen: set[str] = set()
    run = session(tmp_path / "run")
    at_forward(run, 1, lambda: seen.add(threading.current_thread().name))
    assert_same_bits(bits(run.run()), bits(own))
    assert seen == {"nbtrain tiny"}


def test_the_end_of_a_run_is_heard_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbtrain.waiting.TICK_S", 600.0)
    assert session(tmp_path).run().state == "done"


def test_start_returns_at_once_and_wait_when_it_is_done(tmp_path: Path) -> None:
    run = session(tmp_path)
    goes_on = threading.Event()
    at_forward(run, 0, lambda: goes_on.wait(30))
    assert run.start() is run
    assert (run.state, run.step) == ("running", 0)
    with pytest.raises(nbtrain.SessionError, match="training already"):
        run.start()
    goes_on.set()
    assert run.wait() is run
    assert (run.state, run.is_done) == ("done", True)
    assert run.start().wait().state == "done"


def test_beside_one_that_trains_no_other_does(tmp_path: Path) -> None:
    first, second = session(tmp_path / "one"), session(tmp_path / "two")
    goes_on = threading.Event()
    at_forward(first, 0, lambda: goes_on.wait(30))
    first.start()
    refused = pytest.raises(nbtrain.SessionError, match=r"'tiny' is training .*Wait for it, or stop")
    for train in (second.start, second.run, lambda: next(iter(second))):
        with refused:
            train()
        assert (second.state, second.step) == ("ready", 0)
    goes_on.set()
    first.wait()
    assert_same_bits(bits(second.run()), bits(first))


def test_one_that_was_told_to_stop_is_waited_for(tmp_path: Path) -> None:
    first, second = endless(tmp_path / "one").start(), session(tmp_path / "two")
    first.stop()
    assert second.run().state == "done"
    assert first.state == "stopped"


def test_a_loop_that_an_error_left_behind_hinders_no_other_session(tmp_path: Path) -> None:
    first, second = session(tmp_path / "one"), session(tmp_path / "two")
    batches = iter(first)
    next(batches)
    assert first.state == "running"
    assert second.run().state == "done"


def test_an_order_that_comes_before_the_first_window_is_obeyed(tmp_path: Path) -> None:
    run = endless(tmp_path).start()
    run.pause()
    run.wait()
    assert (run.state, run.asked) == ("paused", "")
    run.stop()
    assert (run.state, run.reason) == ("stopped", "stop")


def test_what_is_asked_is_known_until_it_is_done(tmp_path: Path) -> None:
    run = endless(tmp_path)
    seen: list[str] = []

    def ask() -> None:
        run.set(accumulate=2)
        seen.append(run.asked)
        run.stop()
        seen.append(run.asked)

    at_forward(run, 4, ask)
    run.run()
    assert (seen, run.asked, run.journal.settings["accumulate"]) == (["set", "stop"], "", 2)


def test_what_the_training_raises_is_raised_by_who_waits_once(tmp_path: Path) -> None:
    run = session(tmp_path)

    def break_down() -> None:
        raise ZeroDivisionError("in the model")

    at_forward(run, 4, break_down)
    run.start()
    until(lambda: run.state == "failed")
    until(lambda: run.status()["error"] == "ZeroDivisionError: in the model")
    with pytest.raises(ZeroDivisionError, match="in the model"):
        run.wait()
    assert "in the model" in run.status()["error"]
    run.wait()
    run.run()
    assert run.status()["error"] == ""
    assert_same_bits(bits(run), bits(session(tmp_path / "whole").run()))


def test_lines_of_the_thread_are_printed_where_somebody_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = session(tmp_path, bar=True)
    assert "tiny: new, in" in capsys.readouterr().out
    run.start()
    until(lambda: run.state == "done")
    assert capsys.readouterr().out == ""
    run.wait()
    out = capsys.readouterr().out
    assert "epoch 1: loss" in out and "tiny: done at epoch 2.00" in out
    assert [line.split(":")[0] for line in run.lines] == ["tiny", "epoch 1", "epoch 2", "tiny"]


def test_in_a_batch_job_the_last_words_stand_below_the_last_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path, bar=True)
    monkeypatch.setattr(run._opened, "host", replace(run._opened.host, is_batch=True))
    said, is_due, looked = run._loop.keeping.say_goodbye, Bar.is_due, threading.Semaphore(0)

    def say(*args: Any, **kwargs: Any) -> None:
        said(*args, **kwargs)
        # Of two looks from now on, the second is whole.
        assert looked.acquire(timeout=30) and looked.acquire(timeout=30)

    def look(bar: Bar) -> bool:
        if run._loop.reason:
            looked.release()
        return is_due(bar)

    monkeypatch.setattr(Bar, "is_due", look)
    monkeypatch.setattr(run._loop.keeping, "say_goodbye", say)
    run.run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny: ")]
    assert "samples, loss" in lines[-2] and "done at" in lines[-1]


def test_warnings_of_the_thread_are_issued_where_the_user_waits(tmp_path: Path) -> None:
    run = session(tmp_path)
    at_forward(run, 4, lambda: run._loop.lines.warn("something is odd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.run()
    (warning,) = [w for w in caught if issubclass(w.category, nbtrain.NbtrainWarning)]
    assert "something is odd" in str(warning.message)
    assert warning.filename == __file__


def test_a_warning_that_is_an_error_ends_the_training_and_loses_nothing(tmp_path: Path) -> None:
    run = endless(tmp_path)
    at_forward(run, 4, lambda: run._loop.lines.warn("something is odd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", nbtrain.NbtrainWarning)
        with pytest.raises(nbtrain.NbtrainWarning, match="odd"):
            run.run()
    assert run.state == "failed"
    assert session(tmp_path, epochs=None, decay="constant").step == run.step


def test_an_interrupt_where_nobody_watches_ends_the_run(tmp_path: Path) -> None:
    run = endless(tmp_path)
    at_forward(run, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert (run.state, run.reason) == ("stopped", "interrupt")
    assert endless(tmp_path).step == run.step


def test_where_a_panel_is_watched_the_first_interrupt_pauses_and_the_second_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbtrain.waiting.ONE_PRESS_S", -1.0)
    run = endless(tmp_path)
    at_forward(run, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    seen: list[str] = []

    def press() -> None:
        until(lambda: run.state == "paused")
        seen.append(run.reason)
        run.start()  # what Resume does; the first interrupt is forgotten
        until(lambda: run.step > 4)
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: run.state == "paused")
        seen.append(run.reason)
        os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press)
    finger.start()
    run.start()
    with pytest.raises(KeyboardInterrupt):
        waiting.wait(run._loop, watched=True)
    finger.join()
    assert (seen, run.state, run.reason) == (["pause", "pause"], "stopped", "interrupt")


def test_where_a_panel_is_watched_a_pause_holds_until_stop(tmp_path: Path) -> None:
    run = endless(tmp_path)
    at_forward(run, 4, run.pause)
    steps: list[int] = []

    def press() -> None:
        until(lambda: run.state == "paused")
        steps.append(run.step)
        run.stop()

    finger = threading.Thread(target=press)
    finger.start()
    run.start()
    waiting.wait(run._loop, watched=True)
    finger.join()
    assert (steps, run.state, run.reason) == ([run.step], "stopped", "stop")
    assert "ended by stop" in run.lines[-1], "the pause is no longer the last word"


def test_a_pause_that_is_held_ends_with_the_budget(tmp_path: Path) -> None:
    run = endless(tmp_path, budget=1000, started_at=time.time())
    at_forward(run, 4, run.pause)

    def run_out() -> None:
        until(lambda: run.state == "paused")
        run.set(budget=1e-9)

    other = threading.Thread(target=run_out)
    other.start()
    run.start()
    waiting.wait(run._loop, watched=True)
    other.join()
    assert (run.state, run.reason) == ("stopped", "budget")


def test_orders_are_taken_from_files_in_the_sessions_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbtrain.orders.LOOK_EVERY_S", 0.02)
    run = endless(tmp_path)
    old = tmp_path / "tiny" / "STOP"
    old.parent.mkdir(exist_ok=True)
    old.touch()  # of an earlier run
    for order in ("PAUSE", "STOP"):
        at_forward(run, 30, (tmp_path / "tiny" / order).touch)
        run.run()
        assert run.reason == order.lower()
        assert not (tmp_path / "tiny" / order).exists()
        assert any(str(tmp_path / "tiny" / order) in line for line in run.lines)


def start_and_leave(folder: Path) -> None:
    run = endless(folder).start()
    until(lambda: run.step > 5)


def start_and_be_terminated(folder: Path, saved: Path) -> None:
    run = endless(folder)
    at_forward(run, 15, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run.run()
    saved.write_text("went on")


def test_a_kernel_that_ends_while_nobody_waits_saves_first(tmp_path: Path) -> None:
    code = "import sys, test_waiting as t; t.start_and_leave(t.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, timeout=120)
    run = endless(tmp_path)
    assert run.step > 5
    assert run._live.stages[0]["ended"] == "terminate"


def test_a_termination_ends_the_run_and_then_the_process(tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert in_fresh_process(start_and_be_terminated, tmp_path, said) == -signal.SIGTERM
    assert not said.exists()
    run = endless(tmp_path)
    assert run.step > 0
    assert run._live.stages[0]["ended"] == "terminate"


class Ending(Noisy):
    """Data whose worker ends the whole process group, as `timeout` and a batch system do."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7:
            os.killpg(0, signal.SIGTERM)
        return super().__getitem__(index)


def ending() -> nbtrain.Task:
    task = build()
    task.train = Ending()
    return task


def be_ended_with_the_workers(folder: Path, said: Path, is_own: bool) -> None:
    os.setsid()  # not the group of the tests
    run = session(folder, build=ending, num_workers=1)
    run._loop.lines.say = lambda text, **_: said.open("a").write(text)  # type: ignore[method-assign, assignment]
    if not is_own:
        run.run()
    for batch in run:
        run.update(run.task.run(batch)[0])


@pytest.mark.parametrize("is_own", [False, True])
def test_a_termination_that_the_workers_heard_first_is_no_error(tmp_path: Path, is_own: bool) -> None:
    folder, said = tmp_path / "run", tmp_path / "said"
    assert in_fresh_process(be_ended_with_the_workers, folder, said, is_own) == -signal.SIGTERM
    assert "ended by terminate at" in said.read_text() and "Mend it" not in said.read_text()
    assert session(folder)._live.stages[0]["ended"] == "terminate"


def test_the_thread_computes_as_the_cell_would(tmp_path: Path) -> None:
    run = session(tmp_path)
    seen: list[Any] = []
    at_forward(
        run, 0, lambda: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    )
    with torch.autocast("cpu", dtype=torch.float16):
        run.start()
    run.wait()
    assert seen == [(True, torch.float16)]


def test_the_thread_has_the_cells_default_device(tmp_path: Path) -> None:
    run = session(tmp_path)
    seen: list[torch.device] = []
    at_forward(run, 0, lambda: seen.append(torch.get_default_device()))
    before = torch.get_default_device()
    with torch.device("meta"):
        run._loop.start(lambda: seen.append(torch.get_default_device()))
        run._loop.worker.join()  # type: ignore[union-attr]
    assert seen == [torch.device("meta")]
    assert torch.get_default_device() == before


@pytest.mark.filterwarnings("ignore:A save failed")  # the first one, if it is still under way
def test_an_interrupt_does_not_say_that_all_is_saved_when_that_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = endless(tmp_path)

    def press() -> None:
        def refuse(*_: object) -> None:
            raise nbtrain.StoreError("the disk is full")

        monkeypatch.setattr(run._opened.stores[0], "write", refuse)
        os.kill(os.getpid(), signal.SIGINT)

    at_forward(run, 4, press)
    with pytest.raises(nbtrain.StoreError, match="full"):
        run.run()


def test_a_stop_after_a_pause_is_a_stop(tmp_path: Path) -> None:
    run = endless(tmp_path)
    at_forward(run, 4, lambda: [run.pause(), run.stop()])
    run.run()
    assert (run.state, run.reason, run.asked) == ("stopped", "stop", "")


def test_what_is_ordered_while_the_run_saves_for_the_last_time_is_done(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=1, decay="constant")
    finish, once = run._loop.keeping.finish, iter([True])

    def order_meanwhile() -> None:
        if next(once, False):
            run.set(epochs=2)
        finish()

    run._loop.keeping.__dict__["finish"] = order_meanwhile
    run.run()
    assert run.journal.settings["epochs"] == 2
    assert run.run().epoch == 2
    assert session(tmp_path, epochs=1, decay="constant").journal.settings["epochs"] == 2


def test_of_two_that_start_it_at_once_one_does(tmp_path: Path) -> None:
    run = endless(tmp_path)
    together, refused = threading.Barrier(3), list[nbtrain.SessionError]()

    def start() -> None:
        together.wait()
        try:
            run.start()
        except nbtrain.SessionError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: run.step > 0)
    run.stop()
    run.wait()
    assert len(refused) == 2


def test_a_run_may_start_again_the_moment_it_has_stopped(tmp_path: Path) -> None:
    run = endless(tmp_path, num_workers=1)
    for order in (run.stop, run.pause, run.stop):
        run.start()
        until(lambda: run.step > 0)
        order()
        while run.state == "running":
            pass
    run.start()
    run.stop()
    run.wait()
    assert run.state == "stopped"


def test_the_same_cell_run_again_while_it_trains_is_refused_and_shifts_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted() -> nbtrain.Task:
        calls.append(1)
        return build()

    run = endless(tmp_path, build=counted).start()
    with pytest.raises(nbtrain.SessionError, match="training in this kernel already"):
        endless(tmp_path, build=counted)
    run.stop()
    run.wait()
    assert len(calls) == 1


def test_a_newer_session_ends_the_pause_of_the_one_before(tmp_path: Path) -> None:
    before = endless(tmp_path)
    at_forward(before, 4, before.pause)
    before.run()
    after = endless(tmp_path)
    assert (before.state, after.step) == ("stopped", before.step)


def test_a_session_that_was_paused_and_dropped_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbtrain.orders.LOOK_EVERY_S", 0.01)
    run = endless(tmp_path)
    at_forward(run, 4, run.pause)
    run.run()
    model = weakref.ref(run.task.model)
    run.task.model._forward_pre_hooks.clear()
    del run
    gc.collect()
    until(lambda: gc.collect() is not None and model() is None)


def test_two_changes_that_do_not_go_together_are_told_and_training_goes_on(tmp_path: Path) -> None:
    run = session(tmp_path, decay="constant")
    at_forward(run, 4, lambda: [run.set(decay="cosine"), run.set(epochs=None)])
    with pytest.warns(nbtrain.NbtrainWarning, match="Not set: decay="):
        run.run()
    assert (run.state, run.journal.settings["epochs"]) == ("done", 2)


def test_an_error_is_forgotten_when_a_loop_of_ones_own_has_trained_on(tmp_path: Path) -> None:
    run = session(tmp_path)
    at_forward(run, 4, lambda: 1 // 0)
    run.start()
    until(lambda: run.state == "failed")
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
    assert run.status()["error"] == ""
    assert run.run().state == "done"


def test_an_update_from_outside_the_thread_that_trains_is_refused(tmp_path: Path) -> None:
    run = endless(tmp_path)
    refused: list[BaseException] = []

    def elsewhere() -> None:
        try:
            run.update(torch.ones((), requires_grad=True))
        except nbtrain.SessionError as error:
            refused.append(error)

    def meddle() -> None:
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        run.stop()

    at_forward(run, 4, meddle)
    run.run()
    assert len(refused) == 1


def test_a_loop_of_ones_own_is_not_to_be_resumed_by_a_button(tmp_path: Path) -> None:
    run = session(tmp_path)
    assert not run.status()["own_loop"]
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        run.pause()
    assert run.status()["own_loop"]
    assert "same cells" in run.lines[-1]
    run.run()
    assert not run.status()["own_loop"]


def watched_loop(run: nbtrain.Session, then: Callable[[], None]) -> None:
    """Train in a loop of its own that a panel watches, doing something once it is held at a pause."""
    run._loop.is_watched = True

    def press() -> None:
        until(lambda: run.state == "paused")
        then()

    finger = threading.Thread(target=press)
    finger.start()
    try:
        for batch in run:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
    finally:
        finger.join()


def test_a_loop_of_ones_own_that_is_watched_is_held_by_a_pause_until_resume(tmp_path: Path) -> None:
    alone = session(tmp_path / "alone").run()
    run = session(tmp_path / "held")
    at_forward(run, 4, run.pause)
    seen: list[Any] = []

    def resume() -> None:
        newest = checkpoint.find([FolderStore(tmp_path / "held")], run.name)[0]
        seen.append((run.step, newest.facts["step"], run.status()["own_loop"]))
        run.set(accumulate=run.journal.settings["accumulate"])  # heard while it is held
        run.start()

    watched_loop(run, resume)
    [(step, saved, needs_its_cell)] = seen
    assert step == saved > 0 and not needs_its_cell
    assert run.state == "done"
    assert [stage["ended"] for stage in run._live.stages] == ["done"]
    assert_same_bits(bits(run), bits(alone))


def test_the_first_interrupt_holds_a_watched_loop_too(tmp_path: Path) -> None:
    alone = session(tmp_path / "alone").run()
    run = session(tmp_path / "held")
    at_forward(run, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    watched_loop(run, run.start)
    assert run.state == "done"
    assert_same_bits(bits(run), bits(alone))


@pytest.mark.parametrize("end", ["stop", "interrupt", "budget"])
def test_a_held_loop_of_ones_own_ends_by_stop_an_interrupt_and_the_clock(
    tmp_path: Path, end: str
) -> None:
    run = endless(tmp_path, budget=1000, started_at=time.time())
    at_forward(run, 4, run.pause)
    ends = {
        "stop": run.stop,
        "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
        "budget": lambda: run.set(budget=1e-9),
    }
    with pytest.raises(KeyboardInterrupt) if end == "interrupt" else nullcontext():
        watched_loop(run, ends[end])
    assert (run.state, run.reason) == ("stopped", end)
    assert endless(tmp_path).step == run.step > 0


def test_a_pause_in_a_validation_holds_a_watched_loop_too(tmp_path: Path) -> None:
    alone = session(tmp_path / "alone").run()
    run = session(tmp_path / "held")
    asked = []

    def pause(module: torch.nn.Module, *_: object) -> None:
        if not module.training and not asked:
            asked.append(run.step)
            run.pause()

    run.task.model.register_forward_pre_hook(pause)
    held: list[int] = []

    def resume() -> None:
        held.append(run.step)
        run.start()

    watched_loop(run, resume)
    assert held == asked and run.state == "done"
    assert_same_bits(bits(run), bits(alone))


def test_a_rehearsal_and_an_audit_wait_for_a_pause_that_was_ordered(tmp_path: Path) -> None:
    run = endless(tmp_path).start()
    until(lambda: run.step > 2)
    with pytest.raises(nbtrain.SessionError, match=r"is training in this kernel.*session\.pause"):
        nbtrain.audit(build)
    with pytest.raises(nbtrain.SessionError, match=r"is training in this kernel.*session\.pause"):
        run.audit()
    with pytest.raises(nbtrain.SessionError, match=r"is training\. Pause it first"):
        run.rehearse()
    run.pause()
    assert run.audit(steps=1).ok and run.state == "paused"
    run.stop()
