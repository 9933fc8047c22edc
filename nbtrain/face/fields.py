"""The settings as fields: what is typed, what is in force beside it, and why a value is refused.

A draft is what is typed and differs from what is in force. Nothing of it acts until it is applied; a
field that nobody has touched follows the session, and an empty one means that nothing changes.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import ipywidgets as widgets

from nbtrain import plots, poll
from nbtrain.budget import seconds, words
from nbtrain.face import markup
from nbtrain.face.markup import Facts
from nbtrain.journal import SETTINGS, Journal
from nbtrain.schedule import DECAYS, WARMUPS

LABELS = {
    "accumulate": ("accumulate", "Micro-batches in a step"),
    "batch_size": ("batch size", "Samples in a micro-batch"),
    "warmup_epochs": ("warmup epochs", "Where the warmup ends, in epochs from the start of the run"),
    "warmup": ("warmup", "Shape of the warmup"),
    "decay": ("decay", "What follows the warmup; from here on, at the factor that is reached"),
    "lr": ("learning rate", "The peak: the rate where the schedule's factor is 1"),
    "budget": ("budget", "From the start of the machine: 9h, 8h30m, seconds, or none"),
}

CHOICES = {"warmup": WARMUPS, "decay": DECAYS}


class Field:
    """One setting: a place to type, and beside it the value in force or why it is refused.

    Args:
        name: Of the setting.
        touched: Set whenever something is typed.
    """

    def __init__(self, name: str, touched: threading.Event) -> None:
        self.name, self.problem = name, ""
        label, hint = LABELS[name]
        looks: dict[str, Any] = {
            "description": label,
            "style": {"description_width": "106px"},
            # The longest name of a shape, and beside it the arrow.
            "layout": widgets.Layout(width="224px" if name in CHOICES else "190px", flex="0 0 auto"),
        }
        self.input: Any = (
            widgets.Dropdown(options=CHOICES[name], **looks)
            if name in CHOICES
            else widgets.Text(placeholder="unchanged", continuous_update=True, **looks)
        )
        # ipywidgets 7 knows the one only, and 8 warns of the other.
        tooltip = "tooltip" if self.input.has_trait("tooltip") else "description_tooltip"
        setattr(self.input, tooltip, hint)
        self._note = widgets.HTML(layout=widgets.Layout(margin="0 0 0 8px"))
        self._refused = widgets.HTML()
        side_by_side = widgets.Layout(align_items="center", flex_flow="row wrap")
        line = widgets.HBox([self.input, self._note], layout=side_by_side)
        self.widget = widgets.VBox([line, self._refused])
        self.input.observe(lambda _: touched.set(), "value")
        poll.answer_where_asked(self.input)
        self._known: Any = None
        self._is_known = False

    def refresh(self, known: Any, journal: Journal) -> None:
        """Follow the session where nothing is typed, and say what is in force and what is refused."""
        if not self._is_known or known != self._known:
            follows = not self._is_known or not self.is_typed
            self._known, self._is_known = known, True
            if follows:
                self.forget()
        self.problem = self._refusal(journal) if self.is_typed else ""
        self._note.value = markup.small(f"now {self._written(self._known)}")
        self._refused.value = markup.alert(self.problem)

    def forget(self) -> None:
        """Show the value in force."""
        if self.name in CHOICES and self._known not in self.input.options:  # a function of the task's
            self.input.options = (*CHOICES[self.name], self._known)
        self.input.value = self._written(self._known)

    @property
    def is_typed(self) -> bool:
        """Whether what stands in the field is something else than what is in force."""
        text = self.input.value.strip()
        return text not in ("", self._written(self._known)) and self.value != self._known

    @property
    def value(self) -> Any:
        """What is typed: a number where it is one, seconds for a budget, else the text itself."""
        text = self.input.value.strip()
        if self.name == "budget" and text.lower() in ("none", "no limit"):
            return None
        for read in (int, float):
            try:
                number = read(text)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
        if self.name == "budget":
            try:
                return seconds(text)
            except ValueError:  # told by `problem`
                return text
        return text

    def _refusal(self, journal: Journal) -> str:
        try:
            if self.name == "budget":
                seconds(self.value)
            else:
                journal.tried(**{self.name: self.value})
        except ValueError as error:
            return str(error)
        return ""

    def _written(self, value: Any) -> str:
        if self.name == "budget":
            return "none" if value is None else words(value)
        return f"{value:g}" if isinstance(value, float) else str(value)


class Fields:
    """All settings that can be changed while the run goes on.

    Args:
        touched: Set whenever something is typed or pressed.
    """

    def __init__(self, touched: threading.Event) -> None:
        self._fields = [Field(name, touched) for name in LABELS]
        self.apply = widgets.Button(
            description="Apply at the next window",
            button_style="primary",
            layout=widgets.Layout(width="auto"),
        )
        self.undo = widgets.Button(
            description="Undo",
            tooltip="Forget what was typed",
            layout=widgets.Layout(width="auto"),
        )
        self._effect = widgets.HTML(layout=widgets.Layout(flex="1 1 160px", margin="0 0 0 8px"))
        grid = widgets.GridBox(
            [field.widget for field in self._fields],
            layout=widgets.Layout(
                grid_template_columns="repeat(auto-fit, minmax(275px, 1fr))", grid_gap="2px 16px"
            ),
        )
        line = widgets.HBox(
            [self.apply, self.undo, self._effect],
            layout=widgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.widget = widgets.VBox([grid, line])
        self.undo.on_click(lambda _: self.forget())

    @property
    def buttons(self) -> list[Any]:
        """Apply, and Undo."""
        return [self.apply, self.undo]

    @property
    def changes(self) -> dict[str, Any]:
        """What is typed, differs from what is in force, and is not refused."""
        return {f.name: f.value for f in self._fields if f.is_typed and not f.problem}

    @property
    def is_refused(self) -> bool:
        """Whether something that is typed makes no sense."""
        return any(field.problem for field in self._fields)

    def forget(self) -> None:
        """Show what is in force, in every field."""
        for field in self._fields:
            field.forget()

    def refresh(self, facts: Facts, journal: Journal) -> None:
        """Say what is in force, what is refused, and what the changes would come to."""
        in_force = facts["settings"] | {"lr": facts["peak_lr"], "budget": facts["budget_limit_s"]}
        for field in self._fields:
            field.refresh(in_force[field.name], journal)
        changes = self.changes
        self.apply.disabled = not changes or self.is_refused or facts["asked"] == "set"
        self.apply.tooltip = _why_apply(self.apply.disabled, self.is_refused, facts["asked"])
        self.undo.disabled = not any(field.is_typed for field in self._fields)
        self._effect.value = markup.small(
            _effect(facts, journal, self.planned(facts, journal), changes)
        )

    def planned(self, facts: Facts, journal: Journal) -> Journal | None:
        """Return the journal as it would be if the draft were applied now, or None without one."""
        changes = {name: value for name, value in self.changes.items() if name in SETTINGS}
        if not changes:
            return None
        return plots.edited(journal, facts["progress"], **changes)


def _why_apply(is_disabled: bool, is_refused: bool, asked: str) -> str:
    if is_refused:
        return "Something typed is refused; see beside it"
    if asked == "set":
        return "The last changes wait for their window"
    return "Nothing differs from what is in force" if is_disabled else "Change the settings typed above"


def _effect(facts: Facts, journal: Journal, planned: Journal | None, changes: dict[str, Any]) -> str:
    """Say what the draft comes to: the effective batch, the peak, the planned stop."""
    then = (planned or journal).settings
    batch, now = (s["accumulate"] * s["batch_size"] for s in (then, journal.settings))
    told = [f"effective batch {batch}" + (f" (now {now})" if batch != now else "")]
    if planned is not None and planned.peak_lr != journal.peak_lr and "lr" not in changes:
        told.append(f"peak learning rate {planned.peak_lr:.3g} (now {journal.peak_lr:.3g})")
    is_over = facts["progress"] > 0 and facts["progress"] >= journal.schedule.end
    if {"warmup", "warmup_epochs"} & changes.keys() and is_over:
        told.append("the warmup is over and stays as it was")
    limit_s = facts["budget_limit_s"]
    if "budget" in changes and changes["budget"] is None:
        told.append("nothing stops it in time")
    elif "budget" in changes and limit_s is not None:
        stop_s = changes["budget"] - limit_s + facts["budget_left_s"] - facts["reserve_s"]
        told.append(f"stops in {words(stop_s)}" if stop_s > 0 else "stops at the next window")
    return ", ".join(told)
