"""What a user says to a session: it stops in time, obeys between windows, and tells the truth."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from runs import (
    MICRO_STEPS,
    Noisy,
    assert_same_bits,
    bits,
    build,
    finish,
    in_fresh_process,
    session,
)

import nbtrain
from nbtrain import checkpoint, host
from nbtrain.errors import TaskError
from nbtrain.stores import FolderStore, MemoryStore


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def taking(clock: Clock, seconds: float) -> Any:
    """Return a build whose every forward pass takes some seconds of a fake clock."""
    task = build()

    def tick(*_: object) -> None:
        clock.now_s += seconds

    task.model.register_forward_pre_hook(tick)
    return lambda: task


def slow_session(folder: Path, clock: Clock, **changes: Any) -> nbtrain.Session:
    task = taking(clock, 1.0)()
    fields = {name: getattr(task, name) for name in ("model", "optimizer", "train", "valid")}
    # The clock stands still, but this process may be older than the budget.
    arguments: dict[str, Any] = {"build": None, "clock": clock, "started_at": time.time()}
    return session(folder, **(arguments | fields | changes))


def test_run_returns_before_the_budget_ends_and_keeps_the_reserve(tmp_path: Path) -> None:
    clock = Clock()
    run = slow_session(tmp_path, clock, budget=200, valid=None, epochs=100, warmup_epochs=0)
    run.run()
    assert (run.state, run.reason) == ("stopped", "budget")
    assert 0 <= run.budget.left_s < run.budget.reserve_s() + 3  # a window takes 3 s
    assert run.status()["saved"][0]["step"] == run.step > 10


def test_a_validation_that_does_not_fit_is_not_begun_and_comes_first_in_the_next_stage(
    tmp_path: Path,
) -> None:
    clock = Clock()
    run = slow_session(tmp_path, clock, budget=100)
    run.budget.observe("validation", 95)
    run.run()
    assert (run.reason, run.step, run.epoch) == ("budget", 3, 0)
    assert run.history.epochs == []
    run.set(budget=10_000)
    run.run()
    assert run.state == "done"
    assert [row["epoch"] for row in run.history.epochs] == [0, 1]


def test_a_validation_that_is_cut_is_done_again_from_its_start(tmp_path: Path) -> None:
    run = session(tmp_path / "cut")
    in_validation = iter([False, False, True])

    def stop_in_the_third_batch(model: torch.nn.Module, _: object) -> None:
        if not model.training and next(in_validation, False):
            run.stop()

    run.task.model.register_forward_pre_hook(stop_in_the_third_batch)
    run.run()
    assert (run.reason, run.step, run.epoch) == ("stop", 3, 0)
    assert run.task.model.training
    run.run()
    assert_same_bits(bits(run), bits(session(tmp_path / "whole").run()))


def test_the_budget_counts_from_the_start_of_the_machine(tmp_path: Path) -> None:
    run = session(tmp_path, budget="1h", started_at=time.time() - 1800)
    assert 1790 < run.budget.left_s <= 1800
    assert "started_at" in run.status()["budget"]


def test_run_again_after_stop_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    run = session(tmp_path / "stopped")
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        if run.step == 2:
            run.stop()
    assert (run.state, run.step) == ("stopped", 2)
    run.run()
    whole = session(tmp_path / "whole").run()
    assert_same_bits(bits(run), bits(whole))


def test_a_break_in_the_middle_of_a_window_goes_back_to_its_start(tmp_path: Path) -> None:
    run = session(tmp_path / "broken")
    for count, batch in enumerate(run):
        loss, _, _ = run.task.run(batch)
        if count == 4:
            break
        run.update(loss)
    assert (run.state, run.step) == ("stopped", 1)
    assert all(p.grad is None for p in run.task.model.parameters())
    run.run()
    assert_same_bits(bits(run), bits(session(tmp_path / "whole").run()))


def test_an_error_in_the_users_loop_loses_nothing(tmp_path: Path) -> None:
    run = session(tmp_path / "broken")

    def cell() -> None:
        for count, batch in enumerate(run):
            loss, _, _ = run.task.run(batch)
            run.update(loss if count < 5 else loss / (0 // (count - 5)))

    with pytest.raises(ZeroDivisionError):
        cell()
    run.run()
    assert_same_bits(bits(run), bits(session(tmp_path / "whole").run()))


@pytest.mark.parametrize("first", [False, True])
def test_a_zero_grad_that_was_left_in_the_loop_is_told(tmp_path: Path, first: bool) -> None:
    """It would throw away all micro-batches of a window but the last, in silence."""
    run = session(tmp_path / "left")

    def cell(*, has_line: bool) -> None:
        for batch in run:
            loss, _, _ = run.task.run(batch)
            if has_line and first:
                run.task.optimizer.zero_grad()
            run.update(loss)
            if has_line and not first:
                run.task.optimizer.zero_grad()

    with pytest.raises(
        TaskError, match=r"the 1 micro-batches before .* leave optimizer.zero_grad\(\) out"
    ):
        cell(has_line=True)
    cell(has_line=False)
    assert_same_bits(bits(run), bits(session(tmp_path / "whole").run()))
    alone = session(tmp_path / "alone", accumulate=1, batch_size=9)
    for batch in alone:
        alone.update(alone.task.run(batch)[0])
        alone.task.optimizer.zero_grad()  # needless there, and harmless


def test_pause_keeps_the_workers_and_stop_ends_them(tmp_path: Path) -> None:
    run = session(tmp_path, num_workers=1, epochs=None, decay="constant")
    for order in (run.pause, run.stop):
        for batch in run:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            order()
        alive = run._opened.train._torch._iterator is not None
        assert alive == (run.state == "paused")


def test_a_lid_that_was_closed_in_a_window_has_cost_no_window_so_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_s = [0.0]
    monkeypatch.setattr(host, "boot_clock", lambda: time.monotonic() + closed_s[0])
    run = session(tmp_path, budget="9h")

    def close(*_: Any) -> None:
        closed_s[0] = 5 * 3600.0 if run.step >= 2 else 0.0

    run.task.model.register_forward_pre_hook(close)
    assert run.run().state == "done"
    assert 3 * 3600 < run.status()["budget_left_s"] < 4 * 3600
    assert run.budget.cost_s("window") < 600


def test_what_somebody_sets_is_not_lost_by_a_kill_before_the_next_save(tmp_path: Path) -> None:
    def after_a_kill(run: nbtrain.Session) -> Any:
        run._loop.keeping.saver.wait()
        copied = tmp_path / f"killed-{run.step}-{run.state}-{len(run.journal.entries)}"
        shutil.copytree(tmp_path / "run", copied)
        return session(copied, accumulate=1).journal.settings["lr"]

    run = session(tmp_path / "run", accumulate=1)
    run.set(lr=0.9)  # of a session that nowhere is
    assert not (tmp_path / "run").exists()
    told = threading.Thread(target=lambda: run.set(lr=0.8))
    for batch in run:
        loss, _, _ = run.task.run(batch)
        if run.step == 1 and told.ident is None:
            told.start()
            told.join()
        run.update(loss)
        if run.step == 3:
            assert after_a_kill(run) == 0.8
            run.set(lr=0.7)  # the body itself, which does so again
        if run.step == 4:
            assert after_a_kill(run) == 0.8
            break
    run.set(lr=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a rival, as a save that came later would be one
        again = session(tmp_path / "run", accumulate=1)
        assert again.journal.settings["lr"] == 0.6
        again.save()
    assert after_a_kill(again) == 0.6


def test_orders_from_another_thread_are_obeyed_at_the_next_boundary(tmp_path: Path) -> None:
    run = session(tmp_path)
    steps = []
    for batch in run:
        loss, _, _ = run.task.run(batch)
        if len(steps) == 1:
            other = threading.Thread(target=lambda: (run.set(accumulate=1), run.save()))
            other.start()
            other.join()
            assert run.journal.settings["accumulate"] == 3
        run.update(loss)
        steps.append(run.step)
    assert run.journal.settings["accumulate"] == 1
    entry = run.journal.entries[0]
    assert (entry.step, entry.what, entry.old, entry.new, entry.by) == (1, "accumulate", 3, 1, "hand")


def test_a_changed_cell_is_a_journal_entry_and_an_unchanged_one_leaves_edits_alone(
    tmp_path: Path,
) -> None:
    run = session(tmp_path)
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        if run.step == 1:
            run.set(accumulate=2)
            run.stop()
    same = session(tmp_path)
    assert same.journal.settings["accumulate"] == 2
    changed = session(tmp_path, batch_size=4)
    assert changed.journal.settings["accumulate"] == 2
    assert [(e.what, e.new, e.by) for e in changed.journal.entries] == [
        ("accumulate", 2, "hand"),
        ("batch_size", 4, "cell"),
    ]


def test_a_longer_run_is_the_same_cell_with_more_epochs(tmp_path: Path) -> None:
    session(tmp_path, decay="constant").run()
    longer = session(tmp_path, decay="constant", epochs=3)
    assert not longer.is_done
    longer.run()
    assert (longer.is_done, longer.epoch, longer.step) == (True, 3, 9)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_fewer_epochs_than_are_begun_end_the_run_after_the_one_under_way(
    tmp_path: Path, epochs: int, decay: str
) -> None:
    run = session(tmp_path, epochs=5, decay=decay, warmup_epochs=0)
    for batch in run:
        if run.step == 4:  # inside the second epoch
            run.set(epochs=epochs)
        run.update(run.task.run(batch)[0])
    assert (run.state, run.reason, run.is_done) == ("done", "done", True)
    assert (run.epoch, run.step, len(run.history.epochs)) == (2, 6, 2)
    assert "valid_loss" in run.history.epochs[-1]
    assert [(e.what, e.old, e.new) for e in run.journal.entries] == [("epochs", 5, 2)]
    assert run.history["lr"][4] > 0
    assert session(tmp_path, epochs=5, decay=decay, warmup_epochs=0).run().step == 6


def test_no_epochs_left_at_the_start_of_one_end_the_run_at_once(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=5, decay="constant")
    for epoch in run.epochs():
        if epoch.number == 2:
            run.set(epochs=1)
        for batch in epoch:
            run.update(run.task.run(batch)[0])
    assert (run.state, run.epoch, run.step, run.progress) == ("done", 2, 6, 2.0)


def test_a_line_says_of_no_run_that_failed_that_it_is_done(tmp_path: Path) -> None:
    run = session(tmp_path).run()
    run._loop.keeping.say_goodbye("error", is_own=False)
    assert run.lines[-1].startswith("tiny: ended by an error at epoch 2.00")


def test_what_shapes_the_run_and_is_no_setting_is_told_and_written_down_when_it_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session(tmp_path, epochs=2, clip_norm=1.0, validate_every="1 epochs").run()
    same = session(tmp_path, epochs=2, clip_norm=1, keep=5, save_every="1h", direction="min")
    assert same.journal.entries == []
    capsys.readouterr()
    changed = {"clip_norm": 0.001, "patience": 7, "validate_every": "2 epochs"}
    judged = {"metric": "accuracy", "direction": "max"}
    run = session(tmp_path, epochs=2, bar=True, **changed, **judged)
    told = capsys.readouterr().out
    assert "\n  clip_norm: 1.0 -> 0.001, as the cell says now\n" in told
    assert "\n  validate_every: 1 epoch -> 2 epochs, as the cell says now\n" in told
    entries = {e.what: (e.step, e.new, e.by) for e in run.journal.entries}
    assert entries == {name: (6, value, "cell") for name, value in (changed | judged).items()}
    run.save()
    again = session(tmp_path, epochs=2, **changed, **judged)
    assert again.journal.entries == run.journal.entries, "once, and for good"


def test_epochs_close_after_their_body_with_what_was_logged(tmp_path: Path) -> None:
    run = session(tmp_path)
    run.task.valid = None
    for epoch in run.epochs():
        for batch in epoch:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
        run.log(accuracy=0.5 + epoch.number / 10)
    assert run.history["accuracy"] == [None, None, 0.5, None, None, 0.6]


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        ({"loss": 0.5}, r"'loss' cannot be logged: the history has it"),
        ({"lr": 3.0, "step": 0}, r"'lr' cannot be logged"),
        ({"accuracy": "good"}, r"accuracy='good' cannot be logged\. Give a number: log\(accuracy=0\.5"),
        ({"accuracy": "0.5"}, r"accuracy='0\.5' cannot"),
        ({"accuracy": None}, r"accuracy=None cannot"),
        ({"accuracy": torch.ones(2)}, r"accuracy=a tensor of shape \(2,\) cannot"),
    ],
)
def test_what_is_no_number_or_the_history_has_is_not_logged(
    tmp_path: Path, logged: dict[str, Any], words: str
) -> None:
    run = session(tmp_path, epochs=1, warmup_epochs=0)
    run.task.valid = None
    for epoch in run.epochs():
        for batch in epoch:
            run.update(run.task.run(batch)[0])
        run.log(kept=torch.tensor([0.25]))
        with pytest.raises(TaskError, match=words):
            run.log(other=1.0, **logged)
    assert run.history["kept"] == [None, None, 0.25]
    assert run.history["step"] == [1, 2, 3]
    assert "other" not in next(iter(run.history))


def test_history_opens_as_a_pandas_frame_with_the_promised_columns(tmp_path: Path) -> None:
    run = session(tmp_path).run()
    frame = pandas.DataFrame(run.history)
    expected = ["stage", "epoch", "step", "progress", "loss", "lr"]
    expected += ["train_loss", "valid_loss", "seconds"]
    assert list(frame.columns) == expected
    assert list(frame["step"]) == [1, 2, 3, 4, 5, 6]
    assert frame["progress"].iloc[-1] == 2.0
    assert list(frame["valid_loss"].notna()) == [False, False, True, False, False, True]


def test_best_is_a_copy_with_the_weights_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=4)
    seen: dict[float, dict[str, torch.Tensor]] = {}
    for epoch in run.epochs():
        for batch in epoch:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
        seen[epoch.number] = {k: v.clone() for k, v in run.task.model.state_dict().items()}
    before = bits(run)
    best = min(range(4), key=lambda number: run.history.epochs[number]["valid_loss"])
    model = run.best()
    assert not model.training
    assert all(torch.equal(v, seen[best][k]) for k, v in model.state_dict().items())
    assert_same_bits(bits(run), before)
    assert all(torch.equal(v, seen[best][k]) for k, v in session(tmp_path).best().state_dict().items())


def test_best_survives_retention(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=6, keep=2)
    for epoch in run.epochs():
        for batch in epoch:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
        run.log(valid_loss=float(abs(epoch.number - 1)))
    run.task.valid = None
    kept = checkpoint.find([FolderStore(tmp_path)], "tiny")
    assert len(kept) <= 3


def test_saves_are_at_most_the_set_time_apart(tmp_path: Path) -> None:
    clock = Clock()
    run = slow_session(tmp_path, clock, save_every="20s", budget=None, epochs=10, valid=None, keep=1000)
    run.run()
    facts = [m.facts for m in checkpoint.find([FolderStore(tmp_path)], "tiny")]
    assert facts[0]["step"] == 30
    run.save()
    assert run.status()["saved"][0]["num_bytes"] > 0


def test_two_sessions_in_memory_share_nothing() -> None:
    one, other = MemoryStore(), MemoryStore()
    session(one, epochs=1, decay="constant").run()  # type: ignore[arg-type]
    assert session(other, decay="constant").step == 0  # type: ignore[arg-type]


def test_status_is_plain_values(tmp_path: Path) -> None:
    status = session(tmp_path).run().status()
    assert (status["state"], status["step"], status["stage"]) == ("done", 6, 1)
    assert status["saved"][0]["degree"] == "durable"
    assert status["recipe"].endswith(
        checkpoint.find([FolderStore(tmp_path)], "tiny")[0].files["recipe.py"]["sha256"][:12]
    )


def test_the_planned_curve_can_be_plotted_before_the_run(tmp_path: Path) -> None:
    figure = session(tmp_path).plot()
    (planned,) = (line for line in figure.axes[1].get_lines() if line.get_linestyle() == ":")
    assert planned.get_ydata()[0] == pytest.approx(0.05 * 0.01)


def interrupted(folder: Path, number: int, result: Path) -> None:
    """Train, send this process a signal inside a window, and say what the loop did."""
    run = session(folder)
    try:
        for count, batch in enumerate(run):
            loss, _, _ = run.task.run(batch)
            if count == 4:
                os.kill(os.getpid(), number)
            run.update(loss)
    except KeyboardInterrupt:
        result.write_text(f"{run.state} {run.reason} {run.step}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_window_saves_and_then_does_what_it_does(tmp_path: Path, number: int) -> None:
    folder, result = tmp_path / "cut", tmp_path / "said"
    code = in_fresh_process(interrupted, folder, number, result)
    if number == signal.SIGTERM:
        assert code == -signal.SIGTERM
    else:
        assert result.read_text() == "stopped interrupt 2"
    run = session(folder)
    assert run.step == 2
    assert_same_bits(bits(run.run()), bits(session(tmp_path / "whole").run()))


def test_the_default_validation_sees_every_sample_once(tmp_path: Path) -> None:
    asked: list[int] = []

    class Listening(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            asked.append(index)
            return super().__getitem__(index)

    task = build()
    run = session(
        tmp_path,
        build=None,
        model=task.model,
        optimizer=task.optimizer,
        train=Noisy(),
        valid=Listening(),
    )
    run.run()
    assert sorted(asked) == sorted(2 * list(range(23)))
    assert len(run.history) * 3 >= MICRO_STEPS


def test_another_process_on_the_same_session_is_told_of(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=2)
    steps = 0

    def train() -> None:
        nonlocal steps
        for batch in run:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            steps += 1
            if steps == 1:
                assert in_fresh_process(finish, tmp_path, tmp_path / "other.pt") == 0
                run.save()
            run._loop._settle_at = 0.0

    with pytest.warns(nbtrain.NbtrainWarning, match="Another process trains 'tiny' too"):
        train()
    assert run.is_done


def test_orders_without_end_do_not_stop_the_training(tmp_path: Path) -> None:
    run = session(tmp_path)

    def again() -> None:
        run._loop.order("again", again)

    for batch in run:
        loss, _, _ = run.task.run(batch)
        run._loop.order("again", again)
        run.update(loss)
    assert run.is_done


def test_the_same_cell_with_the_same_objects_changes_nothing(tmp_path: Path) -> None:
    task = build()
    fields = {name: getattr(task, name) for name in ("model", "optimizer", "train")}
    run = session(tmp_path, build=None, **fields)
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        if run.step == 2:
            run.stop()
    again = session(tmp_path, build=None, **fields)
    assert again.journal.entries == []
    again.run()
    assert again.journal.rates(1.0) == [0.05]


def test_rates_that_the_user_has_written_since_are_the_next_sessions_peaks(tmp_path: Path) -> None:
    task = build()
    task.optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    fields = {name: getattr(task, name) for name in ("model", "optimizer", "train")}
    run = session(tmp_path / "one", build=None, **fields)
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 4:
            run.stop()
    again = session(tmp_path / "one", build=None, **fields)
    assert (again.journal.peak_lr, again.journal.entries) == (pytest.approx(0.05), []), "ours, no peak"
    third = session(tmp_path / "one", build=None, **fields)
    assert (third.journal.peak_lr, third.journal.entries) == (pytest.approx(0.05), []), "put back, too"
    task.optimizer.param_groups[0]["lr"] = 0.001
    tuned = session(tmp_path / "two", build=None, **fields)
    assert tuned.journal.peak_lr == 0.001
    for batch in tuned:
        tuned.update(tuned.task.run(batch)[0])
    assert max(tuned.history["lr"]) <= 0.001


def test_rates_written_after_a_session_without_a_schedule_count_as_well(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"build": None, "warmup_epochs": 0, "decay": "constant"}
    task = build()
    fields = {name: getattr(task, name) for name in ("model", "optimizer", "train")}
    for batch in (run := session(tmp_path / "one", **plain, **fields)):
        run.update(run.task.run(batch)[0])
    for group in task.optimizer.param_groups:
        group["lr"] = 0.001
    assert session(tmp_path / "one", **plain, **fields).journal.entries == [], "its loop may do so"
    for group in task.optimizer.param_groups:
        group["lr"] = 0.001
    assert session(tmp_path / "two", build=None, **fields).journal.peak_lr == 0.001


def test_a_stop_that_came_too_late_is_not_for_the_next_run(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=1, decay="constant")
    late = iter([True])

    def stop_in_the_final_save(*_: object) -> None:
        if next(late, False):
            run.stop()

    run._loop.keeping.__dict__["finish"] = stop_in_the_final_save
    run.run()
    run.set(epochs=2)
    del run._loop.keeping.__dict__["finish"]
    run.run()
    assert run.state == "done"


def test_an_error_inside_of_update_is_told_as_one_and_nothing_is_lost(tmp_path: Path) -> None:
    expected = bits(session(tmp_path / "whole").run())
    run = session(tmp_path / "broken")

    def train() -> None:
        for number, batch in enumerate(run):
            loss, n, _ = run.task.run(batch)
            if number == 4:
                loss.backward()
            run.update(loss, n=n)

    with pytest.raises(RuntimeError, match="second time") as caught:
        train()
    del caught  # its frames hold the loop
    gc.collect()
    assert (run.state, run.reason) == ("failed", "error")
    assert "ended by an error" in run.lines[-1]
    assert_same_bits(bits(run.run()), expected)


def test_an_error_inside_the_optimizers_step_tells_what_is_trained_again_and_keeps_edits(
    tmp_path: Path,
) -> None:
    run = session(tmp_path, warmup_epochs=0, decay="constant")

    def raising(*_: Any) -> None:
        if run.step == 2:
            raise RuntimeError("once")

    hook = run.task.optimizer.register_step_pre_hook(raising)
    run.task.model.register_forward_pre_hook(
        lambda *_: run.set(lr=0.01, accumulate=2) if run.step == 1 else None
    )
    with pytest.raises(RuntimeError, match="once"):
        run.run()
    hook.remove()
    told = "\n".join(run.lines)
    assert "back from step 2 to step 0; what came between is trained again" in told
    assert "Set since then: lr=0.01, accumulate=2; it holds from here on." in told
    assert "ended by an error at epoch 0.00, step 0" in run.lines[-1]
    assert "nothing is lost" not in run.lines[-1]
    assert (run.step, run.lr, run.journal.settings["accumulate"]) == (0, 0.01, 2)
    again = session(tmp_path, warmup_epochs=0, decay="constant")
    assert (again.lr, again.journal.settings["accumulate"]) == (0.01, 2)
    assert again.run().state == "done"


def test_what_was_set_before_a_loss_that_is_not_finite_is_named_and_not_set_again(
    tmp_path: Path,
) -> None:
    run = session(tmp_path, warmup_epochs=0, decay="constant")
    loss = run.task.loss
    run.task.loss = lambda *given: loss(*given) * (float("inf") if run.step == 2 else 1.0)
    run.task.model.register_forward_pre_hook(lambda *_: run.set(lr=9.0) if run.step == 1 else None)
    with pytest.raises(nbtrain.LossError):
        run.run()
    assert "Set since then: lr=9.0; set it again if it was not the cause." in "\n".join(run.lines)
    assert run.lr == 0.05


def test_a_loss_that_is_a_whole_batch_is_told_by_its_shape(tmp_path: Path) -> None:
    run = session(tmp_path)
    for _ in run:
        with pytest.raises(ValueError, match=r"loss=a tensor of shape \(3, 2\) is no scalar"):
            run.update(torch.zeros(3, 2))
        break


def test_a_save_that_was_asked_for_is_told(tmp_path: Path) -> None:
    run = session(tmp_path).run()
    run.save()
    assert run.lines[-1].startswith("tiny: saved at epoch ") and str(tmp_path) in run.lines[-1]


def test_nothing_runs_so_nothing_is_seen_a_second(tmp_path: Path) -> None:
    assert session(tmp_path).run().status()["samples_per_s"] == 0.0


def test_when_the_loop_is_halted_the_save_is_made_before_the_users_evaluation(tmp_path: Path) -> None:
    run = session(tmp_path)
    for epoch in run.epochs():
        for batch in epoch:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            if run.step == 2:
                run.stop()
        saved = checkpoint.find([FolderStore(tmp_path)], "tiny")[0]
        assert saved.facts["step"] == 2


def test_what_the_body_of_an_epoch_draws_is_the_same_after_a_cut(tmp_path: Path) -> None:
    def drawn(run: nbtrain.Session, cuts: bool) -> dict[int, tuple[float, float]]:
        found = {}
        while not run.is_done:
            for epoch in run.epochs():
                before = torch.rand(()).item()
                for batch in epoch:
                    loss, _, _ = run.task.run(batch)
                    run.update(loss)
                    if cuts and run.step in (1, 5):
                        run.stop()
                found[epoch.number] = (before, torch.rand(()).item())
        return found

    assert drawn(session(tmp_path / "cut"), True) == drawn(session(tmp_path / "whole"), False)


def test_another_process_keeps_what_it_has_saved(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=4, keep=2, decay="constant")
    steps = 0

    def train() -> None:
        nonlocal steps
        for batch in run:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            steps += 1
            if steps == 1:
                other = in_fresh_process(
                    finish, tmp_path, tmp_path / "o.pt", epochs=2, decay="constant"
                )
                assert other == 0
            run._loop._settle_at = 0.0
            run.save()

    with pytest.warns(nbtrain.NbtrainWarning, match="Another process"):
        train()
    kept = checkpoint.find([FolderStore(tmp_path)], "tiny")
    assert {m.facts["stage"] for m in kept} == {1, 2}


def channels_last() -> nbtrain.Task:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 3)
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    train = torch.utils.data.TensorDataset(images, torch.arange(24) % 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return nbtrain.Task(model=model, optimizer=optimizer, train=train)


def test_moments_come_back_in_the_memory_format_of_their_parameters(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int) -> dict[str, torch.Tensor]:
        made = session(folder, build=channels_last, epochs=epochs, decay="constant")
        return bits_of(made.run())

    run(tmp_path / "cut", 2)
    assert_same_bits(run(tmp_path / "cut", 4), run(tmp_path / "whole", 4))


def bits_of(run: nbtrain.Session) -> dict[str, torch.Tensor]:
    """Return weights and moments."""
    found = {name: tensor.clone() for name, tensor in run.task.model.state_dict().items()}
    for index, state in run.task.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": value for name, value in state.items()}
    return found


def test_an_error_in_the_users_model_is_told_as_one(tmp_path: Path) -> None:
    run = session(tmp_path)
    run.task.loss = lambda output, target: 1 // 0
    with pytest.raises(ZeroDivisionError):
        run.run()
    assert (run.state, run.reason) == ("failed", "error")


def test_sessions_are_laid_over_each_other_and_a_name_is_refused(tmp_path: Path) -> None:
    one, other = session(tmp_path / "one").run(), session(tmp_path / "other").run()
    figure = one.plot(compare=[other])
    assert sum(len(line.get_xdata()) == 6 for line in figure.axes[0].get_lines()) >= 2
    with pytest.raises(ValueError, match="compare= has 'tiny', no Session"):
        one.plot(compare=["tiny"])
