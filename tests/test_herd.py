"""The panel and the twin of a population: its facts, its verbs, a line for each member."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import nbclient
import nbformat
import pytest
from faces import EVIL, Clock
from herds import grown
from herds import population as tiny_population

from nbtrain.errors import SessionError
from nbtrain.face import members, twin
from nbtrain.face.herd import HerdPanel, HerdTwin, told
from nbtrain.population.portrait import Portrait


class Fake:
    """A population of four that trains nothing, and counts its orders."""

    def __init__(self, rounds: int = 2, name: str = "herd") -> None:
        self.name, self.lines = name, ["herd: new"]
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.be(rounds)

    def be(self, rounds: int) -> None:
        """Be after so many rounds."""
        table = grown(rounds=rounds)
        self.rows, self.best_row, self.evolution = table.rows, table.best(), table.evolution
        newest = {row.member: row for row in table.rows}
        now = {turn.member: turn for turn in table.left}
        best = self.best_row
        self.facts: dict[str, Any] = {
            "name": self.name,
            "kind": "population",
            "state": "done" if table.is_done else "ready",
            "reason": "",
            "asked": "",
            "error": "",
            "resumed": "new",
            "stage": 1,
            "round": table.round,
            "over_in_round": 0,
            "left_in_round": len(table.left),
            "num_slices": len(table.rows),
            "num_slices_in_all": 12,
            "metric": "accuracy",
            "best_score": best.score if best else None,
            "best_member": best.member if best else None,
            "members": [
                {
                    "id": id,
                    "state": "waiting",
                    "score": newest[id].score if id in newest else None,
                    "hyperparameters": dict((now.get(id) or newest[id]).hyperparameters),
                    "donor": now[id].source if id in now and now[id].is_exploit else None,
                    "progress": 0.0,
                    "loss": float("nan"),
                    "error": "",
                }
                for id in range(4)
            ],
            "arguments": {
                "mode": "pbt",
                "members": 4,
                "interval": "2 epochs",
                "epochs": 6,
                "quantile": 0.25,
            },
            "travels_with_weights": ["units"],
            "tests": [],
            "budget_limit_s": 9 * 3600.0,
            "budget_left_s": 6 * 3600.0,
            "reserve_s": 90.0,
            "saved": [],
            "pending_bytes": 0,
            "store": "folder /drive",
            "recipe": "24 lines",
            "goes_on": "nbtrain.resume('herd', trust_code=True).run()",
        }

    @property
    def state(self) -> str:
        return str(self.facts["state"])

    def status(self) -> dict[str, Any]:
        return dict(self.facts)

    def start(self) -> None:
        self._called("start")

    def pause(self) -> None:
        self._called("pause")

    def stop(self) -> None:
        self._called("stop")

    def _called(self, what: str) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(what)


class Pen:
    """Counts the pictures."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def draw(self, rows: Any, best: Any) -> None:
        self.drawn.append(len(rows))

    def png(self) -> bytes:
        return b"picture %d" % len(self.drawn)


class Shown:
    """The panel of a fake population, with a hand and an eye."""

    def __init__(self, rounds: int = 2) -> None:
        self.herd, self.pen, self.clock = Fake(rounds), Pen(), Clock()
        self.touched = threading.Event()
        picture: Any = self.pen
        self.panel = HerdPanel(self.herd, picture, self.touched, self.clock)

    @property
    def buttons(self) -> dict[str, widgets.Button]:
        return {b.description: b for b in self.panel._buttons}

    @property
    def enabled(self) -> set[str]:
        return {label for label, button in self.buttons.items() if not button.disabled}

    @property
    def text(self) -> str:
        pages = [w.value for w in self.panel.widget.children if isinstance(w, widgets.HTML)]
        return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", " ".join(pages), flags=re.S).split())


@pytest.mark.parametrize(
    ("state", "rounds", "asked", "first", "enabled"),
    [
        ("ready", 0, "", "Start", {"Start"}),
        ("ready", 1, "", "Resume", {"Resume"}),
        ("running", 0, "", "Start", {"Pause", "Stop"}),
        ("running", 1, "", "Resume", {"Pause", "Stop"}),
        ("running", 1, "pause", "Resume", {"Stop"}),
        ("running", 1, "stop", "Resume", set()),
        ("paused", 1, "", "Resume", {"Resume", "Stop"}),
        ("stopped", 1, "", "Resume", {"Resume"}),
        ("failed", 1, "", "Resume", {"Resume"}),
        ("done", 3, "", "Resume", set()),
    ],
)
def test_buttons_follow_the_state(
    state: str, rounds: int, asked: str, first: str, enabled: set[str]
) -> None:
    shown = Shown(rounds)
    shown.herd.facts |= {"state": state, "asked": asked}
    shown.panel.refresh()
    assert list(shown.buttons) == [first, "Pause", "Stop"] and shown.enabled == enabled
    assert all(button.tooltip for button in shown.buttons.values())


@pytest.mark.parametrize("verb", ["start", "pause", "stop"])
def test_every_button_calls_its_verb(verb: str) -> None:
    shown = Shown(0)
    shown.buttons[verb.capitalize()].click()
    assert shown.herd.calls == [verb] and shown.touched.is_set()
    shown.herd.error = SessionError("It is training already.")
    shown.buttons[verb.capitalize()].click()
    shown.panel.refresh()
    assert "It is training already." in shown.text


def test_a_line_for_each_member_and_where_the_population_stands() -> None:
    shown = Shown(2)
    member = shown.herd.facts["members"][1] | {"state": "training", "loss": 0.4321}
    shown.herd.facts["members"][1] = member
    shown.herd.facts |= {"state": "running", "over_in_round": 1, "left_in_round": 3}
    shown.panel.refresh(at_once=True)
    said = shown.text
    assert "● running herd stage 1, new round 3 member 1 trains, loss 0.4321" in said
    assert "best accuracy 3.1 (member 3)" in said
    assert "1 of 4 members" in said and "8 of 12 slices" in said and "reserve 1m30s" in said
    assert "member accuracy lr units from now 0 0.1" in said
    copied = next(m for m in shown.herd.facts["members"] if m["donor"] is not None)
    assert f"&lt;- {copied['donor']} waiting" in said and "3 best 3.1" in said


def test_a_member_that_failed_says_why_and_nothing_of_it_is_html() -> None:
    shown = Shown(1)
    failed = {"state": "failed", "score": None, "error": EVIL, "hyperparameters": {"lr": EVIL}}
    shown.herd.facts["members"][2] |= failed
    shown.herd.facts |= {"name": EVIL, "metric": EVIL}
    shown.panel.refresh(at_once=True)
    page = "".join(w.value for w in shown.panel.widget.children if isinstance(w, widgets.HTML))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "failed: " in shown.text


def test_a_picture_when_a_slice_is_over_and_not_sooner_than_it_costs() -> None:
    shown = Shown(1)
    assert shown.pen.drawn == [4]
    shown.clock.now += 10
    shown.panel.draw()
    assert shown.pen.drawn == [4], "nothing is new"
    shown.herd.be(2)
    shown.panel.draw()
    assert shown.pen.drawn == [4, 8]
    shown.herd.be(3)
    shown.panel.draw()
    assert shown.pen.drawn == [4, 8] and shown.panel.is_late
    shown.panel.draw(at_once=True)
    assert shown.pen.drawn == [4, 8, 12]


def test_the_twin_tells_all_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    herd = Fake(3)
    herd.facts["tests"] = [{"round": 2, "member": 3, "test_accuracy": 0.9}]
    picture = Portrait("herd", herd.evolution, "accuracy", 6)
    shown = HerdTwin(herd, picture)
    image, page = shown.outputs()
    assert image["image/png"].startswith(b"\x89PNG") and image["text/plain"].startswith("12 slices")
    assert "nbt-twin" in page["text/html"] and "<script" not in page["text/html"]
    assert "member  accuracy  lr" in page["text/plain"]
    lines = dict(told(herd.facts))
    assert lines["slices"] == ["12 of 12"] and lines["with the weights"] == ["units"]
    assert lines["tested"] == ["member 3 after round 3: test_accuracy 0.9"]
    monkeypatch.setattr(twin, "display", lambda *_, **__: None)
    shown.show()
    assert not shown.is_stale
    herd.facts["num_slices"] = 13
    assert shown.is_stale


def test_a_crowd_is_cut() -> None:
    herd = Fake(1)
    herd.facts["members"] = [herd.facts["members"][0] | {"id": id} for id in range(80)]
    assert "and 30 more" in members.table(herd.facts)


def test_the_facts_are_those_of_a_population(tmp_path: Path) -> None:
    """What `status` gives is what the face reads, also before the first slice and after the last."""
    found = tiny_population(tmp_path, epochs=2)
    fresh = found.status()
    assert {member["state"] for member in fresh["members"]} == {"ready"}
    assert fresh.keys() >= Fake(0).facts.keys()
    for tell in (members.status, members.text, members.table, told):
        tell(fresh)
    done = found.run().status()
    assert [m["id"] for m in done["members"]] == [0, 1, 2]
    assert {m["state"] for m in done["members"]} == {"done"} == {m.state for m in found.members}
    assert [m["score"] for m in done["members"]] == [m.score for m in found.members]
    assert (done["over_in_round"], done["left_in_round"]) == (0, 0)
    for tell in (members.status, members.text, members.table, told):
        tell(done)


CELL = """
import sys, threading, time
sys.path.insert(0, {tests!r})
import herds

found = herds.population({folder!r}, bar=True)
{call}
"""


@pytest.mark.parametrize(("call", "kinds"), [("found.run()", 2), ("found.panel(); found.run()", 3)])
def test_in_a_kernel_it_ends_with_a_picture_and_a_table(tmp_path: Path, call: str, kinds: int) -> None:
    """Without a panel nobody watches, as under a tool that runs notebooks."""
    code = CELL.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "store"), call=call)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [o["data"] for o in notebook.cells[0].outputs if o["output_type"] == "display_data"]
    assert [next(k for k in data if k != "text/plain") for data in outputs] == [
        "application/vnd.jupyter.widget-view+json",
        "image/png",
        "text/html",
    ][-kinds:]
    assert "state            done" in outputs[-1]["text/plain"]
    assert outputs[-2]["text/plain"].startswith("9 slices of 3 members in 3 rounds")
