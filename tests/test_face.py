"""The face draws beside the training: it is true when a wait ends, and holds up nobody."""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from faces import Clock, Fake, Pen

from nbtrain import face as face_module
from nbtrain import plots
from nbtrain.errors import NbtrainWarning
from nbtrain.face import TWIN_EVERY_S, Face, twin
from nbtrain.face.panel import Panel

DEADLINE_S = 20.0


class Desk:
    """A fake session with its face, and what was displayed in which cell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session, self.clock, self.pen, self.cell = Fake(), Clock(), Pen(), 1
        self.shown: list[str] = []
        self.renewed = 0
        monkeypatch.setattr(plots, "Curves", lambda name: self.pen)
        monkeypatch.setattr(face_module, "_cell", lambda: self.cell)
        monkeypatch.setattr(Panel, "show", lambda panel: self.shown.append("panel"))
        monkeypatch.setattr(twin, "display", self._display)
        self.face = Face(self.session, self.clock)

    def _display(self, output: Any, *, display_id: str, update: bool, **_: Any) -> None:
        if update:
            self.renewed += "text/html" in output
        else:
            self.shown.append("picture" if "image/png" in output else "table")

    def status(self) -> str:
        assert self.face.panel is not None
        return str(self.face.panel._status.value)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:g} s for {what}"
        time.sleep(0.01)


def test_the_panel_stands_above_its_twin(desk: Desk) -> None:
    desk.face.show(panel=True)
    assert desk.shown == ["panel", "picture", "table"]


def test_where_nobody_watches_there_is_the_twin_alone_and_no_widget(desk: Desk) -> None:
    desk.face.show(panel=False)
    assert desk.shown == ["picture", "table"] and desk.face.panel is None


def test_what_is_typed_right_after_a_picture_is_drawn_though_nothing_trains(desk: Desk) -> None:
    desk.face.show(panel=True)
    panel = desk.face.panel
    assert panel is not None
    fields = {field.name: field for field in panel._fields._fields}
    desk.clock.now += 10
    fields["accumulate"].input.value = "4"
    until(lambda: panel._draft == {"accumulate": 4}, "the first picture")
    fields["warmup_epochs"].input.value = "7"  # within TYPING_S of it, by this clock
    until(lambda: panel.is_late, "the second is put off")
    desk.clock.now += 10
    until(lambda: panel._draft == {"accumulate": 4, "warmup_epochs": 7}, "the second picture")


def test_in_one_cell_it_is_shown_once_and_in_the_next_again(desk: Desk) -> None:
    desk.face.show(panel=True)
    panel = desk.face.panel
    desk.face.show(panel=True)
    desk.face.show(panel=False)
    assert desk.shown == ["panel", "picture", "table"]
    desk.cell = 2
    desk.face.show(panel=True)
    assert desk.shown == ["panel", "picture", "table"] * 2
    assert desk.face.panel is panel, "another view of the same one"


def test_a_panel_asked_for_after_the_twin_is_shown(desk: Desk) -> None:
    desk.face.show(panel=False)
    desk.face.show(panel=True)
    desk.face.show(panel=True)
    assert desk.shown == ["picture", "table", "panel"]


def test_nothing_shown_is_nothing_to_settle(desk: Desk) -> None:
    desk.session.runs()
    desk.face.settle()
    assert desk.pen.drawn == [] and desk.renewed == 0


def test_when_it_has_settled_panel_and_twin_tell_the_end(desk: Desk) -> None:
    desk.session.runs()
    desk.face.show(panel=True)
    desk.session.facts |= {"state": "done", "step": 200, "progress": 20.0}
    desk.face.settle()
    assert "✓" in desk.status() and "<b>200</b>" in desk.status()
    assert desk.pen.drawn[-1]["progress"] == 20.0
    assert desk.renewed > 0


def test_a_click_is_drawn_soon_though_nothing_trains(desk: Desk) -> None:
    desk.face.show(panel=True)
    assert desk.face.panel is not None
    desk.session.facts["asked"] = "save"
    desk.face.panel._start.click()
    until(lambda: "saving after this window" in desk.status(), "the word")


def test_a_run_that_starts_again_is_noticed_by_itself(desk: Desk) -> None:
    desk.face.show(panel=True)
    until(lambda: not desk.face._touched.is_set(), "the first look")
    desk.session.runs()
    until(lambda: "running" in desk.status(), "the state")


def test_the_end_of_a_run_that_nobody_waits_for_is_drawn(desk: Desk) -> None:
    desk.session.runs()
    desk.face.show(panel=True)
    until(lambda: desk.clock.num_reads > 20, "looks that nothing but time has brought about")
    desk.session.facts |= {"state": "done", "progress": 20.0}
    until(lambda: desk.renewed, "the twin")
    assert "✓" in desk.status() and desk.pen.drawn[-1]["progress"] == 20.0


def test_a_checkpoint_renews_the_twin_twice_a_minute_at_most(desk: Desk) -> None:
    desk.session.runs()
    desk.face.show(panel=False)
    desk.face.settle()
    before = desk.renewed
    place = {"step": 1, "degree": "local", "place": "/tmp", "num_bytes": 10, "at": 5.0}
    for count in range(10):
        desk.session.facts["saved"] = [place | {"step": count, "at": float(count)}]
        desk.face._draw()
    assert desk.renewed == before
    desk.clock.now += TWIN_EVERY_S
    desk.face._draw()
    assert desk.renewed == before + 1
    desk.clock.now += TWIN_EVERY_S
    desk.face._draw()
    assert desk.renewed == before + 1, "nothing is new"
    for count in range(2):
        desk.session.facts["saved"] = [place | {"step": 20 + count, "at": 20.0 + count}]
        desk.face._draw()
    assert desk.renewed == before + 2


def test_what_cannot_be_drawn_is_told_once_and_the_rest_goes_on(desk: Desk) -> None:
    desk.face.show(panel=True)
    desk.session.runs()
    desk.pen.error = RuntimeError("no ink")
    with pytest.warns(NbtrainWarning, match="RuntimeError: no ink"):
        desk.face.settle()
    assert desk.face.panel is not None and "no ink" in desk.face.panel._alert.value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        desk.face.settle()
    desk.pen.error = None
    drawn = len(desk.pen.drawn)
    desk.session.runs(step=101)
    desk.clock.now += 60
    until(lambda: len(desk.pen.drawn) > drawn, "a picture")


def test_what_cannot_be_shown_is_warned_of_and_raises_nothing(desk: Desk) -> None:
    desk.pen.error = RuntimeError("no ink")
    with pytest.warns(NbtrainWarning, match="RuntimeError: no ink"):
        desk.face.show(panel=True)
    desk.pen.error = None
    desk.session.runs()
    desk.face.settle()
    desk.cell = 2
    desk.face.show(panel=True)
    assert desk.shown == ["panel", "picture", "table"]


def test_a_face_keeps_no_session_alive_and_says_that_it_is_gone(desk: Desk) -> None:
    desk.face.show(panel=True)
    face, seen = desk.face, weakref.ref(desk.session)
    del desk.session
    gc.collect()
    assert seen() is None
    assert face._thread is not None and face.panel is not None
    face._thread.join(DEADLINE_S)
    assert not face._thread.is_alive()
    assert "no longer in this kernel" in face.panel._alert.value
    assert face.panel._start.disabled


def test_its_thread_ends_with_the_process(desk: Desk) -> None:
    desk.face.show(panel=True)
    assert desk.face._thread is not None and desk.face._thread.daemon
    assert desk.face._thread is not threading.main_thread()


CELL = """
import sys
sys.path.insert(0, {tests!r})
import runs
from nbtrain.face import Face

session = runs.session({folder!r})
face = Face(session)
face.show(panel=True)
session.start()
session.wait()
face.settle()
"""


def test_in_a_kernel_the_outputs_of_the_cell_tell_the_end(tmp_path: Path) -> None:
    code = CELL.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "store"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [o["data"] for o in notebook.cells[0].outputs if o["output_type"] == "display_data"]
    kinds = [[kind for kind in data if kind != "text/plain"] for data in outputs]
    assert kinds == [["application/vnd.jupyter.widget-view+json"], ["image/png"], ["text/html"]]
    assert "state            done" in outputs[2]["text/plain"]
    assert outputs[1]["text/plain"].startswith("loss ")


def test_a_process_that_ends_waits_for_the_picture_that_is_being_drawn(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(face_module.atexit, "register", at_exit.append)
    desk.face.show(panel=True)
    until(lambda: at_exit, "the thread")
    assert desk.face._thread is not None and desk.face._thread.is_alive()
    for leave in at_exit:
        leave()
    assert not desk.face._thread.is_alive()
