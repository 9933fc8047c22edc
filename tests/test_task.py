"""A task that cannot be trained is refused in the first second, with the field and a way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nbtrain
from nbtrain.errors import TaskError
from nbtrain.task import call


def task(**fields: Any) -> nbtrain.Task:
    model = fields.setdefault("model", nn.Linear(2, 3))
    if "optimizer" not in fields:
        fields["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    return nbtrain.Task(**({"train": [0]} | fields))


def stranger() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": None, "optimizer": stranger()},
            r"Task\(model=\) is a None. Give a torch.nn.Module",
        ),
        (
            {"model": nn.Linear, "optimizer": stranger()},
            r"Task\(model=\) is a builtins.type. Give a torch.nn",
        ),
        ({"optimizer": torch.optim.SGD}, r"Task\(optimizer=\) is a .*Give a torch.optim.Optimizer"),
        ({"optimizer": stranger()}, r"holds none of the model's parameters.*SGD\(model.parameters\(\)"),
        ({"train": None}, r"Task\(train=\) is None. Give a data set or a DataLoader"),
        ({"parts": [stranger()]}, r"Task\(parts=\) is a builtins.list. Give a dict of names and parts"),
        ({"metrics": max}, r"Task\(metrics=\) is a .*. Give a dict of names and functions"),
        ({"parts": {"ema": 3}}, r"The part 'ema', a builtins.int, has no state_dict.*leave it out"),
        (
            {"parts": {"half": SimpleNamespace(state_dict=dict)}},
            "has no state_dict and load_state_dict",
        ),
        ({"loss": "ce"}, r"Task\(loss=\) is a builtins.str. Give a function"),
        ({"loss": None}, r"Task\(loss=\) is a None. Give a function"),
        ({"step": 3}, r"Task\(step=\) is a builtins.int. Give a function"),
        ({"collate": [1]}, r"Task\(collate=\) is a builtins.list. Give a function"),
        (
            {"metrics": {"f1": 3}},
            r"The metric 'f1' is a builtins.int. Give a function of \(output, tar",
        ),
        (
            {"metrics": {"f1": SimpleNamespace(update=print, reset=print)}},
            r"'f1' is a types.SimpleNamespace.*with update, compute, reset",
        ),
        ({"metrics": {"f1": Path}}, r"The metric 'f1' is a class. Give one of it: Path\(\)"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_should_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match="(?s)" + message):
        task(**fields).check()


def test_a_right_task_is_given_back_as_it_is() -> None:
    whole = task(parts={"other": nn.Linear(1, 1)}, metrics={"zero": lambda output, target: 0.0})
    assert whole.check() is whole


def test_an_optimizer_over_some_of_the_parameters_will_do() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    task(model=model, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1)).check()


def test_build_is_called_once_and_its_task_checked() -> None:
    calls = []

    def build(lr: float = 0.1, *rest: Any, **more: Any) -> nbtrain.Task:
        calls.append(lr)
        return task()

    assert isinstance(call(build), nbtrain.Task)
    assert calls == [0.1]
    with pytest.raises(TaskError, match="train"):
        call(lambda: task(train=None))


def test_a_build_with_a_required_argument_is_refused_before_it_is_called() -> None:
    def build(path: str, lr: float = 0.1, *, folds: int) -> nbtrain.Task:
        raise AssertionError

    with pytest.raises(
        TaskError, match="build needs path, folds, but a fresh kernel has nothing to give"
    ):
        call(build)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "kind"), [(None, "None"), ((1, 2), "builtins.tuple"), (nn.ReLU(), "activation.ReLU")]
)
def test_a_build_that_gives_something_else_is_told_what_to_give(given: Any, kind: str) -> None:
    with pytest.raises(
        TaskError, match=rf"build returned a .*{kind}. Let it return nbtrain.Task\(model="
    ):
        call(lambda: given)


def test_a_plain_micro_step_is_the_loss_of_the_models_output() -> None:
    plain = task(loss=nn.functional.mse_loss)
    x, y = torch.ones(4, 2), torch.zeros(4, 3)
    loss, n, output = plain.run((x, y))
    assert torch.equal(output, plain.model(x))
    assert torch.equal(loss, nn.functional.mse_loss(output, y))
    assert n is None


def test_a_step_of_ones_own_gives_the_mean_loss_of_any_batch() -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"]).mean()

    own = task(step=step)
    batch = {"x": torch.ones(4, 2)}
    loss, n, output = own.run(batch)
    assert torch.equal(loss, own.model(batch["x"]).mean())
    assert n is None
    assert output is None


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_a_step_may_give_a_sum_and_what_it_counts(count: Any) -> None:
    own = task(step=lambda model, batch: (model(batch).sum(), count))
    batch = torch.ones(4, 2)
    loss, n, _ = own.run(batch)
    assert torch.equal(loss, own.model(batch).sum() / 7)
    assert n == 7.0 and type(n) is float
