"""Lines are kept by any thread, and printed on the main one; warnings point at the user's own line."""

from __future__ import annotations

import threading

import pytest

from nbtrain.errors import NbtrainWarning
from nbtrain.lines import MAX_LINES, Lines


def elsewhere(lines: Lines) -> None:
    def work() -> None:
        lines.say("said")
        lines.warn("warned")
        lines.flush()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_another_thread_prints_nothing_and_the_main_one_prints_it_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = Lines(shown=True)
    elsewhere(lines)
    assert capsys.readouterr().out == ""
    assert lines.last() == ["said", "Warning: warned"]
    with pytest.warns(NbtrainWarning, match="warned") as caught:
        lines.flush()
    assert caught[0].filename == __file__
    assert capsys.readouterr().out == "said\n"
    lines.flush()
    assert capsys.readouterr().out == ""


def test_who_wants_no_lines_still_gets_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(shown=False)
    lines.say("said")
    with pytest.warns(NbtrainWarning, match="warned"):
        lines.warn("warned")
    assert capsys.readouterr().out == ""
    assert lines.last(1) == ["Warning: warned"]


def test_what_a_panel_shows_is_not_printed_too(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(shown=True)
    elsewhere(lines)
    with pytest.warns(NbtrainWarning, match="warned"):
        lines.flush(prints=False)
    lines.flush()
    assert capsys.readouterr().out == ""


def test_the_newest_lines_are_kept() -> None:
    lines = Lines(shown=False)
    for number in range(MAX_LINES + 3):
        lines.say(str(number))
    assert lines.last()[0] == "3"
    assert lines.last(2) == [str(MAX_LINES + 1), str(MAX_LINES + 2)]
