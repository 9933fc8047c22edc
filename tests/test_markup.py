"""What a session says of itself in HTML: true, escaped, and never by colour alone."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from faces import EVIL, Fake

from nbtrain.face import markup

NOW = time.mktime((2026, 3, 2, 12, 0, 0, 0, 0, -1))
PLACE: dict[str, Any] = {
    "step": 1200,
    "degree": "copied",
    "place": "/drive",
    "num_bytes": 48_000_000,
    "at": NOW - 130,
}


def text(html: str) -> str:
    """Return what is read of HTML."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def facts(**changed: Any) -> dict[str, Any]:
    fake = Fake()
    fake.runs()
    return fake.status() | changed


def test_the_status_line_is_told_to_a_screen_reader() -> None:
    assert '<div class="nbt" role="status" aria-live="polite">' in markup.status(facts())


def test_the_status_line_tells_the_run() -> None:
    said = text(markup.status(facts(stage=2, resumed="resumed at step 50")))
    assert said == (
        "● running cifar stage 2, resumed at step 50 "
        "epoch 1.28 of 20 step 100 loss 1.5 learning rate 0.001 100 samples/s"
    )


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("ready", "", "○ ready"),
        ("running", "", "● running"),
        ("paused", "pause", "‖ paused"),
        ("stopped", "stop", "■ stopped"),
        ("stopped", "budget", "■ stopped: the budget ends"),
        ("paused", "interrupt", "‖ paused: interrupted"),
        ("failed", "error", "! failed: an error"),
        ("done", "done", "✓ done"),
    ],
)
def test_each_state_has_a_sign_and_a_word(state: str, reason: str, words: str) -> None:
    assert text(markup.status(facts(state=state, reason=reason))).startswith(f"{words} cifar")


@pytest.mark.parametrize(("asked", "words"), list(markup.ASKED.items()))
def test_an_order_that_waits_is_told(asked: str, words: str) -> None:
    assert words in text(markup.status(facts(asked=asked)))


def test_a_loss_that_is_not_there_yet_is_a_dash() -> None:
    assert "loss - " in text(markup.status(facts(loss=float("nan"))))


def test_the_bars_tell_epoch_run_and_budget() -> None:
    html = markup.bars(facts(position=1000, progress=0.2, epochs=10), NOW)
    assert re.findall(r'aria-label="(\w+)".*?aria-valuenow="(\d+)"', html) == [
        ("epoch", "20"),
        ("run", "2"),
        ("budget", "33"),
    ]
    told = text(html)
    assert "1,000 of 5,000 samples, 40s left" in told
    assert "run 10 epochs, 8m10s left" in told
    assert "6h00m left, stops at 17:58" in told and "reserve 1m30s" in told


def test_the_budget_bar_marks_the_reserve_and_the_planned_stop_before_it() -> None:
    html = markup.bars(facts(budget_limit_s=1000.0, budget_left_s=500.0, reserve_s=100.0), NOW)
    assert 'class="nbt-reserve" style="width: 10.00%"' in html
    assert 'class="nbt-stop" style="left: 90.00%"' in html


def test_a_budget_without_a_limit_says_so() -> None:
    html = markup.bars(facts(budget_limit_s=None, budget_left_s=float("inf")), NOW)
    assert "budget no limit: nothing stops it in time" in text(html)
    assert "nbt-stop" not in html


def test_a_budget_that_is_over_promises_no_stop() -> None:
    told = text(markup.bars(facts(budget_left_s=-5.0), NOW))
    assert "0s left, only the reserve is left" in told


def test_a_stop_on_another_day_has_its_weekday() -> None:
    assert markup.moment(NOW + 3600, NOW).startswith("13:00")
    assert markup.moment(NOW + 86400, NOW).startswith("Tue 12:00")


def test_a_run_that_outlasts_its_budget_says_how_far_it_comes() -> None:
    # 20 epochs of 50 s each, and 490 s less the reserve of 90 s.
    told = text(markup.bars(facts(progress=2.0, budget_left_s=490.0), NOW))
    assert "run 20 epochs, 15m00s left; the budget ends near 10.00" in told


def test_one_epoch_is_not_many() -> None:
    assert "run 1 epoch budget" in text(markup.bars(facts(state="done", epochs=1), NOW))


def test_a_run_without_an_end_says_so() -> None:
    told = text(markup.bars(facts(epochs=None, progress=3.2), NOW))
    assert "run no end but the budget" in told


def test_a_run_that_is_done_has_full_bars() -> None:
    html = markup.bars(facts(state="done", position=0, progress=20.0), NOW)
    assert re.findall(r'aria-valuenow="(\d+)"', html)[:2] == ["100", "100"]


def test_what_is_left_is_told_only_while_it_trains() -> None:
    told = text(markup.bars(facts(state="paused"), NOW))
    assert "samples run" in told and "epochs budget stops at" in told and "left" not in told


def test_bars_that_stand_still_are_new_every_few_seconds_lest_they_pass_for_silence() -> None:
    still = facts(budget_limit_s=None, budget_left_s=float("inf"))
    assert markup.bars(still, NOW) == markup.bars(still, NOW + 1)
    assert markup.bars(still, NOW) != markup.bars(still, NOW + markup.SILENCE_S / 2)


def test_only_a_run_that_trains_can_fall_silent() -> None:
    assert "nbt-silent" in markup.bars(facts(), NOW)
    assert "nbt-silent" not in markup.bars(facts(state="paused"), NOW)


def test_a_checkpoint_has_its_place_age_size_and_degree() -> None:
    told = text(markup.saved(facts(saved=[PLACE], pending_bytes=2_000_000), NOW))
    assert told == (
        "Checkpoint: step 1,200, 48 MB, 2m10s ago, in /drive "
        "(copied: handed to the mount, its upload cannot be seen) "
        "2.0 MB are not yet in folder /drive"
    )
    assert text(markup.saved(facts(), NOW)) == "Checkpoint: nothing saved yet in this kernel"


@pytest.mark.parametrize("state", ["paused", "stopped", "done", "failed"])
def test_what_rests_is_drawn_once_and_tells_no_age_that_would_soon_be_wrong(state: str) -> None:
    told = text(markup.saved(facts(state=state, saved=[PLACE]), NOW))
    assert "48 MB, 11:57" in told and "ago" not in told
    old = text(markup.saved(facts(state=state, saved=[PLACE | {"at": NOW - 20 * 86400}]), NOW))
    assert "48 MB, 2026-02-10 12:00" in old
    assert "left" not in text(markup.bars(facts(state=state), NOW))


@pytest.mark.parametrize("degree", ["local", "copied", "durable", "unknown"])
def test_every_degree_is_told_by_its_name(degree: str) -> None:
    assert f"({degree}" in text(markup.saved(facts(saved=[PLACE | {"degree": degree}]), NOW))


def test_no_text_of_the_users_becomes_markup() -> None:
    evil = facts(name=EVIL, resumed=EVIL, saved=[PLACE | {"place": EVIL}], store=EVIL, pending_bytes=1)
    pages = [
        markup.status(evil),
        markup.bars(evil, NOW),
        markup.saved(evil, NOW),
        markup.alert(EVIL),
        markup.small(EVIL),
        markup.log([EVIL]),
    ]
    assert not [page for page in pages if "<script" in page]
    assert all("&lt;script&gt;" in page for page in (pages[0], *pages[2:]))


def test_an_alert_without_a_text_is_nothing() -> None:
    assert markup.alert("") == ""


def test_the_log_is_a_log_to_a_screen_reader() -> None:
    assert 'role="log"' in markup.log(["one", "two"]) and "one\ntwo" in markup.log(["one", "two"])
