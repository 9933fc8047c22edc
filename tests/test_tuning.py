"""A trial of Ray Tune: what it reports, and what it goes on from. Tune is played here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from herds import assert_same_bits, build
from safetensors.torch import load_file
from torch import nn
from trials import Tune, bits_of, trial

import nbtrain
from nbtrain import checkpoint
from nbtrain.errors import CheckpointError, LossError, RecipeError, SessionError, TaskError
from nbtrain.journal import Journal
from nbtrain.population import tuning
from nbtrain.stores import FolderStore

CONFIG = {"lr": 0.03, "weight_decay": 0.01, "accumulate": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tune:
    return trial(tmp_path_factory.mktemp("whole"), 3, CONFIG)


def test_a_trial_reports_each_interval_with_a_checkpoint(whole: Tune) -> None:
    assert [report["epoch"] for report in whole.reports] == [1, 2, 3]
    assert whole.reports[0].keys() >= {"valid_loss", "accuracy", "loss", "lr", "step", "progress"}
    found = bits_of(whole.folders[-1])
    assert found["journal"]["first"]["accumulate"] == 2
    assert any(name.startswith("optimizer/state") for name in found)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_restored_it_ends_in_the_bits_of_a_trial_that_was_not_cut(
    whole: Tune, tmp_path: Path, stop_after: int
) -> None:
    first = trial(tmp_path / "first", 3, CONFIG, stop_after=stop_after)
    assert len(first.reports) == stop_after
    rest = trial(tmp_path / "rest", 3, CONFIG, found=first.folders[-1])
    assert [*first.reports, *rest.reports] == whole.reports
    assert_same_bits(bits_of(rest.folders[-1]), bits_of(whole.folders[-1]))


def test_a_trial_is_no_session_but_its_weights_are_plain(whole: Tune) -> None:
    folder = whole.folders[-1]
    with pytest.raises(SessionError, match="is a trial of Ray Tune") as told:
        nbtrain.resume("trial", store=folder, trust_code=True)
    path = str(told.value).split(" of ")[-1].rstrip(".")
    assert load_file(folder / path).keys() == build().model.state_dict().keys()


def test_at_its_end_it_does_nothing_more(whole: Tune, tmp_path: Path) -> None:
    assert trial(tmp_path, 3, CONFIG, found=whole.folders[-1]).reports == []


def test_going_on_from_another_trials_checkpoint_the_new_config_acts(
    whole: Tune, tmp_path: Path
) -> None:
    config = {"lr": 0.01, "weight_decay": 0.02, "accumulate": 1}
    found = trial(tmp_path, 4, config, found=whole.folders[0], stop_after=1)
    _, state = checkpoint.load_newest(checkpoint.find([FolderStore(found.folders[0])], "trial"))
    journal = Journal.from_state_dict(state.state["journal"])
    assert journal.group_lrs == [0.01] and journal.settings["accumulate"] == 1
    assert {entry.by for entry in journal.entries} == {"explore"}
    group = state.state["trees"]["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.02
    assert found.reports[0]["step"] > whole.reports[0]["step"]
    # Its own batches, and not those of its donor: with the donor's config too it goes another way.
    other = trial(tmp_path / "other", 4, CONFIG, found=whole.folders[0], stop_after=1)
    assert other.reports[0]["valid_loss"] != whole.reports[1]["valid_loss"]


def wide(hidden: int = 4) -> nbtrain.Task:
    task = build()
    task.model.append(nn.Linear(3, hidden))
    return task


def test_what_cannot_be_trained_is_refused(whole: Tune, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'widht', which build does not take"):
        trial(tmp_path, 0, {"widht": 3})
    with pytest.raises(TaskError, match="metric='f1' is not among"):
        trial(tmp_path, 0, {}, metric="f1")
    with pytest.raises(LossError, match="loss is nan"):
        trial(tmp_path, 0, {"lr": 1e30})
    first = trial(tmp_path / "wide", 0, {"hidden": 4}, build=wide, stop_after=1)
    with pytest.raises(CheckpointError, match=r"(?s)model does not fit.*4, 3.*5, 3"):
        trial(tmp_path, 0, {"hidden": 5}, build=wide, found=first.folders[0])


def test_an_argument_without_sense_is_refused_before_anything_travels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="interval='soon'"):
        nbtrain.tune_trainable(build, interval="soon")
    with pytest.raises(ValueError, match="accumulate=0"):
        nbtrain.tune_trainable(build, accumulate=0)
    with pytest.raises(ValueError, match="precision='half'"):
        nbtrain.tune_trainable(build, precision="half")
    lock = object()
    with pytest.raises(RecipeError, match=r"A trial of Ray Tune cannot build.*\n.*`lock`"):
        nbtrain.tune_trainable(lambda_of(lock))
    monkeypatch.setitem(sys.modules, "ray.tune", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nbtrain\[ray\]'"):
        nbtrain.tune_trainable(build)


def test_a_trial_computes_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    def watched(lr: float = 0.1) -> nbtrain.Task:
        def half(model: object, args: object, output: torch.Tensor) -> None:
            assert output.dtype == torch.bfloat16

        task = build(lr)
        task.model.register_forward_hook(half)
        return task

    trial(tmp_path, 0, {"lr": 0.01}, build=watched, precision="bf16", stop_after=1)
    with pytest.raises(AssertionError):
        trial(tmp_path / "fp32", 0, {"lr": 0.01}, build=watched, stop_after=1)


def lambda_of(lock: object) -> Callable[..., nbtrain.Task]:
    def closed(lr: float = 0.1) -> nbtrain.Task:
        assert lock is not None
        return build(lr)

    return closed


def test_the_trials_are_called_by_the_name_of_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "package", lambda name: None)
    assert nbtrain.tune_trainable(build).__name__ == "build"
