"""An average of the weights: updated after each step, validated, the best, exact under resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Noisy, assert_exact_wherever_cut, build, session
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nbtrain
from nbtrain import task
from nbtrain.errors import CheckpointError, TaskError


def torchs() -> nbtrain.Task:
    task = build()
    task.ema = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    return task


def timms() -> nbtrain.Task:
    task = build()
    task.ema = ModelEmaV3(task.model, decay=0.9, use_warmup=True)
    return task


def rounded() -> nbtrain.Task:
    """An average in bf16, which timm rounds at random."""
    task = build()
    task.ema = ModelEmaV3(task.model, decay=0.9, dtype=torch.bfloat16)
    task.valid = None
    return task


BUILDS: dict[str, Callable[[], nbtrain.Task]] = {"torch": torchs, "timm": timms, "bf16": rounded}


@pytest.mark.parametrize("name", BUILDS)
def test_an_average_cut_anywhere_ends_in_the_same_bits(tmp_path: Path, name: str) -> None:
    expected = assert_exact_wherever_cut(tmp_path, (4, 8, 13), build=BUILDS[name])
    assert any(key.startswith("ema/module.") for key in expected)


def test_the_average_is_what_it_would_be_by_hand(tmp_path: Path) -> None:
    run = session(tmp_path, build=torchs)
    twin = torchs().ema
    for batch in run:
        before = run.step
        loss, n, _ = run.task.run(batch)
        run.update(loss, n=n)
        if run.step > before:
            twin.update_parameters(run.task.model)
    for one, other in zip(twin.parameters(), run.task.ema.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [torchs, timms])
def test_it_is_what_is_validated_and_best(
    tmp_path: Path, make: Callable[[], nbtrain.Task], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bool] = []
    run = session(tmp_path, build=make, bar=True)
    run.task.ema.module.register_forward_hook(lambda *_: seen.append(True))
    run.run()
    assert len(seen) == 16, "two validations of eight batches"
    assert "valid_loss" in capsys.readouterr().out.split("(of the EMA)")[0]
    best = run.best()
    assert type(best) is type(run.task.model) and not best.training
    rows = run.history.epochs
    if rows[-1]["valid_loss"] == min(row["valid_loss"] for row in rows):
        for one, other in zip(best.parameters(), run.task.ema.module.parameters(), strict=True):
            assert torch.equal(one, other)
    different = [
        not torch.equal(a, b)
        for a, b in zip(best.parameters(), run.task.model.parameters(), strict=True)
    ]
    assert any(different)


def test_a_rehearsal_leaves_the_average_as_it_was(tmp_path: Path) -> None:
    run = session(tmp_path, build=torchs)
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 2:
            run.stop()
    before = {name: value.clone() for name, value in run.task.ema.state_dict().items()}
    from nbtrain.rehearsal import _seen_here

    told = _seen_here(run._opened, run._loop, trains=True)
    assert any(name.startswith("ema/") for name in told["trained"])
    assert all(torch.equal(before[n], v) for n, v in run.task.ema.state_dict().items())


def members(low: float = 0.1) -> nbtrain.Task:
    return torchs()


def test_members_of_a_population_have_theirs(tmp_path: Path) -> None:
    population = nbtrain.Population(
        "herd",
        members,
        members=2,
        interval=1,
        epochs=2,
        quantile=0.5,
        space={"low": [0.1, 0.2]},
        batch_size=3,
        num_workers=0,
        store=tmp_path,
        bar=False,
        device="cpu",
    ).run()
    row = population.best_row
    assert row is not None
    found = population._rounds.storing.state(row)
    for name, value in population.best().state_dict().items():
        assert torch.equal(value, found.tensors[f"ema/module.{name}"])
    told = population.test(Noisy())
    assert told["test_loss"] > 0


def another() -> nbtrain.Task:
    task = build()
    task.ema = AveragedModel(nn.Linear(6, 3))
    return task


def same() -> nbtrain.Task:
    task = build()
    task.ema = nn.Module()
    task.ema.module, task.ema.update = task.model, print
    return task


def apart() -> nbtrain.Task:
    task = build()
    task.ema = ModelEmaV3(task.model, device="cpu")
    return task


def no_average() -> nbtrain.Task:
    task = build()
    task.ema = 0.999
    return task


def test_what_is_no_average_of_this_model_is_refused() -> None:
    for make in (another, same):
        with pytest.raises(TaskError, match=r"Task\(ema=\) averages another model. Make it from this"):
            task.call(make)
    with pytest.raises(TaskError, match=r"was made with device='cpu', and is validated where the"):
        task.call(apart)
    with pytest.raises(
        TaskError, match=r"Task\(ema=\) is a builtins.float. Give torch.optim.swa_utils"
    ):
        task.call(no_average)


def test_an_average_on_one_side_only_is_refused(tmp_path: Path) -> None:
    session(tmp_path, build=torchs).save()
    with pytest.raises(
        CheckpointError, match=r"EMA(.|\n)*in checkpoint: an EMA(.|\n)*session: *no EMA"
    ):
        session(tmp_path)
