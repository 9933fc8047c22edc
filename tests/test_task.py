"""A task that cannot be trained is refused in the first second, with the field and a way out."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import Noisy, assert_same_bits, bits, session
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
        (
            {"metrics": {"f1": max}, "step": max},
            r'a step= keeps to itself. Return them from step by name: \{"loss": ..., "f1": ...\}',
        ),
        (
            {"loss": nn.CrossEntropyLoss},
            r"Task\(loss=\) is a class. Give one of it: CrossEntropyLoss\(\)",
        ),
        (
            {"train": "data/train"},
            r"Task\(train=\) is a path, 'data/train'. Give a data set that reads",
        ),
        ({"valid": Path("data")}, r"Task\(valid=\) is a path, 'data'. Give a data set.*ImageFolder"),
        (
            {"model": nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))},
            r"The model's '1.weight' has no shape yet.*Run one batch through the model in build",
        ),
        (
            {"model": nn.Linear(2, 3, dtype=torch.complex128)},
            r"The model's 'weight' is complex128, which a checkpoint cannot hold.*Make it complex64",
        ),
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


def test_an_optimizer_that_wants_a_closure_is_refused() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(TaskError, match=r"a torch.optim.lbfgs.LBFGS, wants a closure.*AdamW"):
        task(model=model, optimizer=torch.optim.LBFGS(model.parameters())).check()


class Margin(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output @ self.weight.T, target)


class Kept:
    """A part that is no module."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return {"all": {"of them": list(self.tensors)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.tensors, state["all"]["of them"], strict=True):
            mine.data.copy_(saved)


def test_a_parameter_that_is_trained_and_would_not_be_saved_is_refused() -> None:
    model, loss, scale = nn.Linear(2, 2), Margin(), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters(), scale], lr=0.1)
    fields: dict[str, Any] = {"model": model, "optimizer": optimizer, "loss": loss}
    words = r"a parameter of shape \({}\) that neither.*not saved. Put it into the model, or"
    with pytest.raises(TaskError, match=words.format("3, 2")):
        task(**fields).check()
    with pytest.raises(TaskError, match=words.format("1,")):
        task(**fields, parts={"margin": loss, "other": nn.Linear(2, 3)}).check()
    task(**fields, parts={"margin": loss, "scale": Kept(scale)}).check()


def test_a_complex_model_that_can_be_saved_will_do() -> None:
    task(model=nn.Linear(2, 3, dtype=torch.complex64)).check()


def test_a_loss_that_learns_is_a_part_and_resumes_exactly(tmp_path: Path) -> None:
    def build() -> nbtrain.Task:
        model, loss = nn.Linear(6, 2), Margin()
        optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=0.05)
        parts = {"margin": loss}
        return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), loss=loss, parts=parts)

    whole = session(tmp_path / "whole", build=build)
    whole.run()
    cut = session(tmp_path / "cut", build=build)
    for count, (x, y) in enumerate(cut):
        cut.update(cut.task.loss(cut.task.model(x), y))
        if count == 10:
            cut.stop()
    again = session(tmp_path / "cut", build=build)
    assert 0 < again.step < whole.step
    again.run()
    assert_same_bits(bits(again), bits(whole))


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


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda out: (out.numel(), out.sum()), "count that has a gradient, as a loss or an output has"),
        (lambda out: (out.sum(), out), "count that has a gradient"),
        (lambda out: (out.sum(), out.detach()), r"is no number, but a torch.Tensor of shape \(4, 3\)"),
        (lambda out: (out.sum(), "4"), "is no number, but a builtins.str"),
        (lambda out: (out.sum(), None), r"step returned \(loss, None\)"),
        (lambda out: (out.sum(), -2.0), "is -2, and must be 0 or above"),
        (lambda out: (out.sum(), torch.tensor(math.nan)), "is nan, and must be 0 or above"),
        (lambda out: {"loss": out.sum(), "count": out.sum()}, "count that has a gradient"),
        (lambda out: (out.sum(), out, 4), "step returned a tuple of 3 as its loss"),
        (lambda out: (3.0, 4), "step returned builtins.float as its loss"),
        (lambda out: None, "step returned None as its loss"),
        (lambda out: {"loss": 3.0}, "step returned builtins.float as its loss"),
    ],
)
def test_what_step_must_not_return_is_refused_with_what_it_may(gives: Any, message: str) -> None:
    own = task(step=lambda model, batch: gives(model(batch)))
    with pytest.raises(TaskError, match=message + r".* It may return the mean loss.*, in this order"):
        own.run(torch.ones(4, 2))


def test_a_loss_without_a_gradient_is_told_why() -> None:
    own = task(step=lambda model, batch: model(batch).mean())
    detached = task(model=own.model, step=lambda model, batch: model(batch).detach().mean())
    with pytest.raises(TaskError, match=r"The loss has no gradient. Let it be of the model's output"):
        detached.run(torch.ones(4, 2))
    with torch.no_grad():
        detached.run(torch.ones(4, 2))
    own.model.requires_grad_(False)
    frozen = r"because all parameters are frozen: weight, bias. Unfreeze"
    with pytest.raises(TaskError, match=frozen):
        own.run(torch.ones(4, 2))


def test_a_frozen_model_is_told_in_a_loop_of_ones_own_too(tmp_path: Path) -> None:
    run = session(tmp_path)
    for x, y in run:
        run.task.model.requires_grad_(False)
        loss = nn.functional.cross_entropy(run.task.model(x), y)
        with pytest.raises(TaskError, match=r"frozen: 0.weight, 0.bias, 1.weight and 3 more. Unfr"):
            run.update(loss)
        break
