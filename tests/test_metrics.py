"""Metrics that keep count themselves are right over a ragged last batch, and begin empty each time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Noisy, assert_same_bits, bits, build, session
from test_validation import measured, task
from torch import Tensor, nn

import nbtrain
from nbtrain.errors import TaskError


class F1:
    """The F1 of class 1, which is no mean of the batches' F1."""

    def __init__(self) -> None:
        self.counts, self.log = [0, 0, 0], []

    def reset(self) -> None:
        self.counts = [0, 0, 0]
        self.log.append("reset")

    def update(self, output: Tensor, target: Tensor) -> None:
        found, wanted = output.argmax(1) == 1, target == 1
        more = [int((found & wanted).sum()), int((found & ~wanted).sum()), int((~found & wanted).sum())]
        self.counts = [a + b for a, b in zip(self.counts, more, strict=True)]
        self.log.append("update")

    def compute(self) -> Any:
        hit, false, missed = self.counts
        return torch.tensor(2 * hit / max(2 * hit + false + missed, 1), dtype=torch.float64)


def f1_of(whole: nbtrain.Task) -> float:
    """Return the F1 of all validation data at once."""
    x, y = whole.valid.tensors
    metric = F1()
    whole.model.eval()
    with torch.no_grad():
        metric.update(whole.model(x), y)
    return float(metric.compute())


def test_an_object_counts_over_all_batches_and_begins_empty() -> None:
    metric = F1()
    whole = task(metrics={"f1": metric, "share": lambda output, target: output.argmax(1) == target})
    metric.counts = [9, 9, 9]
    expected = f1_of(whole)
    for _ in range(2):
        found = measured(whole)
        assert found is not None
        assert found["f1"] == expected and type(found["f1"]) is float
        assert found.keys() == {"valid_loss", "f1", "share"}
    assert metric.log == ["reset", "update", "update", "update", "reset"] * 2


def test_one_that_was_cut_is_emptied_too() -> None:
    metric = F1()
    whole = task(metrics={"f1": metric})
    answers: Iterator[bool] = iter([True, False])
    assert measured(whole, lambda: next(answers)) is None
    assert metric.log == ["reset", "update", "reset"]


class Several(F1):
    def compute(self) -> Any:
        return {"f1": super().compute(), "hits": self.counts[0]}


class PerClass(F1):
    def compute(self) -> Any:
        return torch.ones(3)


def test_a_collection_gives_each_by_its_name() -> None:
    whole = task(metrics={"all": Several()})
    expected = f1_of(whole)
    found = measured(whole)
    assert found is not None and found["all_f1"] == expected and found["all_hits"] >= 0


def test_what_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(TaskError, match=r"'f1' computes a value of shape \(3,\). Let it be one number"):
        measured(task(metrics={"f1": PerClass()}))


def counting() -> nbtrain.Task:
    made = build()
    made.metrics = {"f1": F1()}
    return made


def test_a_session_is_judged_by_one_and_resumes_exactly(tmp_path: Path) -> None:
    whole = session(tmp_path / "whole", build=counting, metric="f1").run()
    run = session(tmp_path / "cut", build=counting, metric="f1")
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 4:
            run.stop()
    again = nbtrain.resume("tiny", counting, store=tmp_path / "cut").run()
    assert_same_bits(bits(again), bits(whole))
    assert [v for v in again.history["f1"] if v is not None] == [
        v for v in whole.history["f1"] if v is not None
    ]


def test_half_an_output_is_read_as_float32(tmp_path: Path) -> None:
    seen = []

    def metric(output: Tensor, target: Tensor) -> float:
        seen.append(output.dtype)
        return float(output.numpy().mean())  # which knows no bfloat16

    run = session(tmp_path, precision="bf16")
    run.task.metrics = {"mean": metric}
    run.run()
    assert set(seen) == {torch.float32}


def test_those_of_torchmetrics_do_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")

    def real() -> nbtrain.Task:
        import torchmetrics

        classes: dict[str, Any] = {"task": "multiclass", "num_classes": 3}
        made = build()
        accuracy = torchmetrics.Accuracy(**classes)
        f1 = torchmetrics.F1Score(**classes, average="macro")
        many = torchmetrics.MetricCollection(
            {"top": accuracy.clone(), "auroc": torchmetrics.AUROC(**classes)}
        )
        made.metrics = {
            "accuracy": accuracy,
            "f1": f1,
            "many": many,
            "plain": lambda output, target: output.argmax(1) == target,
        }
        return made

    run = session(tmp_path, build=real, metric="f1").run()
    rows = run.history.epochs
    for row in rows:
        assert row["accuracy"] == pytest.approx(row["plain"], abs=1e-7)
        assert row["accuracy"] == row["many_top"]
        assert 0 <= row["many_auroc"] <= 1
    best = run._loop.keeping.saver.best()
    assert best is not None
    assert best.facts["score"] == max(row["f1"] for row in rows)
    assert isinstance(run.task.train, Noisy) and isinstance(run.best(), nn.Module)
