"""The panel reads facts and calls verbs: what it shows is the session's state, never its own."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pytest
from faces import EVIL, Clock, Fake, Pen
from runs import session as tiny_session

from nbtrain import plots
from nbtrain.errors import SessionError
from nbtrain.face import board
from nbtrain.face.panel import STATUS_EVERY_S, TYPING_S, Panel, in_words

# In both ipywidgets 7.7 and 8.
CORE = {"ButtonModel", "DropdownModel", "GridBoxModel", "HBoxModel", "HTMLModel", "ImageModel"} | {
    "TextModel",
    "VBoxModel",
}


class Shown:
    """The panel of a fake session, with a hand and an eye."""

    def __init__(self, session: Any = None, pen: Any = None) -> None:
        self.session, self.pen, self.clock = session or Fake(), pen or Pen(), Clock()
        self.touched = threading.Event()
        self.panel = Panel(self.session, self.pen, self.touched, self.clock)

    @property
    def buttons(self) -> dict[str, widgets.Button]:
        """By what they say."""
        return {
            w.description: w for w in everything(self.panel.widget) if isinstance(w, widgets.Button)
        }

    @property
    def enabled(self) -> set[str]:
        return {label for label, button in self.buttons.items() if not button.disabled}

    @property
    def text(self) -> str:
        """All that is read in it."""
        pages = [w.value for w in everything(self.panel.widget) if isinstance(w, widgets.HTML)]
        return " ".join(re.sub(r"<style>.*</style>|<[^>]*>", " ", " ".join(pages), flags=re.S).split())

    def type(self, **texts: str) -> None:
        for field in self.panel._fields._fields:
            if field.name in texts:
                field.input.value = texts[field.name]
        self.panel.refresh()


@pytest.fixture
def shown() -> Shown:
    return Shown()


def everything(widget: Any) -> list[Any]:
    """Return a widget and all that is in it."""
    return [widget, *(w for child in getattr(widget, "children", ()) for w in everything(child))]


def test_only_widgets_that_old_and_new_front_ends_know(shown: Shown) -> None:
    found = {(w._model_module, w._model_name) for w in everything(shown.panel.widget)}
    assert found == {("@jupyter-widgets/controls", name) for name in CORE}


@pytest.mark.parametrize(
    ("state", "step", "asked", "first", "enabled"),
    [
        ("ready", 0, "", "Start", {"Start"}),
        ("ready", 9, "", "Resume", {"Resume", "Checkpoint now"}),
        ("running", 0, "", "Start", {"Pause", "Checkpoint now", "Stop"}),
        ("running", 9, "", "Resume", {"Pause", "Checkpoint now", "Stop"}),
        ("running", 9, "pause", "Resume", {"Stop"}),
        ("running", 9, "stop", "Resume", set()),
        ("running", 9, "save", "Resume", {"Pause", "Stop"}),
        ("running", 9, "set", "Resume", {"Pause", "Stop"}),
        ("paused", 9, "", "Resume", {"Resume", "Checkpoint now", "Stop"}),
        ("stopped", 9, "", "Resume", {"Resume", "Checkpoint now"}),
        ("failed", 9, "", "Resume", {"Resume", "Checkpoint now"}),
        ("done", 9, "", "Resume", {"Checkpoint now"}),
    ],
)
def test_buttons_follow_the_state(
    shown: Shown, state: str, step: int, asked: str, first: str, enabled: set[str]
) -> None:
    shown.session.facts |= {"state": state, "step": step, "asked": asked}
    shown.panel.refresh()
    assert list(shown.buttons) == [
        first,
        "Pause",
        "Checkpoint now",
        "Stop",
        "Apply at the next window",
        "Undo",
    ]
    assert shown.enabled == enabled
    assert all(button.tooltip for button in shown.buttons.values())


def test_a_click_calls_the_verb_and_changes_nothing_by_itself(shown: Shown) -> None:
    shown.session.runs()
    shown.panel.refresh()
    before = shown.enabled, shown.text
    shown.buttons["Pause"].click()
    assert shown.session.calls == ["pause"] and shown.touched.is_set()
    assert (shown.enabled, shown.text) == before
    shown.session.facts["asked"] = "pause"
    shown.panel.refresh()
    assert "pausing after this window" in shown.text and "Pause" not in shown.enabled


@pytest.mark.parametrize(
    ("label", "verb"),
    [("Start", "start"), ("Pause", "pause"), ("Checkpoint now", "save"), ("Stop", "stop")],
)
def test_every_button_calls_its_verb(shown: Shown, label: str, verb: str) -> None:
    shown.buttons[label].click()
    assert shown.session.calls == [verb]


def test_a_verb_that_raises_says_so_until_the_next_click(shown: Shown) -> None:
    shown.session.error = SessionError("It is training already.")
    shown.session.error.add_note("Look at the other notebook.")
    shown.type(accumulate="4")
    shown.buttons["Start"].click()
    shown.panel.refresh()
    assert "It is training already. Look at the other notebook." in shown.text
    assert shown.panel._fields.changes == {"accumulate": 4}, "nothing typed is lost"
    shown.session.error = None
    shown.buttons["Start"].click()
    shown.panel.refresh()
    assert "training already" not in shown.text


def test_an_error_that_is_not_ours_is_told_with_its_kind() -> None:
    assert in_words(KeyError("lr")) == "KeyError: 'lr'"
    assert in_words(SessionError("Run it again.")) == "Run it again."


def test_what_ended_a_run_with_an_error_is_told(shown: Shown) -> None:
    shown.session.facts |= {"state": "failed", "error": "LossError: The loss is nan"}
    shown.panel.refresh()
    assert "LossError: The loss is nan" in shown.text


def test_nothing_typed_acts_until_it_is_applied(shown: Shown) -> None:
    shown.session.runs()
    shown.type(accumulate="4", warmup_epochs="3")
    assert shown.session.calls == []
    shown.buttons["Apply at the next window"].click()
    assert shown.session.calls == [{"accumulate": 4, "warmup_epochs": 3}]


def test_the_numbers_change_every_two_seconds_at_most_and_together(shown: Shown) -> None:
    shown.session.runs(step=100)
    shown.panel.refresh()
    shown.session.runs(step=101)
    shown.clock.now += STATUS_EVERY_S - 0.1
    shown.panel.refresh()
    assert "step 100" in shown.text and "step 101" not in shown.text
    assert "6,464 of 5,000 samples" not in shown.text
    shown.clock.now += 0.1
    shown.panel.refresh()
    assert "step 101" in shown.text and "6,464 of 5,000 samples" in shown.text


@pytest.mark.parametrize("change", [{"state": "paused"}, {"asked": "pause"}, {"resumed": "again"}])
def test_a_change_of_state_is_told_at_once(shown: Shown, change: dict[str, str]) -> None:
    shown.session.runs(step=100)
    shown.panel.refresh()
    shown.session.facts |= {"step": 101} | change
    shown.panel.refresh()
    assert "step 101" in shown.text


def test_facts_that_stand_still_send_nothing(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    shown.session.runs()
    monkeypatch.setattr("nbtrain.face.panel.time.time", lambda: 1_000_000.0)
    shown.panel.refresh()
    sent: list[Any] = []
    for widget in everything(shown.panel.widget):
        widget.observe(sent.append)
    shown.clock.now += 10
    shown.panel.refresh()
    assert sent == []


def test_the_last_lines_of_the_log_are_shown(shown: Shown) -> None:
    shown.session.lines = [f"epoch {i}: loss" for i in range(20)]
    shown.panel.refresh()
    assert "epoch 19: loss" in shown.text and "epoch 12: loss" in shown.text
    assert "epoch 11: loss" not in shown.text


def test_no_text_of_the_users_becomes_markup() -> None:
    session = Fake(EVIL)
    session.lines = [EVIL]
    session.facts |= {"error": EVIL, "saved": [], "store": EVIL, "pending_bytes": 5}
    shown = Shown(session)
    session.error = ValueError(EVIL)
    shown.buttons["Start"].click()
    shown.type(lr=EVIL)
    assert not [
        w
        for w in everything(shown.panel.widget)
        if "<script" in str(getattr(w, "value", "")) and isinstance(w, widgets.HTML)
    ]
    assert shown.text.count("&lt;script&gt;") >= 5


# ---- pictures


def test_there_is_a_picture_from_the_first(shown: Shown) -> None:
    assert shown.panel._picture.value == b"picture 1" and "no step yet" in shown.text


def test_a_picture_comes_when_the_pen_has_rested(shown: Shown) -> None:
    shown.session.runs(step=100)
    shown.clock.now += board.PICTURE_EVERY_S - 0.1
    shown.panel.draw()
    assert len(shown.pen.drawn) == 1
    shown.clock.now += 0.1
    shown.panel.draw()
    assert len(shown.pen.drawn) == 2 and shown.panel._picture.value == b"picture 2"
    assert "loss 1.995 -&gt; 1.545 over 1.28 epochs" in shown.text, "for who does not see it"


@pytest.mark.parametrize(("took_s", "rest_s"), [(0.001, 2.0), (0.1, 10.0)])
def test_pictures_that_take_longer_come_less_often(shown: Shown, took_s: float, rest_s: float) -> None:
    shown.pen.clock, shown.pen.took_s = shown.clock, took_s
    for step in range(50):
        shown.session.runs(step=step)
        shown.panel.draw(at_once=True)
    num_drawn = len(shown.pen.drawn)
    shown.session.runs(step=100)
    shown.clock.now += 0.98 * rest_s
    shown.panel.draw()
    assert len(shown.pen.drawn) == num_drawn
    shown.clock.now += 0.02 * rest_s
    shown.panel.draw()
    assert len(shown.pen.drawn) == num_drawn + 1


def test_a_picture_that_would_be_the_same_is_not_drawn(shown: Shown) -> None:
    shown.clock.now += 60
    shown.panel.draw()
    shown.panel.draw(at_once=True)
    assert len(shown.pen.drawn) == 1


def test_the_planned_curve_is_drawn_as_it_is_typed(shown: Shown) -> None:
    shown.session.runs(progress=1.0)
    shown.clock.now += 60
    shown.panel.draw()
    shown.type(warmup_epochs="3")
    shown.clock.now += TYPING_S
    shown.panel.draw()
    typed = shown.pen.drawn[-1]["typed"]
    assert len(shown.pen.drawn) == 3 and typed.settings["warmup_epochs"] == 3
    shown.type(warmup_epochs="5")
    shown.clock.now += TYPING_S
    shown.panel.draw()
    assert len(shown.pen.drawn) == 4 and shown.pen.drawn[-1]["typed"] is None


def test_a_draft_that_leaves_the_rates_alone_draws_no_second_curve(shown: Shown) -> None:
    shown.session.runs()
    shown.type(accumulate="4", budget="10h")
    shown.clock.now += TYPING_S
    shown.panel.draw()
    assert shown.pen.drawn[-1]["typed"] is None


def test_a_panel_whose_session_is_gone_says_so_and_cannot_be_pressed(shown: Shown) -> None:
    shown.session.runs()
    shown.type(accumulate="4")
    shown.panel.leave("This session is no longer in this kernel.")
    assert "no longer in this kernel" in shown.text and shown.enabled == set()


def test_a_real_session_is_shown_steered_and_drawn(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    shown = Shown(session, plots.Curves("tiny"))
    panel = shown.panel
    before = bytes(panel._picture.value)
    assert before.startswith(b"\x89PNG") and shown.enabled == {"Start"}
    shown.type(accumulate="2", warmup_epochs="0.5")
    shown.buttons["Apply at the next window"].click()
    shown.buttons["Start"].click()
    session.wait()
    shown.clock.now += 60
    panel.refresh()
    panel.draw()
    assert "✓ done" in shown.text and "step 8" in shown.text and "(durable)" in shown.text
    assert [entry.what for entry in session.journal.entries] == ["accumulate", "warmup_epochs"]
    assert bytes(panel._picture.value) != before and panel._fields.changes == {}
