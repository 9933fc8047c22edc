"""Every sample counts once, and training is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nbtrain
from nbtrain.data import Loader, Order, source
from nbtrain.errors import TaskError
from nbtrain.forward import Forward
from nbtrain.validation import validate

NUM_SAMPLES, BATCH = 11, 4  # batches of 4, 4, 3
CPU = torch.device("cpu")


def task(**fields: Any) -> nbtrain.Task:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double()
    data = TensorDataset(torch.randn(NUM_SAMPLES, 3).double(), torch.randint(2, (NUM_SAMPLES,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return nbtrain.Task(
        **({"model": model, "optimizer": optimizer, "train": data, "valid": data} | fields)
    )


def measured(
    task: nbtrain.Task, proceed: Callable[[], bool] = lambda: True, loader: Loader | None = None
) -> dict[str, float] | None:
    return validate(task, loader or made(task), BATCH, seed=0, forward=Forward(CPU), proceed=proceed)


def made(task: nbtrain.Task, workers: int = 0) -> Loader:
    found = source(task.valid, "valid", shuffle=False, collate=None)
    return Loader(found, (0, "valid"), Order(found, 0), BATCH, workers)


def correct(output: Tensor, target: Tensor) -> Tensor:
    return output.argmax(1) == target


def test_a_ragged_last_batch_counts_by_its_samples() -> None:
    whole = task(
        metrics={
            "per_sample": correct,
            "mean": lambda output, target: correct(output, target).double().mean(),
            "number": lambda output, target: float(correct(output, target).double().mean()),
            "of_numpy": lambda output, target: np.float64(correct(output, target).double().mean()),
            "float32": lambda output, target: np.float32(0.25),
        }
    )
    x, y = whole.valid.tensors
    whole.model.eval()
    with torch.no_grad():
        output = whole.model(x)
        loss = float(nn.functional.cross_entropy(output, y))
        share = float(correct(output, y).double().mean())
    found = measured(whole)
    assert found is not None
    assert found.pop("valid_loss") == pytest.approx(loss, abs=1e-14)
    assert found.pop("float32") == 0.25
    assert found == pytest.approx(dict.fromkeys(found, share), abs=1e-15)
    assert len(found) == 4
    assert all(type(value) is float for value in found.values())


def test_a_step_that_counts_tokens_is_averaged_over_tokens() -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return (x[:, 0] * (y + 1)).sum(), (y + 1).sum()

    whole = task(step=step, metrics={"never": correct})
    total, num_tokens = step(whole.model, whole.valid.tensors)
    assert measured(whole) == {"valid_loss": pytest.approx(float(total / num_tokens), abs=1e-14)}


@pytest.mark.parametrize("kind", ["sums", "named", "numbers"])
def test_a_batch_of_which_nothing_is_counted_weighs_nothing(kind: str) -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        x, y = batch
        kept = y > y.max() if y.min() == 0 else y >= 0  # of some batches none
        total, count = x[kept, 0].sum(), kept.sum()
        if kind == "sums":
            return total, count
        if kind == "named":
            return {"loss": total, "count": count, "kl": 2.0 * total}
        return {"loss": total, "count": int(count), "kl": 2.0 * float(total)}

    whole = task(step=step)
    total, count = 0.0, 0
    for at in range(0, len(whole.valid), BATCH):
        batch = whole.valid[at : at + BATCH]
        if batch[1].min() > 0:
            total, count = total + float(batch[0][:, 0].sum()), count + len(batch[1])
    assert 0 < count < len(whole.valid)
    found = measured(whole)
    assert found["valid_loss"] == pytest.approx(total / count, abs=1e-6)
    assert found.get("valid_kl", 2 * total / count) == pytest.approx(2 * total / count, abs=1e-6)


def test_every_module_goes_back_into_its_own_mode() -> None:
    whole = task()
    whole.model.train()
    whole.model[1].eval()  # a frozen BatchNorm
    inside: list[bool] = []
    whole.model.register_forward_hook(
        lambda model, args, output: inside.extend(m.training for m in model.modules())
    )
    measured(whole)
    assert inside and not any(inside)
    assert [m.training for m in whole.model.modules()] == [True, True, False, True, True]


@pytest.mark.parametrize("proceed", [True, False])
def test_modes_are_restored_also_where_it_was_cut_or_failed(proceed: bool) -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    whole = task(loss=fails)
    whole.model.train()
    if proceed:
        with pytest.raises(ZeroDivisionError):
            measured(whole)
    else:
        assert measured(whole, lambda: False) is None
    assert all(m.training for m in whole.model.modules())
    assert torch.is_grad_enabled()


def test_training_is_left_as_it_was() -> None:
    whole = task()
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    measured(whole)
    assert all(torch.equal(before[name], value) for name, value in whole.model.state_dict().items())
    assert all(p.grad is None for p in whole.model.parameters())


def test_a_cut_gives_none_and_the_next_time_begins_at_the_beginning() -> None:
    whole = task()
    loader = made(whole)
    expected = measured(whole)
    for batches in range(3):
        answers: Iterator[bool] = iter([True] * batches + [False])
        assert measured(whole, lambda answers=answers: next(answers), loader) is None
        assert measured(whole, loader=loader) == expected
    assert measured(whole, loader=loader) == expected


class Random(nn.Module):
    """Draws in eval mode too, as a sampling decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.rand(len(x), 2) * self.scale


def test_a_model_that_draws_is_measured_the_same_again() -> None:
    model = Random()
    whole = task(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda model, args, output: outputs.append(output.clone()))
    one = measured(whole)
    torch.rand(5)
    with closing(made(whole, workers=1)) as loader:  # which leaves this process's generators alone
        assert measured(whole, loader=loader) == one
    assert all(torch.equal(a, b) for a, b in zip(outputs[:3], outputs[3:], strict=True))
    assert not torch.equal(outputs[0], outputs[1]), "each batch has a key of its own"


@pytest.mark.parametrize("value", ["0.5", None, [0.5]])
def test_a_metric_that_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(
        TaskError, match=f"The metric 'odd' gave a {type(value).__name__}. Let it return"
    ):
        measured(task(metrics={"odd": lambda output, target: value}))
