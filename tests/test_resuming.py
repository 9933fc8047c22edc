"""One line in a fresh kernel rebuilds a session from its recipe and goes on to the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, bits, build, cut_and_die, in_fresh_process, session

import nbtrain


def one_line(folder: Path, result: Path) -> None:
    """Go on with nothing but the store."""
    run = nbtrain.resume("tiny", store=folder, trust_code=True, bar=False).run()
    torch.save(bits(run), result)


def test_a_process_without_the_code_ends_in_the_same_bits(tmp_path: Path) -> None:
    folder, result = tmp_path / "cut", tmp_path / "bits.pt"
    assert in_fresh_process(cut_and_die, folder, 5, num_workers=2) == -signal.SIGKILL
    assert in_fresh_process(one_line, folder, result) == 0
    assert_same_bits(torch.load(result), bits(session(tmp_path / "whole").run()))


def test_a_session_rebuilt_from_its_recipe_keeps_that_very_recipe(tmp_path: Path) -> None:
    session(tmp_path, epochs=2).run()
    first = nbtrain.resume("tiny", store=tmp_path, trust_code=True, bar=False, epochs=3).run()
    second = nbtrain.resume("tiny", store=tmp_path, trust_code=True, bar=False)
    assert first.status()["recipe"] == second.status()["recipe"]
    assert "def build" in (sorted(tmp_path.glob("tiny/*/recipe.py"))[-1]).read_text()


def test_the_settings_are_those_it_had_but_for_what_is_said(tmp_path: Path) -> None:
    session(tmp_path, budget="3h", accumulate=2).run()
    again = nbtrain.resume("tiny", build, store=tmp_path, budget="4h", num_workers=0, bar=False)
    settings = again.journal.settings
    assert (settings["accumulate"], settings["batch_size"], settings["epochs"]) == (2, 3, 2)
    assert again.budget.limit_s == 4 * 3600


def test_the_only_session_needs_no_name(tmp_path: Path) -> None:
    session(tmp_path).run()
    assert nbtrain.resume(build=build, store=tmp_path, bar=False).name == "tiny"


def test_without_trust_what_was_found_is_shown_and_nothing_is_run(tmp_path: Path) -> None:
    run = session(tmp_path).run()
    with pytest.raises(nbtrain.TrustError) as caught:
        nbtrain.resume("tiny", store=tmp_path)
    said = str(caught.value)
    assert "step 6" in said
    assert "stage 1" in said
    assert "class Noisy" in said
    assert run.status()["recipe"].split()[-1] in said
    assert f"nbtrain.resume('tiny', store='{tmp_path}', trust_code=True).run()" in said


def test_what_nobody_changed_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session(tmp_path).run()
    nbtrain.resume("tiny", build, store=tmp_path, bar=True)
    assert " stays" not in capsys.readouterr().out
