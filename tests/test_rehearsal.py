"""A rehearsal says what a fresh kernel would do, and leaves everything as it was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Noisy, assert_same_bits, build, in_fresh_process, session
from torch import nn
from torch.utils.data import Dataset

import nbtrain
from nbtrain import probe, rehearsal
from nbtrain.history import History
from nbtrain.stores import MemoryStore

THINGS: dict[str, Any] = {"lock": threading.Lock()}
only_here = types.ModuleType("only_here")  # as an installed package that the next machine lacks
only_here.__file__ = "/usr/lib/site-packages/only_here.py"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads there as here, however pytest was started."""
    monkeypatch.setattr(rehearsal, "_environ", environ)


def environ() -> dict[str, str]:
    return _initial() | {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}


_initial = rehearsal._environ


def answered(request: str, path: str) -> None:
    rehearsal.answer(nbtrain.resume, request, path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Answer from a fork of a process that has imported torch already; gives the devices asked for."""
    asked: list[str] = []

    def ask(name: str, opened: Any, device: str, within_s: float | None) -> dict[str, Any]:
        path = tmp_path / f"answer-{len(asked)}.json"
        request = {"name": name, "store": os.fspath(opened.store), "device": device}
        assert in_fresh_process(answered, json.dumps(request), str(path)) == 0
        asked.append(device)
        return {"said": ""} | dict(json.loads(path.read_text()))

    monkeypatch.setattr(rehearsal, "_ask", ask)
    return asked


def trained(folder: Path, step: int, end: str = "stop", **changes: Any) -> nbtrain.Session:
    """Return the tiny run after so many steps, ended by one of its verbs."""
    return on_to(session(folder, **changes), step, end)


def on_to(run: nbtrain.Session, step: int, end: str) -> nbtrain.Session:
    loss = run.task.loss

    def counted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if run.task.model.training and run.step == step - 1:
            getattr(run, end)()
        return loss(output, target)

    run.task.loss = counted
    run.run()
    run.task.loss = loss
    assert run.step == step
    return run


def bits(run: nbtrain.Session) -> dict[str, torch.Tensor]:
    """Return weights, buffers, optimizer, losses and rates, also where no epoch has ended yet."""
    found = {name: tensor.clone() for name, tensor in run.task.model.state_dict().items()}
    for index, state in run.task.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{k}": v.clone() for k, v in state.items() if torch.is_tensor(v)}
    rows = {column: torch.tensor(run.history[column]) for column in ("step", "loss", "lr")}
    return found | rows


def files(folder: Path) -> dict[str, str]:
    """Return every file below a folder with the sha256 of its bytes."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def surroundings(run: nbtrain.Session) -> dict[str, Any]:
    """Return what else a rehearsal has to leave alone."""
    return {
        "status": {k: v for k, v in run.status().items() if k not in ("budget_left_s", "loss")},
        "modes": [module.training for module in run.task.model.modules()],
        "gradients": [parameter.grad for parameter in run.task.model.parameters()],
        "history": [str(row) for row in run.history],
        "journal": run.journal.state_dict(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
    }


# ---- it says yes where a fresh kernel would go on


PLACES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "paused in an epoch, with workers": (1, "pause", {"num_workers": 2}),
    "stopped at an epoch's end, before its validation": (3, "stop", {}),
    "stopped in the last epoch, with a worker": (5, "stop", {"num_workers": 1, "accumulate": 2}),
    "done": (6, "save", {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_good_recipe_passes_and_nothing_is_changed(
    tmp_path: Path, place: str, quick: list[str]
) -> None:
    step, end, changes = PLACES[place]
    run = trained(tmp_path / "rehearsed", step, end, **changes)
    run.task.model.eval()  # as a cell may leave it
    before = files(tmp_path / "rehearsed"), bits(run), surroundings(run)
    found = run.rehearse()
    assert (found.ok, found.step) == (True, step), found.text
    assert f"tiny: a fresh kernel will resume this: checked at step {step} in" in found.text
    assert files(tmp_path / "rehearsed") == before[0]
    assert_same_bits(bits(run), before[1])
    assert surroundings(run) == before[2]
    assert run.lines[-2:] == ["tiny: rehearsing in a fresh process ...", found.text]
    run.run()
    uncut = session(tmp_path / "whole", **changes).run()
    assert_same_bits(bits(run), bits(uncut))


def test_the_fresh_process_is_an_interpreter_of_its_own(tmp_path: Path) -> None:
    run = trained(tmp_path, 2)
    found = run.rehearse()
    assert found.ok, found.text
    assert found.seconds > 0
    assert repr(found) == f"<rehearsal: ok at step 2, {found.seconds:.1f} s>"


def scheduled() -> nbtrain.Task:
    task = build()
    task.parts = {"schedule": torch.optim.lr_scheduler.StepLR(task.optimizer, 2, 0.5)}
    return task


def test_the_window_is_the_very_one_that_training_does_next(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"clip_norm": 0.1, "num_workers": 1}
    run = trained(tmp_path, 1, "pause", **changes)
    seen = rehearsal._seen_here(run._opened, run._loop, trains=True)
    on_to(run, 2, "pause")
    after = probe._bits(run.task, History())
    assert {name: seen["trained"][name] for name in after} == after
    loss = torch.tensor(run.history["loss"][-1], dtype=torch.float32)
    assert seen["trained"]["loss"] == probe.hashed({"loss": loss})["loss"]


def test_parts_go_on_as_if_nothing_had_been(tmp_path: Path, quick: list[str]) -> None:
    plain: dict[str, Any] = {"build": scheduled, "warmup_epochs": 0, "decay": "constant"}
    run = trained(tmp_path / "rehearsed", 1, **plain)
    found = run.rehearse()
    assert found.ok, found.text
    assert_same_bits(bits(run.run()), bits(session(tmp_path / "whole", **plain).run()))


def overwriting() -> nbtrain.Task:
    """A step that writes into its batch."""
    task = build()
    task.valid = None

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        x, target = batch
        return nn.functional.cross_entropy(model(x.mul_(2)), target)

    task.step = step
    return task


def test_a_step_that_writes_into_its_batch_gets_it_anew(tmp_path: Path, quick: list[str]) -> None:
    run = session(tmp_path / "rehearsed", build=overwriting)
    step = run.task.step
    assert step is not None

    def pausing(model: nn.Module, batch: Any) -> torch.Tensor:
        run.pause()
        return step(model, batch)

    run.task.step = pausing
    run.run()
    run.task.step = step
    assert (run.state, run.step) == ("paused", 1)
    assert run.rehearse().ok
    whole = session(tmp_path / "whole", build=overwriting)
    assert_same_bits(bits(run.run()), bits(whole.run()))


# ---- what is not saved is saved first


def test_what_is_not_saved_yet_is_saved_first_and_only_once(tmp_path: Path, quick: list[str]) -> None:
    run = session(tmp_path)
    assert not files(tmp_path)
    assert run.rehearse().ok
    assert run.rehearse().ok
    assert len(list(tmp_path.rglob("manifest.json"))) == 1
    run.set(lr=0.01)
    found = run.rehearse()
    assert found.ok, found.text
    assert len(list(tmp_path.rglob("manifest.json"))) == 2


def test_weights_put_in_by_hand_are_saved_first(tmp_path: Path, quick: list[str]) -> None:
    run = trained(tmp_path, 1)
    with torch.no_grad():
        run.task.model[0].weight[0, 0] += 1
    found = run.rehearse()
    assert found.ok, found.text


def test_a_damaged_checkpoint_is_named_and_a_whole_one_takes_its_place(
    tmp_path: Path, quick: list[str]
) -> None:
    run = trained(tmp_path, 2)
    newest = sorted(tmp_path.rglob("model.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with pytest.warns(nbtrain.NbtrainWarning, match=r"is damaged and\s+set aside"):
        found = run.rehearse()
    assert (found.ok, found.step) == (True, 2), found.text


# ---- it says what is missing


def with_a_file() -> nbtrain.Task:
    Path("labels.txt").read_text()
    return build()


def with_a_package() -> nbtrain.Task:
    assert only_here.__name__
    return build()


def with_a_variable() -> nbtrain.Task:
    assert os.environ["SET_IN_A_CELL"]
    return build()


def with_a_lock() -> nbtrain.Task:
    assert THINGS
    return build()


def deadly() -> nbtrain.Task:
    if "pytest" not in sys.modules:
        print("what it said last", file=sys.stderr, flush=True)
        os._exit(3)
    return build()


def not_ok(run: nbtrain.Session, **given: Any) -> str:
    """Rehearse in vain; return what was said."""
    before = bits(run)
    found = run.rehearse(**given)
    assert not found.ok, found.text
    assert run.lines[-1] == found.text
    assert_same_bits(bits(run), before)
    return found.text


def test_a_file_that_is_gone_is_named_with_the_line_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("cat dog")
    run = session(tmp_path / "store", build=with_a_file)
    Path("labels.txt").unlink()
    said = not_ok(run)
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'labels.txt'" in said
    assert 'of the recipe, `Path("labels.txt").read_text()`' in said


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    said = not_ok(session(tmp_path, build=with_a_package))
    assert "at its line" in said
    assert "`import only_here`: ModuleNotFoundError: No module named 'only_here'" in said


def test_a_variable_that_a_cell_has_set_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SET_IN_A_CELL", "1")
    assert "KeyError: 'SET_IN_A_CELL'" in not_ok(session(tmp_path, build=with_a_variable))


def test_a_name_that_cannot_be_kept_is_told_without_trying(tmp_path: Path) -> None:
    with pytest.warns(nbtrain.NbtrainWarning, match="THINGS"):
        run = session(tmp_path, build=with_a_lock)
    assert "THINGS" in not_ok(run)
    assert not files(tmp_path)


def test_a_process_that_dies_is_told_with_its_last_lines(tmp_path: Path) -> None:
    said = not_ok(session(tmp_path, build=deadly))
    assert "exit code 3" in said
    assert "what it said last" in said


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    said = not_ok(session(tmp_path), within=0.01)
    assert "was ended" in said
    assert 'session.rehearse(within="1h")' in said


def test_an_interrupt_ends_the_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(tmp_path)
    begun: list[subprocess.Popen[bytes]] = []

    class Pressed(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if not begun:
                begun.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Pressed)
    with pytest.raises(KeyboardInterrupt):
        run.rehearse()
    assert begun[0].returncode is not None
    assert run.state == "ready"


def test_a_store_of_this_process_cannot_be_reached_from_another(tmp_path: Path) -> None:
    assert "Give a folder or a URL" in not_ok(session(tmp_path, store=MemoryStore()))


# ---- it says what differs


class Drawing(Dataset[Any]):
    """Samples drawn from a generator that the data set keeps to itself."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(0)

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(self.own.normal(size=6), dtype=torch.float32), index % 3


def drawing() -> nbtrain.Task:
    task = build()
    task.train, task.valid = Drawing(), None
    return task


class Counting(nn.Module):
    """A model with a number that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class Forgetting(Counting):
    """A model with a buffer that no state_dict has, which it does not even use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.linear(x)


def counting() -> nbtrain.Task:
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy())


def forgetting() -> nbtrain.Task:
    model = Forgetting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_generator_that_a_data_set_keeps_is_found_and_not_moved_on(
    tmp_path: Path, quick: list[str], workers: int
) -> None:
    changes: dict[str, Any] = {"build": drawing, "num_workers": workers}
    run = trained(tmp_path / "rehearsed", 1, "pause", **changes)
    said = not_ok(run)
    assert "The samples of the next window differ, first at 'micro-batch 1'" in said
    assert "run nbtrain.audit(build)" in said
    unrehearsed = trained(tmp_path / "whole", 1, "pause", **changes)
    assert_same_bits(bits(run.run()), bits(unrehearsed.run()))


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (counting, "The next window's results differ, first at 'loss'"),
        (forgetting, "What was loaded differs, first at 'model/seen'"),
    ],
)
def test_state_that_no_checkpoint_has_is_found(
    tmp_path: Path, quick: list[str], task: Callable[[], nbtrain.Task], told: str
) -> None:
    run = trained(tmp_path, 2, build=task)
    buffers = [buffer.clone() for buffer in run.task.model.buffers()]
    assert told in not_ok(run)
    assert all(map(torch.equal, run.task.model.buffers(), buffers))


def test_what_a_cell_has_set_is_named_where_bits_differ(tmp_path: Path) -> None:
    run = session(tmp_path)
    here = rehearsal._seen_here(run._opened, run._loop, trains=True)
    fresh = json.loads(json.dumps(here)) | {"said": ""}
    assert rehearsal._difference(fresh, here) == ""
    fresh["kernel"]["threads"] = 7
    assert rehearsal._difference(fresh, here) == "", "the same bits are the same bits"
    fresh["trained"]["model/0.bias"] = "other"
    said = rehearsal._difference(fresh, here)
    assert "first at 'model/0.bias'" in said
    assert "  in a fresh kernel: threads 7\n  in this kernel:    threads" in said


def test_another_place_is_told(tmp_path: Path) -> None:
    run = session(tmp_path)
    here = rehearsal._seen_here(run._opened, run._loop, trains=False)
    said = rehearsal._difference(here | {"place": [4, 1, 9], "said": "a warning"}, here)
    assert "would resume at step 4, not 0.\n  a warning" in said


# ---- a GPU that is nearly full


def test_on_a_nearly_full_gpu_it_is_the_cpu_and_said_what_that_proves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: list[str]
) -> None:
    run = trained(tmp_path, 2, build=counting)  # whose trained bits would differ
    monkeypatch.setattr(rehearsal, "_memory", lambda device: (1e9, 2.5e9))
    found = run.rehearse()
    assert found.ok, found.text
    assert quick == ["cpu"]
    assert "on the CPU, since the GPU has 1.0 GB free, and this process took 2.5" in found.text
    assert "not that the GPU computes the same bits" in found.text


def test_where_a_gpu_runs_full_in_the_fresh_process_it_tries_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: list[str]
) -> None:
    run = trained(tmp_path, 2)
    monkeypatch.setattr(run._opened, "device", torch.device("cuda"))
    monkeypatch.setattr(rehearsal, "_memory", lambda device: (9e9, 1e9))
    ask = rehearsal._ask

    def full(name: str, opened: Any, device: str, within_s: float | None) -> dict[str, Any]:
        if device == "cuda":
            return {"error": "OutOfMemoryError", "is_memory": True}
        return ask(name, opened, device, within_s)

    monkeypatch.setattr(rehearsal, "_ask", full)
    found = run.rehearse()
    assert found.ok, found.text
    assert "the GPU has no room for a second process" in found.text


# ---- it waits for no training, and knows what it cannot try


def test_while_it_trains_it_is_refused(tmp_path: Path) -> None:
    run = session(tmp_path)
    trains, goes_on = threading.Event(), threading.Event()
    loss = run.task.loss

    def held(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        trains.set()
        goes_on.wait(60)
        return loss(output, target)

    run.task.loss = held
    run.start()
    assert trains.wait(60)
    with pytest.raises(nbtrain.SessionError, match=r"is training\. Pause it first, session\.pause\(\)"):
        run.rehearse()
    goes_on.set()
    assert run.wait().is_done


def test_a_session_that_a_newer_one_has_replaced_is_refused(tmp_path: Path) -> None:
    old = trained(tmp_path, 1)
    session(tmp_path)
    with pytest.raises(nbtrain.SessionError, match="newer session"):
        old.rehearse()


def test_a_start_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(tmp_path)
    monkeypatch.setattr(rehearsal, "_ask", lambda *given: {"said": "", "beyond": ""})
    monkeypatch.setattr(run._loop, "order", lambda word, act: None)
    with pytest.raises(nbtrain.SessionError, match="was started while it rehearsed"):
        run.rehearse()


def test_with_a_loop_of_your_own_the_same_cells_go_on(tmp_path: Path) -> None:
    task = build()
    run = session(tmp_path, build=None, model=task.model, optimizer=task.optimizer, train=task.train)
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        if run.step == 2:
            run.stop()
    before = files(tmp_path)
    said = not_ok(run)
    assert "In a fresh kernel run the same cells: the session goes on at step 2." in said
    assert files(tmp_path) == before


def test_a_window_that_fails_here_is_put_back_too(tmp_path: Path, quick: list[str]) -> None:
    run = trained(tmp_path, 2)
    before, loss, calls = bits(run), run.task.loss, count()

    def failing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if next(calls):
            raise RuntimeError("only in this kernel")
        return loss(output, target)

    run.task.loss = failing
    with pytest.raises(RuntimeError, match="only in this kernel"):
        run.rehearse()
    run.task.loss = loss
    assert_same_bits(bits(run), before)
    assert all(parameter.grad is None for parameter in run.task.model.parameters())
    assert_same_bits(bits(run.run()), bits(session(tmp_path / "whole").run()))
