"""The first settings, folded with every edit, give the live ones to the bit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nbtrain.errors import CheckpointError
from nbtrain.journal import OPTIONS, SETTINGS, Entry, Journal

FIRST: dict[str, Any] = {
    "epochs": 20,
    "warmup_epochs": 5,
    "warmup": "exponential",
    "decay": "cosine",
    "milestones": (),
    "gamma": 0.1,
    "batch_size": 32,
    "accumulate": 4,
    "lr": None,
    "base_lr": None,
    "base_batch": None,
    **dict.fromkeys((*OPTIONS, "plateau_patience")),
}
EDITS: list[tuple[int, float, dict[str, Any]]] = [
    (10, 1 / 3, {"warmup_epochs": 7.7}),
    (20, 2 / 3, {"accumulate": 8, "batch_size": 16}),
    (30, 1.1, {"warmup": "linear", "lr": 0.3}),
    (31, 1.1, {"warmup_epochs": 6.1}),
    (40, 7.9, {"warmup_epochs": 9}),
    (50, 8.3, {"epochs": 25, "lr": None, "base_lr": 0.1, "base_batch": 256}),
    (60, 9.9, {"decay": "multistep", "milestones": (12, 17.5), "gamma": 0.3}),
    (70, 12.0, {"batch_size": 64}),
]
PLACES = [i / 37 for i in range(37 * 26)]


def journal(**changes: Any) -> Journal:
    return Journal(FIRST | changes, [0.4, 0.04])


def shape(journal: Journal) -> tuple[Any, ...]:
    """Return all that a run can see of a journal."""
    rates = [journal.rates(p) for p in PLACES]
    return journal.settings, rates, journal.entries, journal.peak_lr, journal.writes_rates


def test_a_journal_shows_what_is_in_force_and_what_was_changed() -> None:
    made = journal()
    assert repr(made) == "<journal: batch_size 32, accumulate 4, lr 0.4, warmup 5, cosine; 0 changes>"
    made.edit(1200, 1 / 3, "panel", accumulate=8)
    assert repr(made).splitlines() == [
        "<journal: batch_size 32, accumulate 8, lr 0.4, warmup 5, cosine; 1 changes",
        "  step 1,200, epoch 0.33: accumulate 4 → 8, by panel>",
    ]


def test_first_settings_folded_with_the_edits_are_the_live_ones_after_every_edit() -> None:
    live = journal()
    for step, progress, changes in EDITS:
        live.edit(step, progress, "hand", **changes)
        text = json.dumps(live.state_dict(), allow_nan=False)
        for state in (live.state_dict(), json.loads(text)):
            assert shape(Journal.from_state_dict(state)) == shape(live)
    assert live.settings == FIRST | {k: v for _, _, c in EDITS for k, v in c.items()}


def test_a_journal_folded_in_the_middle_goes_on_like_the_live_one() -> None:
    live, resumed = journal(), journal()
    for step, progress, changes in EDITS:
        live.edit(step, progress, "hand", **changes)
        resumed = Journal.from_state_dict(json.loads(json.dumps(resumed.state_dict())))
        resumed.edit(step, progress, "hand", **changes)
    assert shape(resumed) == shape(live)


def test_an_edit_bends_the_rates_only_from_there_on() -> None:
    live = journal()
    for step, progress, changes in EDITS[:1] + EDITS[4:5]:
        before = live.rates(progress)
        live.edit(step, progress, "hand", **changes)
        assert live.rates(progress) == pytest.approx(before, rel=1e-15)


def test_an_edit_is_written_down_with_step_what_from_to_and_by_whom() -> None:
    live = journal()
    made = live.edit(7, 0.5, "hand", accumulate=2, warmup_epochs=3)
    assert made == [
        Entry(7, 0.5, "accumulate", 4, 2, "hand"),
        Entry(7, 0.5, "warmup_epochs", 5, 3, "hand"),
    ]
    assert live.entries == made


def test_an_edit_to_what_is_already_so_is_no_edit() -> None:
    live = journal()
    before = shape(live)
    assert live.edit(3, 2.0, "hand", accumulate=4, warmup_epochs=5, milestones=[]) == []
    assert shape(live) == before
    assert live.state_dict()["edits"] == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size=0 must be a whole number from 1 up"),
    ({"batch_size": 2.0}, "batch_size=2.0 must be a whole number"),
    ({"accumulate": True}, "accumulate=True must be a whole number"),
    ({"epochs": 0}, "or None for no end"),
    ({"epochs": 1.5}, "or None for no end"),
    ({"epochs": None}, "needs epochs"),
    ({"lr": 0}, "lr=0 must be a number above 0"),
    ({"lr": float("nan")}, "lr=nan must be a number above 0"),
    ({"lr": "0.1"}, "lr='0.1' must be a number above 0"),
    ({"base_lr": 0.1}, "base_lr and base_batch go together"),
    ({"base_batch": 256}, "base_lr and base_batch go together"),
    ({"warmup": "no"}, "Use one of: linear, exponential, cosine, constant"),
    ({"warmup_epochs": 20}, "Shorten the warmup"),
    ({"warmup_epochs": "3"}, "use 0 or more"),
    ({"decay": "multistep"}, "needs milestones"),
    ({"decay": "restarts"}, "needs period"),
    ({"floor": 2}, "below 1"),
    ({"plateau_patience": -1}, "plateau_patience=-1 must be a whole number"),
    ({"plateau_patience": 1.5}, "plateau_patience=1.5 must be a whole number"),
    ({"decay": "function"}, r"Let build give it, Task\(schedule=function\)"),
    ({"momentum": 0.9}, "momentum cannot be set. There are: epochs, "),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_refused_edit_changes_nothing_of_anything(changes: dict[str, Any], message: str) -> None:
    live = journal()
    live.edit(1, 1.0, "hand", warmup_epochs=6)
    before, state = shape(live), live.state_dict()
    with pytest.raises(ValueError, match=message):
        live.edit(2, 2.0, "hand", **{"accumulate": 9, **changes})
    assert shape(live) == before
    assert live.state_dict() == state


@pytest.mark.parametrize(
    "changes", [c for c, _ in BAD if c.keys() <= set(SETTINGS) and c != {"decay": "function"}]
)
def test_first_settings_are_refused_like_edits(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=" "):
        journal(**changes)


def test_what_is_tried_changes_nothing() -> None:
    live = journal()
    before = shape(live)
    assert live.tried(accumulate=2)[0] == {"accumulate": 2}
    assert shape(live) == before


def test_the_scaling_rule_follows_the_samples_of_a_step() -> None:
    live = journal(base_lr=0.1, base_batch=256)
    assert live.peak_lr == 0.1 * 128 / 256
    live.edit(1, 10.0, "hand", accumulate=16)
    assert live.peak_lr == 0.1 * 512 / 256
    live.edit(2, 10.0, "hand", batch_size=16)
    assert live.peak_lr == 0.1


def test_a_rate_by_hand_goes_before_the_scaling_rule() -> None:
    live = journal(base_lr=0.1, base_batch=256, lr=0.7)
    assert live.peak_lr == 0.7
    live.edit(1, 10.0, "hand", lr=None)
    assert live.peak_lr == 0.05


def test_groups_keep_their_proportions_under_every_peak() -> None:
    live = journal(warmup_epochs=0, decay="constant")
    assert live.rates(3.0) == [0.4, 0.04]
    live.edit(1, 1.0, "hand", lr=0.8)
    assert live.rates(3.0) == [0.8, pytest.approx(0.08, rel=1e-15)]


def test_a_session_that_was_told_nothing_of_rates_leaves_them_to_the_optimizer() -> None:
    plain = {"warmup_epochs": 0, "decay": "constant"}
    live = journal(**plain)
    live.edit(1, 1.0, "cell", epochs=30, batch_size=8, accumulate=2, gamma=0.5)
    assert not live.writes_rates
    for told in ({"lr": 0.1}, {"base_lr": 0.1, "base_batch": 32}, {"warmup_epochs": 3}):
        live = journal(**plain)
        live.edit(1, 1.0, "hand", **told)
        assert live.writes_rates
        live.edit(
            2, 2.0, "hand", **{name: FIRST[name] if name != "warmup_epochs" else 0 for name in told}
        )
        assert live.writes_rates, "what it wrote once it must go on writing"
        assert Journal.from_state_dict(live.state_dict()).writes_rates
    for told in ({"lr": 0.1}, {"warmup_epochs": 3}, {"decay": "exponential"}):
        assert journal(**(plain | told)).writes_rates


def test_the_journal_keeps_no_hold_of_what_it_was_given() -> None:
    first = dict(FIRST, milestones=[3, 9], decay="multistep")
    live = Journal(first, [0.4, 0.04])
    before = live.rates(5.0)
    first["milestones"].append(4)
    first["lr"] = 9.0
    live.state_dict()["first"]["milestones"].append(1)
    assert live.rates(5.0) == before


def test_a_journal_of_before_these_settings_is_read() -> None:
    old = journal().state_dict()
    for name in (*OPTIONS, "plateau_patience"):
        del old["first"][name]
    assert shape(Journal.from_state_dict(old)) == shape(journal())


def lowered(
    values: list[float | None], live: Journal, name: str = "valid_loss", direction: str = "min"
) -> list[int]:
    """Return after which of these validations, one an epoch, the rates were lowered."""
    rows: list[dict[str, Any]] = []
    found = []
    for epoch, value in enumerate(values, 1):
        rows.append({"progress": float(epoch)} | ({} if value is None else {name: value}))
        if live.observe(10 * epoch, float(epoch), rows, name, direction):
            found.append(epoch)
    return found


def waiting(**changes: Any) -> Journal:
    return journal(**{"decay": "plateau", "warmup_epochs": 0, "plateau_patience": 1} | changes)


def test_a_plateau_is_where_torchs_own_is() -> None:
    generator = torch.Generator().manual_seed(7)
    values = torch.rand(60, generator=generator).add(1).tolist()
    values += [1.0, 0.99995, 0.9999, 0.99985, 0.5, 0.5, 0.5, 0.5, 0.4, math.nan, math.nan, 0.3]
    for patience in (0, 1, 3):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = ReduceLROnPlateau(optimizer, factor=0.9, patience=patience)
        live, rates = waiting(plateau_patience=patience, gamma=0.9, floor=1e-8), []
        for value in values:
            theirs.step(value)
            rates.append(optimizer.param_groups[0]["lr"])
        turns = [k + 1 for k in range(len(values)) if rates[k] < ([1.0, *rates])[k]]
        assert lowered(values, live) == turns
        assert live.schedule(100.0) == pytest.approx(rates[-1], rel=1e-12)


def test_a_plateau_is_written_down_and_folds_to_the_bit() -> None:
    live = waiting(gamma=0.3)
    assert lowered([3.0, 2.0, 2.0, 2.5, 2.5, 2.1, 1.0], live) == [4, 6]
    assert [(e.step, e.what, e.by) for e in live.entries] == [
        (40, "factor", "plateau"),
        (60, "factor", "plateau"),
    ]
    assert (live.entries[1].old, live.entries[1].new) == (0.3, 0.3 * 0.3)
    assert live.rates(7.0) == [0.4 * (0.3 * 0.3), 0.04 * (0.3 * 0.3)]
    assert shape(Journal.from_state_dict(json.loads(json.dumps(live.state_dict())))) == shape(live)


def test_a_plateau_ends_at_the_floor_and_counts_nothing_in_the_warmup() -> None:
    assert lowered([2.0] * 9, waiting(gamma=0.5, floor=0.3)) == [3, 5]
    assert lowered([2.0] * 9, waiting(warmup_epochs=4, gamma=0.5, floor=0.3)) == [6, 8]
    assert lowered([2.0] * 9, waiting(decay="constant")) == []


def test_a_plateau_may_be_of_what_is_better_the_more_it_is() -> None:
    rising = [0.1, 0.2, 0.3, 0.4, 0.5]
    live = waiting()
    assert lowered(rising, live, "accuracy", "max") == []
    assert lowered(rising, waiting(), "accuracy", "min") == [3, 5]
    assert lowered([0.5, None, 0.4, None, 0.3, 0.2], live, "accuracy", "max") == [5]


def test_a_decay_that_becomes_a_plateau_counts_from_there() -> None:
    live = waiting(decay="constant")
    rows = [{"progress": float(epoch), "valid_loss": 1.0} for epoch in range(1, 8)]
    assert not live.observe(70, 7.0, rows)
    live.edit(70, 7.0, "hand", decay="plateau")
    assert not live.observe(70, 7.0, rows)
    rows += [{"progress": float(epoch), "valid_loss": 1.0} for epoch in (8, 9)]
    assert live.observe(90, 9.0, rows)


def test_a_function_comes_from_the_one_of_now_and_is_missed_where_there_is_none() -> None:
    live = Journal(FIRST | {"decay": "function"}, [0.4], lambda at: 1 / (1 + at))
    assert live.writes_rates
    live.edit(10, 6.0, "hand", lr=0.2)
    again = Journal.from_state_dict(json.loads(json.dumps(live.state_dict())), live)
    assert again.rates(7.0) == live.rates(7.0) == [0.2 / 8]
    with pytest.raises(CheckpointError, match="which the task brings no more"):
        Journal.from_state_dict(live.state_dict(), journal())
    with pytest.raises(ValueError, match="no function here"):
        Journal.from_state_dict(live.state_dict()).rates(7.0)
