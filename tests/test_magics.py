"""The words of %nbtrain do what the session does, and say what is wrong in one block."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from herds import SPACE
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from runs import build, session
from traitlets.config import Config

import nbtrain
from nbtrain import magics
from nbtrain.host import Host, detect
from nbtrain.magics import listing
from nbtrain.magics.said import WORDS
from nbtrain.schedule import Schedule
from nbtrain.stores import FolderStore, MemoryStore

RECIPE = """\
import torch
from torch import nn
import nbtrain

class Ramp(torch.utils.data.Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, index):
        return torch.full((4,), index / 24), index % 2

def build():
    model = nn.Linear(4, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Ramp())
"""
COLOR = re.compile(r"\x1b\[[0-9;]*m")
SETTINGS = "epochs=2 batch_size=4 num_workers=0 bar=False device=cpu"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A shell with the extension, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # A shell puts its user's module there.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    made = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    made.run_line_magic("load_ext", "nbtrain")
    yield made
    made.run_line_magic("unload_ext", "nbtrain")


@pytest.fixture
def told(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a cell; return what it has written, and whether it ended well."""

    def run(cell: str) -> tuple[str, bool]:
        capsys.readouterr()
        result = shell.run_cell(cell)
        written = capsys.readouterr()
        return COLOR.sub("", written.out + written.err), bool(result.success)

    return run


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No session lives in this kernel."""
    monkeypatch.setattr(magics, "newest", lambda: None)


class Fake(SimpleNamespace):
    """A session that trains, and notes what it is told."""

    def __init__(self, state: str = "running") -> None:
        super().__init__(name="fake", state=state, is_done=False, heard=[])

    def status(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "step": 1, "own_loop": False}

    def __getattr__(self, verb: str) -> Any:
        return lambda *args, **kwargs: self.heard.append((verb, kwargs))


def fresh(code: str, folder: Path) -> str:
    """Run code in a new interpreter; return what it printed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the package, loaded lazily


def test_neither_the_import_nor_the_extension_nor_its_first_words_import_torch(tmp_path: Path) -> None:
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
import nbtrain
assert not {"torch", "numpy", "matplotlib", "ipywidgets"} & set(sys.modules)
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "nbtrain")
for line in ("%nbtrain", "%nbtrain help", "%nbtrain pause", "%nbtrain nonsense"):
    shell.run_cell(line)
shell.complete("", "%nbtrain resume ", 16)
print([name for name in ("torch", "matplotlib", "ipywidgets") if name in sys.modules])
"""
    assert fresh(code, tmp_path).splitlines()[-1] == "[]"


def test_what_needs_torch_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    code = """
import nbtrain, sys
assert {"Session", "Task", "resume", "LossError"} <= set(dir(nbtrain))
from nbtrain import Session
assert "torch" in sys.modules
assert Session is nbtrain.Session is nbtrain.session.Session
assert nbtrain.Task is vars(nbtrain)["Task"] is nbtrain.task.Task
assert nbtrain.resume is nbtrain.resuming.resume
assert nbtrain.stores.FolderStore and nbtrain.checkpoint.find
print("whole")
"""
    assert fresh(code, tmp_path) == "whole\n"


def test_a_name_that_is_not_there_is_told_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'nbtrain' has no attribute 'sesion'"):
        _ = nbtrain.sesion
    assert not hasattr(nbtrain, "_repr_html_")
    assert not hasattr(nbtrain, "__main__"), "that one runs"


def test_errors_and_schedules_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(Schedule(epochs=3))) == Schedule(epochs=3)
    assert type(pickle.loads(pickle.dumps(nbtrain.LossError("no")))) is nbtrain.LossError


def test_help_shows_every_public_name(tmp_path: Path) -> None:
    said = fresh("import nbtrain; help(nbtrain)", tmp_path)
    assert "A training run that outlives its notebook" in said
    for name in nbtrain.__all__:
        assert name in said


# ---- loading


def test_loading_twice_keeps_what_was_marked_and_unloading_twice_leaves_nothing(
    shell: InteractiveShell,
) -> None:
    known = shell.magics_manager.registry["NbtrainMagics"]
    nbtrain.load_ipython_extension(shell)
    assert shell.magics_manager.registry["NbtrainMagics"] is known
    assert "%nbtrain resume" in completed(shell, "%nbtrain res")
    for _ in range(2):
        nbtrain.unload_ipython_extension(shell)
        assert shell.find_line_magic("nbtrain") is None
        assert shell.find_cell_magic("nbtrain") is None
        assert "%nbtrain resume" not in completed(shell, "%nbtrain res")
    nbtrain.load_ipython_extension(shell)
    assert shell.find_cell_magic("nbtrain") is not None


def test_loading_leaves_the_users_names_alone(shell: InteractiveShell) -> None:
    shell.user_ns["session"] = "mine"
    before = {name for name in shell.user_ns if not name.startswith("_")}
    shell.run_line_magic("reload_ext", "nbtrain")
    assert {name for name in shell.user_ns if not name.startswith("_")} == before
    assert shell.user_ns["session"] == "mine"


# ---- words


@pytest.mark.parametrize("word", [word for word in WORDS if word != "help"])
def test_every_word_is_in_the_help(word: str, told: Any) -> None:
    said, is_well = told("%nbtrain help")
    assert is_well
    assert word in said or word == "status"
    assert "::" not in said


@pytest.mark.parametrize("word", ["audit", "save", "plot", "recipe"])
def test_the_help_of_a_word_is_of_that_word(word: str, told: Any) -> None:
    said, is_well = told(f"%nbtrain help {word}")
    assert is_well
    lines = [line for line in said.splitlines() if line.startswith("%")]
    assert lines and all(word in line.split("  ")[0] for line in lines)


def test_the_question_mark_shows_the_help_and_the_options(told: Any) -> None:
    said, _ = told("%nbtrain?")
    assert "%nbtrain resume NAME trust-code" in said
    assert "--trust-code" in said


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("%nbtrain strat", "Did you mean %nbtrain start?"),
        ("%nbtrain xyzzy", "%nbtrain help has them all"),
        ("%nbtrain pause now", "pause takes no 'now'"),
        ("%nbtrain help xyzzy", "There is no word 'xyzzy'"),
        ("%nbtrain help plto", "Did you mean %nbtrain help plot?"),
        ("%nbtrain HELP", "Did you mean %nbtrain help?"),
        ("%nbtrain help --trust-code", "help takes no 'trust_code'"),
        ("%nbtrain --fast", "unrecognized arguments: --fast"),
        ("%nbtrain set 'lr", "No closing quotation"),
        ("%nbtrain resume one two", "one two is more than one name"),
        ("%nbtrain recipe", "as its very first line"),
        ("%%nbtrain strat\n1", "goes with one word: %%nbtrain recipe"),
        ("%nbtrain list size=3", "%nbtrain list store=PLACE"),
        ("%nbtrain find_lr rates=3", "find_lr takes low, high and steps"),
        ("%nbtrain find_lr 3", "find_lr takes no '3'"),
        ("%nbtrain audit many", "'many' is no number of steps"),
        ("%nbtrain audit 0", "'0' is no number of steps"),
        ("%nbtrain audit 2 3", "2 3 is more than one"),
        ("%nbtrain audit steps=2", "audit takes no 'steps'"),
        ("%nbtrain audit", "no session and no function `build`"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_a_wrong_word_gives_one_line(line: str, part: str, told: Any) -> None:
    said, is_well = told(line)
    assert not is_well
    assert part in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "word", ["start", "pause", "save", "stop", "set lr=1", "panel", "history", "rehearse", "find_lr"]
)
@pytest.mark.usefixtures("alone")
def test_without_a_session_one_line_says_how_to_make_one(word: str, told: Any) -> None:
    said, is_well = told(f"%nbtrain {word}")
    assert not is_well
    assert "nbtrain.Session(" in said
    assert len(said.splitlines()) == 1
    assert told("%nbtrain")[1], "to ask how things stand is no error"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("accumulate=4 warmup_epochs=5", {"accumulate": 4, "warmup_epochs": 5}),
        ("lr=0.05 budget=8h", {"lr": 0.05, "budget": "8h"}),
        ("milestones=[30, 60] decay=multistep", {"milestones": [30, 60], "decay": "multistep"}),
        ("decay='cosine' epochs=None", {"decay": "cosine", "epochs": None}),
        ('store="my drive/runs (old)" lr=1e-3', {"store": "my drive/runs (old)", "lr": 1e-3}),
        ("lr={rate * 2} batch_size=$size", {"lr": 0.5, "batch_size": 64}),
    ],
)
def test_values_are_pythons_or_text(
    text: str,
    values: dict[str, Any],
    shell: InteractiveShell,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell.user_ns.update(rate=0.25, size=64)
    fake = Fake()
    monkeypatch.setattr(magics, "newest", lambda: fake)
    assert told(f"%nbtrain set {text}")[1]
    assert fake.heard == [("set", values)]


@pytest.mark.parametrize("word", ["pause", "save", "stop"])
def test_an_order_goes_to_the_session_and_says_when_it_acts(
    word: str, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setattr(magics, "newest", lambda: fake)
    assert "after this window" in told(f"%nbtrain {word}")[0]
    assert fake.heard == [(word, {})]


@pytest.mark.parametrize(("word", "state"), [("pause", "done"), ("stop", "ready"), ("pause", "paused")])
def test_an_order_that_has_nobody_to_hear_it_says_so(
    word: str, state: str, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(state)
    monkeypatch.setattr(magics, "newest", lambda: fake)
    assert told(f"%nbtrain {word}")[0] == f"fake is {state}: there is nothing to {word}.\n"
    assert fake.heard == []


@pytest.mark.parametrize(
    ("line", "state", "verb"),
    [
        ("start", "ready", "run"),
        ("start background", "ready", "start"),
        ("start", "running", "wait"),
        ("resume", "paused", "run"),
        ("resume fake trust-code", "paused", "run"),
        ("resume fake background", "stopped", "start"),
        ("panel", "running", "panel"),
        ("rehearse", "paused", "rehearse"),
    ],
)
def test_a_word_is_one_verb_of_the_session(
    line: str, state: str, verb: str, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(state)
    monkeypatch.setattr(magics, "newest", lambda: fake)
    assert told(f"%nbtrain {line}")[1]
    assert fake.heard == [(verb, {})]


def test_audit_is_of_the_session(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    fake = SimpleNamespace(name="fake", audit=heard.append)
    monkeypatch.setattr(magics, "newest", lambda: fake)
    assert told("%nbtrain audit")[1]
    assert told("%nbtrain audit 7")[1]
    assert heard == [4, 7]


@pytest.mark.usefixtures("alone")
def test_audit_without_a_session_is_of_the_notebooks_build(told: Any) -> None:
    told(RECIPE)
    told("WIDTH = 2")
    said, is_well = told("%nbtrain audit 2")
    assert is_well
    assert "gave the same bits for 2 steps." in said


def test_audit_names_the_line_of_a_cell(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magics, "newest", lambda: None)
    told(RECIPE.replace("index / 24)", "np.random.default_rng().normal())"))
    told("import numpy as np; WIDTH = 2")
    said, is_well = told("%nbtrain audit 1")
    assert is_well, "what it found is no error of the cell"
    assert "`return torch.full((4,), np.random.default_rng().normal()), index % 2` (line 9, in" in said


def test_audit_refuses_in_one_line_while_the_session_trains(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path)
    monkeypatch.setattr(magics, "newest", lambda: run)
    for _ in run:
        said, is_well = told("%nbtrain audit")
        assert not is_well
        assert (
            said.startswith("SessionError: 'tiny' is training in this kernel") and said.count("\n") == 1
        )
        break


# ---- Tab


def completed(shell: InteractiveShell, line: str) -> set[str]:
    """Return what a notebook would make of a line by Tab."""
    with provisionalcompleter():
        found = shell.Completer.completions(line, len(line))
        return {line[: one.start] + one.text + line[one.end :] for one in found}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%nbtrain re", ["resume", "rehearse"]),
        ("%nbtrain s", ["start", "save", "stop", "set", "status"]),
        ("%nbtrain set acc", ["accumulate="]),
        ("%nbtrain set accumulate=4 bud", ["budget="]),
        ("%nbtrain set warmup=e", ["warmup=exponential"]),
        ("%nbtrain resume ci", ["cifar-10", "cifar-100"]),
        ("%nbtrain resume cifar-1", ["cifar-10", "cifar-100"]),
        ("%nbtrain resume cifar-100 tr", ["trust-code"]),
        ("%nbtrain resume cifar-100 --tr", ["--trust-code"]),
        ("%nbtrain start back", ["background"]),
        ("%nbtrain set decay=p", ["decay=polynomial", "decay=plateau"]),
        ("%nbtrain find_lr l", ["low="]),
    ],
)
def test_words_complete_with_tab(
    line: str, found: list[str], shell: InteractiveShell, tmp_path: Path
) -> None:
    for name in ("cifar-10", "cifar-100"):
        FolderStore(tmp_path / "nbtrain-sessions").write(f"{name}/000001-abcdef/manifest.json", b"{}")
    before = line.rpartition(" ")[0]
    assert completed(shell, line) >= {f"{before} {word}" for word in found}


# ---- recipes


def test_a_marked_cell_is_run_and_started_under_a_name(shell: InteractiveShell, told: Any) -> None:
    told("WIDTH = 2")
    said, is_well = told(f"%%nbtrain recipe\n{RECIPE}")
    assert is_well
    assert "build is the recipe" in said
    assert "Taken from other cells: WIDTH." in said
    said, is_well = told(f"%nbtrain start ramp {SETTINGS}")
    assert is_well, said
    made = shell.user_ns["session"]
    assert (made.name, made.state, made.step) == ("ramp", "done", 12)
    assert "ramp is `session` in this notebook." in said
    # The same cells again go on.
    said, is_well = told(f"%nbtrain start ramp {SETTINGS.replace('epochs=2', 'epochs=3')}")
    assert is_well, said
    assert shell.user_ns["session"].step == 18
    assert shell.user_ns["session"].history["step"] == list(range(1, 19))


def test_what_a_fresh_kernel_would_miss_is_told_at_once(told: Any) -> None:
    said, is_well = told(f"%%nbtrain recipe\n{RECIPE.replace('WIDTH', 'HEIGHT')}")
    assert is_well
    assert "could not rebuild it" in said
    assert "`HEIGHT` is not defined" in said


@pytest.mark.parametrize(
    ("cell", "part"),
    [
        ("def make():\n    return 1", "If it is make: %%nbtrain recipe make."),
        ("x = 1", "defines no build"),
        ("build = lambda: 1", "RecipeError: build is a lambda"),
        ("1 / 0", "UsageError: The cell failed, so nothing was marked."),
        ("def build(:", "UsageError: The cell failed, so nothing was marked."),
    ],
)
def test_a_cell_that_is_no_recipe_is_refused_and_nothing_is_marked(
    cell: str, part: str, shell: InteractiveShell, told: Any
) -> None:
    told("def build(): return 0")
    said, is_well = told(f"%%nbtrain recipe\n{cell}")
    assert not is_well
    assert part in said
    said, is_well = told(f"%nbtrain start other {SETTINGS}")
    assert not is_well
    assert "There is no recipe for 'other'" in said


def test_another_function_is_the_recipe_by_its_name(told: Any) -> None:
    cell = RECIPE.replace("def build", "def make").replace("WIDTH", "2")
    said, is_well = told(f"%%nbtrain recipe make\n{cell}")
    assert is_well
    assert "make is the recipe" in said
    assert "other cells" not in said


# ---- a stored session


@pytest.mark.usefixtures("alone")
def test_without_trust_the_code_is_shown_and_nothing_is_run(told: Any, tmp_path: Path) -> None:
    session(tmp_path / "nbtrain-sessions").run()
    said, is_well = told("%nbtrain resume tiny")
    assert not is_well
    assert said.startswith("TrustError: Found 'tiny' in ")
    assert "class Noisy" in said
    assert said.endswith("Or: %nbtrain resume tiny trust-code\n")
    assert "Traceback" not in said


@pytest.mark.parametrize("trust", ["trust-code", "--trust-code", "trust_code=True"])
@pytest.mark.usefixtures("alone")
def test_with_trust_it_goes_on_and_takes_no_name_from_the_user(
    trust: str, shell: InteractiveShell, told: Any, tmp_path: Path
) -> None:
    session(tmp_path / "runs").run()
    shell.user_ns["session"] = "mine"
    for _ in range(2):
        said, is_well = told(
            f"%nbtrain resume --store {tmp_path / 'runs'} tiny {trust} epochs=3 bar=False"
        )
        assert is_well, said
        assert shell.user_ns["session"] == "mine"
        assert "tiny is `session_tiny` in this notebook." in said
        assert (shell.user_ns["session_tiny"].state, shell.user_ns["session_tiny"].epoch) == ("done", 3)
    assert "session_tiny_2" not in shell.user_ns


@pytest.mark.usefixtures("alone")
def test_a_session_that_is_not_there_is_told_in_one_block(told: Any) -> None:
    said, is_well = told("%nbtrain resume nothing")
    assert not is_well
    assert said.startswith("SessionError: There is no session 'nothing'")
    assert "Traceback" not in said


def test_the_sessions_of_every_place_are_listed(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path / "nbtrain-sessions").run()
    session(tmp_path / "elsewhere").run()
    monkeypatch.setattr(magics, "newest", lambda: run)
    lines = told("%nbtrain list")[0].splitlines()
    assert lines[0].split() == ["name", "step", "epoch", "stage", "best", "size", "age", "place"]
    assert lines[1].split()[:4] == ["tiny", "6", "2", "1"]
    assert lines[1].split()[4] == f"{min(row['valid_loss'] for row in run.history.epochs):.4g}"
    assert lines[1].endswith(f"folder {tmp_path / 'nbtrain-sessions'}")
    assert len(lines) == 2
    assert str(tmp_path / "elsewhere") in told(f"%nbtrain list store={tmp_path / 'elsewhere'}")[0]
    assert told(f"%nbtrain list store={tmp_path / 'nothing'}")[0] == "There is no session.\n"


def test_a_session_that_is_kept_elsewhere_is_listed_too(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path / "elsewhere")
    monkeypatch.setattr(magics, "newest", lambda: run)
    assert f"tiny, at step 0; it is kept in folder {tmp_path / 'elsewhere'}" in told("%nbtrain list")[0]


# ---- a session that is alive


def test_status_history_and_settings_are_told(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path)
    monkeypatch.setattr(magics, "newest", lambda: run)
    assert "There is no step yet" in told("%nbtrain history")[0]
    run.run()
    said = told("%nbtrain")[0]
    assert said.startswith("tiny: done, stage 1, new\n")
    assert "epoch 2.00 of 2, step 6" in said
    assert "accumulate=3" in said
    assert "step 6, durable, folder" in said
    assert told("%nbtrain status")[0].startswith("tiny: done")
    lines = told("%nbtrain history")[0].splitlines()
    assert lines[0].split()[:3] == ["stage", "epoch", "step"]
    assert "valid_loss" in lines[0]
    assert [line.split()[2] for line in lines[1:]] == ["3", "6"]
    assert "accumulate=3" in told("%nbtrain set")[0]


def test_a_rehearsal_is_told_once_and_a_refused_one_in_one_line(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shown in (False, True):
        run = session(tmp_path / str(shown), store=MemoryStore(), bar=shown)
        monkeypatch.setattr(magics, "newest", lambda run=run: run)
        said, is_well = told("%nbtrain rehearse")
        assert is_well
        assert said.count("was given as an object of this kernel") == 1
    monkeypatch.setattr(run._loop, "state", "running")
    said, is_well = told("%nbtrain rehearse")
    assert not is_well
    assert said == "SessionError: 'tiny' is training. Pause it first, session.pause(), then rehearse.\n"


def test_a_range_test_is_shown_in_the_cell(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path)
    monkeypatch.setattr(magics, "newest", lambda: run)
    said, is_well = told("%nbtrain find_lr low=1e-4 high=0.1 steps=10")
    assert is_well
    assert "<range test: 0.0001 to 0.1, " in said
    assert run.step == 0
    monkeypatch.setattr(run._loop, "state", "running")
    said, is_well = told("%nbtrain find_lr")
    assert not is_well
    assert said.startswith("SessionError: 'tiny' is training in this kernel, and a range test would")
    assert said.count("\n") == 1


def test_a_change_acts_and_a_refused_one_says_why_and_changes_nothing(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path)
    monkeypatch.setattr(magics, "newest", lambda: run)
    assert told("%nbtrain set accumulate=2 budget=8h")[1]
    assert (run.journal.settings["accumulate"], run.budget.limit_s) == (2, 8 * 3600)
    said, is_well = told("%nbtrain set accumulate=0 lr=0.5")
    assert not is_well
    assert said == "ValueError: accumulate=0 must be a whole number from 1 up.\n"
    assert run.journal.settings["lr"] is None


def test_it_trains_in_the_background_and_pauses_and_goes_on(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path, epochs=2000)
    monkeypatch.setattr(magics, "newest", lambda: run)
    assert "the kernel is free" in told("%nbtrain start background")[0]
    assert run.state == "running"
    assert "pauses after this window" in told("%nbtrain pause")[0]
    run.wait()
    assert run.state == "paused"
    assert told("%nbtrain resume background accumulate=1")[1]
    assert told("%nbtrain stop")[1]
    run.wait()
    assert (run.state, run.journal.settings["accumulate"]) == ("stopped", 1)


@pytest.mark.parametrize("line", ["start", "start background", "resume"])
def test_a_loop_of_ones_own_is_not_gone_on_with_by_another_loss(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    task = build()
    own = {"model": task.model, "optimizer": task.optimizer, "train": task.train}
    run = nbtrain.Session("own", store=tmp_path, batch_size=4, epochs=9, bar=False, **own)
    for batch in run:
        run.update(task.run(batch)[0])
        run.stop()
    monkeypatch.setattr(magics, "newest", lambda: run)
    step = run.step
    said, well = told(f"%nbtrain {line}")
    assert not well and "only its cell knows the loss" in said and len(said.splitlines()) == 1
    assert run.step == step > 0


def test_what_is_done_is_not_said_to_train(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path, bar=True).run()
    monkeypatch.setattr(magics, "newest", lambda: run)
    said, well = told("%nbtrain start background")
    assert well and "tiny: done at" in said and "trains" not in said


def test_the_curves_are_shown_with_those_of_others(
    shell: InteractiveShell, told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = session(tmp_path / "mine"), session(tmp_path / "other")
    shown: list[Any] = []
    monkeypatch.setattr(magics, "newest", lambda: mine)
    monkeypatch.setattr(magics, "display", shown.append)
    monkeypatch.setattr(nbtrain.Session, "plot", lambda self, compare=(): (self, list(compare)))
    shell.user_ns.update(first=mine, second=other)
    assert told("%nbtrain plot")[1]
    assert told("%nbtrain plot second first")[1]
    assert shown == [(mine, []), (mine, [other])]
    said, is_well = told("%nbtrain plot third")
    assert not is_well
    assert "There is no session 'third' in this notebook. There is: tiny, first, second." in said


def test_what_the_users_own_code_raised_keeps_its_traceback(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(tmp_path)

    def mistaken(output: Any, target: Any) -> Any:
        raise ValueError("of mine")

    run.task.loss = mistaken
    monkeypatch.setattr(magics, "newest", lambda: run)
    said, is_well = told("%nbtrain start")
    assert not is_well
    assert "Traceback" in said
    assert "mistaken" in said


def test_an_interrupt_is_told_without_a_traceback(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Fake):
        def run(self) -> None:
            raise KeyboardInterrupt

    fake = Interrupted("ready")
    monkeypatch.setattr(magics, "newest", lambda: fake)
    assert told("%nbtrain start") == ("KeyboardInterrupt\n", False)


# ---- populations

HERD = """
import nbtrain, herds
herd = herds.population("nbtrain-sessions")
"""


def test_the_words_that_a_population_knows(
    told: Any, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert told(HERD)[1]
    assert "herd: ready, stage 1, new" in told("%nbtrain")[0]
    assert told("%nbtrain history") == ("There is no slice yet.\n", True)
    assert told("%nbtrain pause") == ("herd is ready: there is nothing to pause.\n", True)
    assert told("%nbtrain start")[1]
    said, _ = told("%nbtrain status")
    assert "herd: done" in said and "9 of 9 slices" in said and "best      valid_loss" in said
    assert len([line for line in said.splitlines() if line.endswith("done")]) == 3, "the members"
    assert all(name in said for name in SPACE)
    rows = told("%nbtrain history")[0].splitlines()
    assert rows[0].split()[:5] == ["round", "member", "source", "progress", "step"]
    assert [row.split()[0] for row in rows[1:]] == [str(n) for n in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    assert "population, 3 members, round 3" in told("%nbtrain list")[0]
    shown: list[Any] = []
    monkeypatch.setattr(magics, "display", shown.append)
    assert told("%nbtrain plot")[1] and told("%nbtrain plot lineage")[1]
    assert told("%nbtrain plot herd")[1], "by its name, as a session"
    assert [len(figure.axes) for figure in shown] == [1 + len(SPACE), 1, 1 + len(SPACE)]
    said, _ = told("%nbtrain help")
    assert said.splitlines()[-1].startswith("herd is a population. It knows: status, start,")
    assert len(told("%nbtrain help pause")[0].splitlines()) == 1
    said, well = told("%nbtrain plot loss")
    assert not well and 'There are "scores" and "lineage".' in said
    assert told("%nbtrain resume") == told("%nbtrain start")


@pytest.mark.parametrize("word", ["save", "set lr=0.1", "set"])
def test_a_word_that_means_nothing_to_a_population_says_so_in_one_line(
    told: Any, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert told(HERD)[1]
    said, well = told(f"%nbtrain {word}")
    assert not well and len(said.strip().splitlines()) == 1
    assert f"herd is a population, for which {word.split()[0]} has no meaning" in said
    said, well = told("%nbtrain resume budget=4h")
    assert not well and len(said.strip().splitlines()) == 1 and "is here already" in said


def test_a_stored_population_is_resumed_by_name(
    told: Any, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert told(HERD + "herd.run(); done = herd.history; del herd")[1]
    monkeypatch.setattr(magics, "newest", lambda: None)
    said, well = told("%nbtrain resume herd store=nbtrain-sessions trust-code")
    assert well, said
    found = shell.user_ns["population"]
    assert isinstance(found, nbtrain.Population) and found.history == shell.user_ns["done"]
    assert "herd is `population` in this notebook." in said


# ---- places


def host(tmp_path: Path, **facts: Any) -> Host:
    return Host(
        **(vars(detect()) | {"output": tmp_path / "out", "scratch": tmp_path / "scratch"} | facts)
    )


def test_nobody_is_asked_for_a_drive_in_order_to_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = host(tmp_path, name="colab", output=Path("/content/drive/MyDrive/nbtrain"))
    found, problems = listing.sessions(None, here)
    assert found == []
    assert len(problems) == 1
    assert "drive.mount(" in problems[0]


def test_a_place_that_does_not_answer_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(MemoryStore):
        def list(self, prefix: str = "") -> Any:
            raise nbtrain.StoreError("it does not answer")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(listing, "find_store", lambda store, here: Silent())
    session(tmp_path / "scratch" / "mirror").run()
    found, problems = listing.sessions(None, host(tmp_path))
    assert [(row.name, row.step, row.stage) for row in found] == [("tiny", 6, 1)]
    assert found[0].num_bytes > 0
    assert problems == ["it does not answer"]
    assert listing.names_nearby(host(tmp_path)) == ["tiny"]
