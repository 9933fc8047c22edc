"""What is typed is a draft: it acts only when it is applied, and a wrong value says why."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from faces import EVIL, FIRST, Fake

from nbtrain.face.fields import LABELS, Field, Fields
from nbtrain.journal import Journal


class Form:
    """The fields of a fake session, with a hand that types."""

    def __init__(self, **first: Any) -> None:
        self.session, self.touched = Fake(**first), threading.Event()
        self.fields = Fields(self.touched)
        self.refresh()

    def refresh(self) -> None:
        self.fields.refresh(self.session.status(), self.session.journal)

    def field(self, name: str) -> Field:
        return self.fields._fields[list(LABELS).index(name)]

    def type(self, **texts: str) -> None:
        for name, text in texts.items():
            self.field(name).input.value = text
        self.refresh()

    @property
    def effect(self) -> str:
        return str(self.fields._effect.value)


@pytest.fixture
def form() -> Form:
    return Form()


def test_every_field_shows_what_is_in_force(form: Form) -> None:
    shown = {name: form.field(name).input.value for name in LABELS}
    assert shown == {
        "accumulate": "2",
        "batch_size": "32",
        "warmup_epochs": "5",
        "warmup": "linear",
        "decay": "cosine",
        "lr": "0.1",
        "budget": "9h00m",
    }
    assert "now 2<" in form.field("accumulate")._note.value
    assert (
        form.fields.changes == {}
        and form.fields.planned(form.session.status(), form.session.journal) is None
    )
    assert form.fields.apply.disabled and form.fields.undo.disabled


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("accumulate", "4", 4),
        ("accumulate", " 4 ", 4),
        ("batch_size", "64", 64),
        ("warmup_epochs", "2.5", 2.5),
        ("warmup", "exponential", "exponential"),
        ("warmup", "constant", "constant"),
        ("decay", "onecycle", "onecycle"),
        ("lr", "5e-2", 0.05),
        ("budget", "8h30m", 30600.0),
        ("budget", "3600", 3600),
        ("budget", "none", None),
    ],
)
def test_what_is_typed_becomes_a_change(form: Form, name: str, text: str, value: Any) -> None:
    form.type(**{name: text})
    assert form.fields.changes == {name: value}
    assert type(form.fields.changes[name]) is type(value)
    assert not form.fields.apply.disabled and not form.fields.undo.disabled
    if name != "budget":
        form.session.journal.tried(**form.fields.changes)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("accumulate", "four", "accumulate='four' must be a whole number from 1 up."),
        ("accumulate", "4.5", "accumulate=4.5 must be a whole number from 1 up."),
        ("accumulate", "0", "accumulate=0 must be a whole number from 1 up."),
        ("batch_size", "-1", "batch_size=-1 must be a whole number from 1 up."),
        ("lr", "inf", "lr='inf' must be a number above 0."),
        ("lr", "nan", "lr='nan' must be a number above 0."),
        ("warmup_epochs", "20", "warmup_epochs=20 leaves nothing of epochs=20 for the cosine."),
        ("budget", "soon", "A duration of 'soon' cannot be read."),
        ("budget", "0", "A duration of 0 is not above zero."),
    ],
)
def test_a_wrong_value_says_why_in_the_sessions_own_words(
    form: Form, name: str, text: str, words: str
) -> None:
    form.type(**{name: text})
    assert words in form.field(name).problem
    assert 'role="alert"' in form.field(name)._refused.value
    assert form.fields.changes == {} and form.fields.is_refused
    assert form.fields.apply.disabled and not form.fields.undo.disabled
    form.type(**{name: "3"})
    assert form.field(name)._refused.value == "" and not form.fields.apply.disabled


def test_a_decay_that_lacks_something_says_what(form: Form) -> None:
    form.type(decay="restarts")
    assert "needs period, in epochs" in form.field("decay").problem
    assert form.fields.apply.disabled
    form.type(decay="linear")
    assert form.fields.changes == {"decay": "linear"}


def test_a_function_of_the_tasks_is_in_force_and_can_be_left() -> None:
    form = Form()
    form.session.journal = Journal(FIRST | {"decay": "function"}, [0.1], lambda at: 1 / (1 + at))
    form.session.facts["progress"] = 3.0
    form.refresh()
    assert form.field("decay").input.value == "function"
    assert form.fields.changes == {}
    form.type(decay="constant")
    planned = form.fields.planned(form.session.status(), form.session.journal)
    assert planned is not None
    assert planned.settings["decay"] == "constant"


def test_before_the_first_step_a_warmup_is_not_over(form: Form) -> None:
    form.session.journal.edit(0, 0.0, "hand", warmup_epochs=0)
    form.refresh()
    form.type(warmup_epochs="3")
    assert "the warmup is over" not in form.effect
    planned = form.fields.planned(form.session.status(), form.session.journal)
    assert planned is not None
    assert planned.schedule.end == 3


def test_one_wrong_value_holds_up_the_others(form: Form) -> None:
    form.type(accumulate="4", lr="big")
    assert form.fields.apply.disabled and "refused" in form.fields.apply.tooltip


def test_a_wrong_value_is_not_markup(form: Form) -> None:
    form.type(lr=EVIL)
    assert "<script" not in form.field("lr")._refused.value
    assert "&lt;script" in form.field("lr")._refused.value


def test_an_empty_field_changes_nothing(form: Form) -> None:
    form.type(accumulate="", budget=" ")
    assert form.fields.changes == {} and not form.fields.is_refused


def test_the_value_in_force_written_otherwise_is_no_change(form: Form) -> None:
    form.type(warmup_epochs="5.0", budget="9h", lr="1e-1")
    assert form.fields.changes == {}
    assert form.field("warmup_epochs").input.value == "5.0", "the text under the caret stays"


def test_a_budget_that_its_words_round_is_no_change_by_itself(form: Form) -> None:
    form.session.facts["budget_limit_s"] = 30620.0
    form.refresh()
    assert form.field("budget").input.value == "8h30m"
    assert form.fields.changes == {}


def test_an_untouched_field_follows_the_session(form: Form) -> None:
    form.session.journal.edit(1, 0.1, "hand", accumulate=8)
    form.refresh()
    assert form.field("accumulate").input.value == "8" and form.fields.changes == {}


def test_a_touched_field_stays_while_the_session_changes_under_it(form: Form) -> None:
    form.type(accumulate="4")
    form.session.journal.edit(1, 0.1, "hand", accumulate=8)
    form.refresh()
    assert form.field("accumulate").input.value == "4" and form.fields.changes == {"accumulate": 4}
    assert "now 8<" in form.field("accumulate")._note.value


def test_a_draft_that_has_come_into_force_is_none_and_follows_again(form: Form) -> None:
    form.type(accumulate="4")
    form.session.facts["asked"] = "set"
    form.refresh()
    assert form.fields.apply.disabled, "it waits for its window already"
    form.session.journal.edit(1, 0.1, "hand", accumulate=4)
    form.session.facts["asked"] = ""
    form.refresh()
    assert form.field("accumulate").input.value == "4" and form.fields.changes == {}
    form.session.journal.edit(2, 0.2, "hand", accumulate=16)
    form.refresh()
    assert form.field("accumulate").input.value == "16"


def test_undo_empties_the_draft(form: Form) -> None:
    form.type(accumulate="4", lr="big", warmup="exponential")
    form.fields.undo.click()
    form.refresh()
    assert form.fields.changes == {} and not form.fields.is_refused
    assert form.field("lr").input.value == "0.1" and form.field("warmup").input.value == "linear"


def test_typing_is_heard_at_once(form: Form) -> None:
    form.touched.clear()
    form.field("accumulate").input.value = "4"
    assert form.touched.is_set()


def test_the_effective_batch_is_told_as_it_would_be(form: Form) -> None:
    assert "effective batch 64<" in form.effect
    form.type(accumulate="4")
    assert "effective batch 128 (now 64)" in form.effect


def test_a_rate_that_scales_with_the_batch_is_told() -> None:
    form = Form(base_lr=0.1, base_batch=64)
    form.type(batch_size="64")
    assert "peak learning rate 0.2 (now 0.1)" in form.effect


def test_a_warmup_that_is_over_cannot_be_made_longer_and_it_is_told(form: Form) -> None:
    form.session.runs(progress=4.0)
    form.type(warmup_epochs="6")
    assert "warmup is over" not in form.effect
    form.session.runs(progress=5.0)
    form.refresh()
    assert "the warmup is over and stays as it was" in form.effect


def test_a_budget_tells_what_it_leaves(form: Form) -> None:
    form.type(budget="10h")
    assert "stops in 6h58m" in form.effect
    form.type(budget="none")
    assert "nothing stops it in time" in form.effect
    form.type(budget="1h")  # three have passed
    assert "stops at the next window" in form.effect


def test_the_plan_is_what_the_journal_would_be_and_the_journal_stays(form: Form) -> None:
    form.session.runs(progress=1.0)
    form.type(warmup_epochs="3", budget="4h")
    planned = form.fields.planned(form.session.status(), form.session.journal)
    assert planned is not None and planned.settings["warmup_epochs"] == 3
    assert planned.rates(3.0)[0] == pytest.approx(0.1) != form.session.journal.rates(3.0)[0]
    assert form.session.journal.entries == []
