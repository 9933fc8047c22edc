"""Which is the best, when a validation comes, and when a run has stopped getting better."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits, bits, build, die, finish, in_fresh_process, session

import nbtrain
from nbtrain import checkpoint, judging
from nbtrain.errors import TaskError
from nbtrain.judging import Judging
from nbtrain.stores import FolderStore


def judged(**arguments: Any) -> Judging:
    return Judging.of(arguments)


def rows(*values: float | None, metric: str = "valid_loss") -> list[dict[str, Any]]:
    return [{"step": i, metric: v} if v is not None else {"step": i} for i, v in enumerate(values)]


def test_patience_counts_validations_without_a_better_one() -> None:
    two = judged(patience=2)
    assert not two.is_over(rows(3.0, 2.0, 2.0))
    assert two.is_over(rows(3.0, 2.0, 2.0, 2.1)), "an equal one is no better"
    assert not two.is_over(rows(3.0, 2.0, 2.0, None, 1.9)), "a row without one counts for nothing"
    assert two.is_over(rows(1.0, float("nan"), float("inf")))
    assert not judged(patience=None).is_over(rows(*[1.0] * 99))
    assert judged(patience=1, metric="accuracy").is_over(rows(0.5, 0.4, metric="accuracy"))
    assert not judged(patience=1, metric="accuracy").is_over(rows(0.5, 0.6, metric="accuracy"))
    assert judged(patience=1, metric="f1", direction="min").is_over(rows(0.5, 0.6, metric="f1"))


def test_a_validation_is_due_by_epochs_or_by_steps() -> None:
    assert [judged().is_due_at_end(5, n, 3) for n in (1, 2, 3)] == [True] * 3
    two = judged(validate_every="2 epochs")
    assert [two.is_due_at_end(5, n, 5) for n in range(1, 6)] == [False, True, False, True, True]
    steps = judged(validate_every="4 steps")
    assert [steps.is_due(n, []) for n in range(9)] == [False] * 4 + [True] + [False] * 3 + [True]
    assert not steps.is_due(4, [{"step": 4}]), "it was there already"
    assert [steps.is_due_at_end(n, 1, 2) for n in (4, 5)] == [True, False]
    assert not any(judged(validate_every=None).is_due_at_end(4, n, 2) for n in (1, 2))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "metric": ({"metric": 3}, "metric=3 must be a name"),
    "direction": ({"direction": "up"}, "direction='up' must be 'max', 'min'"),
    "patience": ({"patience": 0}, "patience=0 must be a whole number"),
    "every": ({"validate_every": "0.5 epochs"}, "validate_every='0.5 epochs' cannot be read"),
    "never": ({"validate_every": "0 steps"}, "validate_every='0 steps' cannot be read"),
    "number": ({"validate_every": 3}, "validate_every=3 cannot be read"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_values_are_refused(tmp_path: Path, what: str) -> None:
    given, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        session(tmp_path, **given)


def agreeing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.argmax(1) == target


def measured() -> nbtrain.Task:
    task = build()
    task.metrics = {"accuracy": agreeing}
    return task


def unjudged() -> nbtrain.Task:
    task = build()
    task.valid = None
    return task


def scores(folder: Path) -> dict[int, tuple[str, str, float]]:
    """Return the scores of all that is stored, by step."""
    found = checkpoint.find([FolderStore(folder)], "tiny")
    told = {m.facts["step"]: judging.score(m.facts) for m in found}
    return {step: score for step, score in told.items() if score is not None}


def test_the_best_is_by_the_named_metric_and_its_direction(tmp_path: Path) -> None:
    values = iter([0.2, 0.9, 0.5, 0.9, 0.1, 0.3])
    run = session(tmp_path, epochs=6, metric="score", build=unjudged, keep=2)
    kept = {}
    for epoch in run.epochs():
        for batch in epoch:
            run.update(run.task.run(batch)[0])
        value = next(values)
        run.log(score=value)
        kept[run.step] = {n: p.clone() for n, p in run.task.model.state_dict().items()}
    assert scores(tmp_path)[6] == ("score", "max", 0.9), "the earliest of equals"
    assert scores(tmp_path).keys() == {6, 18}, "the best is kept besides the newest"
    assert all(torch.equal(kept[6][n], p) for n, p in run.best().state_dict().items())
    again = nbtrain.resume("tiny", unjudged, store=tmp_path)
    assert again._live.judging.metric == "score"
    assert all(torch.equal(kept[6][n], p) for n, p in again.best().state_dict().items())


def test_a_metric_that_no_validation_gives_is_refused_by_name(tmp_path: Path) -> None:
    run = session(tmp_path, build=measured, metric="f1")
    with pytest.raises(TaskError, match=r"metric='f1' is not among .* valid_loss, accuracy. Name one"):
        run.run()
    assert (run.step, run.state) == (0, "ready"), "before any training"
    run = session(tmp_path, build=measured, metric="accuracy").run()
    assert run.is_done and scores(tmp_path)[3][:2] == ("accuracy", "max")


def test_another_metric_does_not_compete_with_the_one_before(tmp_path: Path) -> None:
    session(tmp_path, build=measured, epochs=2).run()
    run = session(tmp_path, build=measured, epochs=3, metric="accuracy")
    run.run()
    best = run._loop.keeping.saver.best()
    assert best is not None and best.facts["metric"] == "accuracy" and best.facts["step"] == 9


STOPPING: dict[str, Any] = {
    "validate_every": "2 steps",
    "patience": 1,
    "epochs": 9,
    "decay": "constant",
}


def worse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that cannot get better in a validation, and trains as another does."""
    loss = torch.nn.functional.cross_entropy(output, target)
    return loss if torch.is_grad_enabled() else loss * 0 + 1.0


def stuck() -> nbtrain.Task:
    task = build()
    task.loss = worse
    return task


def ends_early(folder: Path, result: Path | None, micro_step: int, **changes: Any) -> None:
    run = session(folder, build=stuck, **(STOPPING | changes))
    for count, batch in enumerate(run):
        loss, n, _ = run.task.run(batch)
        if count == micro_step:
            run.save()
            die()
        run.update(loss, n=n)
    assert (run.state, run.reason) == ("done", "early")
    assert result is not None
    torch.save(bits(run), result)


def test_a_run_that_ends_early_says_so_and_goes_on_with_more_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = session(tmp_path, build=stuck, bar=True, **STOPPING).run()
    assert (run.state, run.reason, run.step, run.is_done) == ("done", "early", 4, True)
    assert repr(run).startswith("<session 'tiny': done (early)")
    out = capsys.readouterr().out
    assert "done early at epoch 1.39, step 4" in out
    assert "valid_loss has not got better in a validation. For more, raise patience." in out
    assert run.status()["reason"] == "early"
    run.run()
    assert (run.state, run.reason, run.step) == ("done", "early", 4)
    again = nbtrain.resume("tiny", stuck, store=tmp_path)
    assert again.is_done
    more = nbtrain.resume("tiny", stuck, store=tmp_path, patience=3).run()
    assert (more.reason, more.step) == ("early", 8)


def test_an_early_end_names_the_metric_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def blank() -> nbtrain.Task:
        task = build()
        task.metrics = {"f1": lambda output, target: output.mean() * math.nan}
        return task

    session(tmp_path, build=blank, bar=True, metric="f1", **(STOPPING | {"patience": 2})).run()
    out = capsys.readouterr().out
    assert "f1 has not got better in 2 validations, 2 of them not finite" in out


def test_an_early_end_comes_at_the_same_step_however_it_was_cut(tmp_path: Path) -> None:
    expected = tmp_path / "whole.pt"
    assert in_fresh_process(ends_early, tmp_path / "whole", expected, -1, patience=2) == 0
    for micro_step in (4, 7, 10, 13):
        folder, result = tmp_path / f"cut-{micro_step}", tmp_path / f"{micro_step}.pt"
        died = in_fresh_process(ends_early, folder, None, micro_step, patience=2)
        assert died == -signal.SIGKILL
        assert in_fresh_process(ends_early, folder, result, -1, patience=2) == 0
        assert_same_bits(torch.load(result), torch.load(expected))


def test_an_end_of_epoch_may_be_the_early_end(tmp_path: Path) -> None:
    run = session(tmp_path, build=stuck, patience=1, epochs=9).run()
    assert (run.state, run.reason, run.epoch) == ("done", "early", 2)


@pytest.mark.parametrize("every", ["2 steps", "2 epochs", None])
def test_validating_at_other_times_changes_nothing_of_the_training(
    tmp_path: Path, every: str | None
) -> None:
    plain, other = (
        session(tmp_path / name, epochs=3, validate_every=value).run()
        for name, value in (("plain", "1 epoch"), ("other", every))
    )
    for name, value in plain.task.model.state_dict().items():
        assert torch.equal(value, other.task.model.state_dict()[name])
    seen = [row["step"] for row in other.history.epochs if "valid_loss" in row]
    assert (
        seen
        == {"2 steps": [2, 4, 6, 8, 9], "2 epochs": [6, 9], None: []}[str(every) if every else None]
    )
    assert [row["step"] for row in other.history.epochs if row["step"] % 3 == 0] == [3, 6, 9]


def test_a_validation_inside_an_epoch_that_is_cut_comes_again(tmp_path: Path) -> None:
    run = session(tmp_path / "cut", validate_every="2 steps")
    calls = iter([False, False, True])

    def stop_in_the_third_batch(model: torch.nn.Module, _: object) -> None:
        if not model.training and next(calls, False):
            run.stop()

    run.task.model.register_forward_pre_hook(stop_in_the_third_batch)
    run.run()
    assert (run.reason, run.step, run.history.epochs) == ("stop", 2, [])
    result, whole = tmp_path / "cut.pt", tmp_path / "whole.pt"
    for folder, path in ((tmp_path / "cut", result), (tmp_path / "whole", whole)):
        assert in_fresh_process(finish, folder, path, validate_every="2 steps") == 0
    assert_same_bits(torch.load(result), torch.load(whole))
