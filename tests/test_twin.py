"""The twin is seen without a kernel: a picture and a table, renewed where they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from faces import EVIL, Fake, Pen
from runs import session as tiny_session

from nbtrain import plots
from nbtrain.face import twin
from nbtrain.face.twin import NUM_ENTRIES, Twin

SAVED: dict[str, Any] = {
    "step": 100,
    "degree": "durable",
    "place": "/drive",
    "num_bytes": 48_000_000,
    "at": 1_770_000_000.0,
}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, dict[str, Any]]]:
    """What was displayed: display id, whether it renewed, and the output."""
    sent: list[tuple[str, bool, dict[str, Any]]] = []

    def display(output: Any, *, metadata: Any, raw: bool, display_id: str, update: bool) -> None:
        assert raw
        sent.append((display_id, update, output))

    monkeypatch.setattr(twin, "display", display)
    return sent


def table(session: Fake) -> dict[str, list[str]]:
    """Return the table's lines by their names."""
    return dict(twin.rows(session.status(), session, session.history.arrays()))


def test_both_outputs_are_shown_and_renewed_where_they_stand(page: list[Any]) -> None:
    shown = Twin(Fake(), Pen())  # type: ignore[arg-type]
    shown.show()
    shown.renew()
    ids = [id for id, _, _ in page]
    assert ids[:2] == ids[2:] and len(set(ids)) == 2
    assert [update for _, update, _ in page] == [False, False, True, True]
    assert [output.keys() for _, _, output in page[:2]] == [
        {"image/png", "text/plain"},
        {"text/html", "text/plain"},
    ]


def test_two_sessions_have_twins_of_their_own(page: list[Any]) -> None:
    for _ in range(2):
        Twin(Fake(), Pen()).show()  # type: ignore[arg-type]
    assert len({id for id, _, _ in page}) == 4


def test_it_is_stale_when_the_state_or_a_checkpoint_is_new(page: list[Any]) -> None:
    session = Fake()
    shown = Twin(session, Pen())  # type: ignore[arg-type]
    shown.show()
    assert not shown.is_stale
    for facts in (
        {"state": "running"},
        {"saved": [SAVED]},
        {"saved": [SAVED | {"degree": "copied"}]},
        {"state": "stopped", "reason": "stop"},
        {"step": 101},
        {"error": "LossError"},
    ):
        session.facts |= facts
        assert shown.is_stale, facts
        shown.renew()
        assert not shown.is_stale


def test_steps_alone_make_it_not_stale_while_it_trains(page: list[Any]) -> None:
    session = Fake()
    session.runs(step=100)
    shown = Twin(session, Pen())  # type: ignore[arg-type]
    shown.show()
    session.runs(step=200)
    assert not shown.is_stale


def test_the_table_tells_the_run() -> None:
    session = Fake()
    session.runs(step=100, state="stopped", reason="budget", saved=[SAVED])
    session.history.close_epoch({"epoch": 0, "step": 40, "progress": 1.0, "valid_loss": 0.9})
    session.history.close_epoch({"epoch": 1, "step": 80, "progress": 2.0, "valid_loss": 0.5})
    session.history.close_epoch({"epoch": 2, "step": 90, "progress": 3.0, "valid_loss": float("nan")})
    session.journal.edit(50, 0.64, "hand", accumulate=4)
    told = table(session)
    saved, written = told.pop("saved")[0], told.pop("written")[0]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d.*", written)
    assert told == {
        "state": ["stopped: the budget ends"],
        "epoch": ["1.28 of 20"],
        "step": ["100"],
        "loss": ["1.5"],
        "best validation": ["0.5 at epoch 2.00, step 80"],
        "learning rate": ["0.001, peak 0.1"],
        "settings": [
            "batch_size 32, accumulate 4, warmup_epochs 5, warmup linear, decay cosine, epochs 20"
        ],
        "changed": ["step 50, epoch 0.64: accumulate 2 → 4, by hand"],
        "stages": ["1: step 1 to 100, epoch 0.01 to 1.28"],
        "recipe": ["24 lines"],
        "goes on with": ["nbtrain.resume('cifar', trust_code=True).run()"],
    }
    assert re.fullmatch(r"step 100, 48 MB, 2026-02-0\d \d\d:\d\d.*, in /drive \(durable\)", saved)


def test_a_run_that_trains_is_told_as_of_its_writing_and_one_that_is_done_needs_no_way_on() -> None:
    session = Fake()
    session.facts["state"] = "running"
    assert table(session)["state"] == ["was running when this was written"]
    session.facts["state"] = "done"
    assert "goes on with" not in table(session)


def test_an_error_stands_beside_the_state() -> None:
    session = Fake()
    session.facts |= {"state": "failed", "reason": "error", "error": "LossError: The loss is nan"}
    assert table(session)["state"] == ["failed: an error", "LossError: The loss is nan"]


def test_a_session_that_has_done_nothing_has_a_table_too(page: list[Any]) -> None:
    told = table(Fake())
    assert not {"stages", "changed", "saved", "best validation"} & told.keys()
    assert told["loss"] == ["-"]


def test_each_stage_has_its_line() -> None:
    session = Fake()
    for step in range(1, 11):
        row = {"epoch": 0, "step": step, "progress": step / 10, "loss": 1.0, "lr": 0.1, "seconds": 0.0}
        session.history.add(stage=1 + step // 6, **row)
    assert table(session)["stages"] == [
        "1: step 1 to 5, epoch 0.10 to 0.50",
        "2: step 6 to 10, epoch 0.60 to 1.00",
    ]


def test_of_many_changes_the_newest_are_told() -> None:
    session = Fake()
    for step in range(NUM_ENTRIES + 3):
        session.journal.edit(step, step / 10, "hand", accumulate=step + 3)
    told = table(session)["changed"]
    assert told[0] == "(3 before these)" and len(told) == NUM_ENTRIES + 1
    assert told[-1].startswith(f"step {NUM_ENTRIES + 2},")


def test_it_needs_no_kernel_and_runs_nothing(page: list[Any]) -> None:
    session = Fake(EVIL)
    session.facts |= {"error": EVIL, "recipe": EVIL, "goes_on": EVIL}
    session.facts["saved"] = [SAVED | {"place": EVIL}]
    Twin(session, Pen()).show()  # type: ignore[arg-type]
    html = page[1][2]["text/html"]
    assert "<script" not in html and html.count("&lt;script&gt;") == 5
    assert not {type for _, _, output in page for type in output if "widget" in type}
    assert 'class="nbt-twin"' in html, "the panel's style finds it by that"


def test_it_reads_as_text_too(page: list[Any]) -> None:
    session = Fake()
    session.runs(step=100)
    Twin(session, Pen()).show()  # type: ignore[arg-type]
    assert page[0][2]["text/plain"].startswith("loss 1.995 -> 1.545 over 1.28 epochs")
    lines = page[1][2]["text/plain"].splitlines()
    assert lines[0] == "cifar" and "state            was running when this was written" in lines


def test_the_typed_plan_is_not_in_its_picture(page: list[Any]) -> None:
    pen = Pen()
    Twin(Fake(), pen).show()  # type: ignore[arg-type]
    assert pen.drawn[-1]["typed"] is None


def test_a_real_session_has_a_twin(tmp_path: Path, page: list[Any]) -> None:
    session = tiny_session(tmp_path)
    shown = Twin(session, plots.Curves("tiny"))
    shown.show()
    session.run()
    assert shown.is_stale
    shown.renew()
    picture, words = page[2][2], page[3][2]["text/plain"]
    assert (
        picture["image/png"].startswith(b"\x89PNG") and picture["image/png"] != page[0][2]["image/png"]
    )
    assert "state            done" in words and "best validation" in words and "(durable)" in words
