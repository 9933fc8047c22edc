"""Which rows remain depends on the number of steps alone, and every epoch's end is among them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from nbtrain import history, trees
from nbtrain.history import COLUMNS, History

STEPS_AN_EPOCH = 10


def row(step: int) -> dict[str, Any]:
    return {
        "stage": 1 + step // 17,
        "epoch": (step - 1) // STEPS_AN_EPOCH,
        "step": step,
        "progress": step / STEPS_AN_EPOCH,
        "loss": 1 / step,
        "lr": 0.1 / 3 * step,
        "seconds": step * 0.7,
    }


def run(to: int, known: History | None = None, since: int = 0) -> History:
    found = known or History()
    for step in range(since + 1, to + 1):
        found.add(**row(step))
        if step % STEPS_AN_EPOCH == 0:
            found.close_epoch(row(step) | {"valid_loss": 2 / step, "accuracy": step / 1000})
    return found


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(history, "MAX_ROWS", 16)
    return 16


def through_json(found: History) -> History:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(trees.flatten(found.state_dict(), "history", tensors), allow_nan=False)
    copy = History()
    copy.load_state_dict(trees.restore(json.loads(text), tensors))
    return copy


def test_each_step_has_a_row_and_an_epochs_end_has_its_validation_too() -> None:
    found = list(run(20))
    assert [r["step"] for r in found] == list(range(1, 21))
    assert found[9] == row(10) | {"valid_loss": 0.2, "accuracy": 0.01}
    assert found[8] == row(9) | {"valid_loss": None, "accuracy": None}
    assert all(type(r[name]) is int for r in found for name in ("stage", "epoch", "step"))
    assert list(found[0]) == [*COLUMNS[:-1], "valid_loss", "accuracy", "seconds"]


def test_a_column_is_a_list_with_none_where_there_is_no_value() -> None:
    found = run(11)
    assert found["loss"] == [1 / step for step in range(1, 12)]
    assert found["valid_loss"] == [*[None] * 9, 0.2, None]


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(KeyError, match=r"'acc' is not a column. There are: stage, epoch, step"):
        run(3)["acc"]


@pytest.mark.usefixtures("few_rows")
def test_which_rows_remain_depends_on_the_number_of_steps_alone() -> None:
    for cut in range(0, 101, 7):
        resumed = run(100, through_json(run(cut)), since=cut)
        assert list(resumed) == list(run(100))
        assert resumed["step"] == [step for step in range(1, 101) if not step % 8 or not step % 10]


def test_a_thinned_history_keeps_every_second_step_and_never_more_than_its_rows(few_rows: int) -> None:
    for to in range(1, 200):
        steps = list(run(to)._columns["step"])
        stride = steps[0]
        assert len(steps) <= few_rows
        assert steps == [step for step in range(1, to + 1) if step % stride == 0]
        assert len(steps) >= few_rows // 2 or stride == 1


@pytest.mark.usefixtures("few_rows")
def test_epoch_ends_are_all_kept_and_stand_in_order() -> None:
    found = run(200)
    steps = found["step"]
    assert steps == sorted(set(steps))
    assert [r["step"] for r in found if r["valid_loss"] is not None] == list(range(10, 201, 10))
    assert len(found) == len(list(found)) == len(steps)


def test_pandas_reads_the_whole_table() -> None:
    found = run(23)
    for frame in (pandas.DataFrame(found), found.frame()):
        assert list(frame["step"]) == list(range(1, 24))
        assert list(frame["loss"]) == found["loss"]
        assert list(frame["valid_loss"].dropna()) == [0.2, 0.1]


def test_an_empty_history_is_empty_in_every_way() -> None:
    found = History()
    assert list(found) == found["loss"] == []
    assert len(found) == len(found.frame()) == 0
    assert found.last is None
    assert list(through_json(found)) == []


def test_what_is_restored_is_what_was_kept_to_the_bit() -> None:
    found = run(37)
    found.close_epoch(row(38) | {"valid_loss": float("inf"), "odd": 0.1 + 0.2})
    copy = through_json(found)
    assert list(copy) == list(found)
    assert copy.last == found.last
    assert repr(copy) == repr(found) == "<history of 37 steps and 4 epochs>"


def test_the_state_holds_what_was_when_it_was_taken() -> None:
    found = run(5)
    state = found.state_dict()
    run(20, found, since=5)
    copy = History()
    copy.load_state_dict(state)
    assert list(copy) == list(run(5))


def test_a_reader_in_another_thread_sees_whole_rows_only() -> None:
    found = run(3)
    seen: list[Any] = []

    class Reading:
        """Stands for a switch to a reading thread in the middle of the adding of a row."""

        def __float__(self) -> float:
            seen.append((list(found), found["lr"]))
            return 0.5

    found.add(**(row(4) | {"loss": Reading()}))
    assert seen
    assert all(one == (list(run(3)), run(3)["lr"]) for one in seen)
    assert found["loss"][-1] == 0.5


def test_arrays_are_the_columns_of_the_steps() -> None:
    found = run(23)
    arrays = found.arrays()
    assert list(arrays) == list(COLUMNS)
    assert all(column.dtype == np.float64 and column.shape == (23,) for column in arrays.values())
    assert {name: column.tolist() for name, column in arrays.items()} == {
        name: [row(step)[name] for step in range(1, 24)] for name in COLUMNS
    }
    assert all(column.shape == (0,) for column in History().arrays().values())


@pytest.mark.usefixtures("few_rows")
def test_arrays_stay_as_they_are_and_rows_may_be_added_while_they_are_held() -> None:
    found = run(3)
    held = found.arrays()
    run(40, found, since=3)
    assert held["step"].tolist() == [1, 2, 3]
    assert found.arrays()["step"].tolist() == list(found._columns["step"])


def test_arrays_asked_for_in_the_middle_of_a_row_hold_whole_rows_only() -> None:
    found = run(3)
    seen: list[list[int]] = []

    class Reading:
        """Stands for a switch to a reading thread in the middle of the adding of a row."""

        def __float__(self) -> float:
            seen.append([len(column) for column in found.arrays().values()])
            return 0.5

    found.add(**(row(4) | {"loss": Reading()}))
    assert seen
    assert all(lengths == [3] * len(COLUMNS) for lengths in seen)
