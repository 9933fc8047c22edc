"""What a step logs by name: right over ragged windows and epochs, and the same after a resume."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    Noisy,
    assert_exact_wherever_cut,
    assert_same_bits,
    build,
    die,
    in_fresh_process,
    session,
)
from torch import nn

import nbtrain
from nbtrain.bar import number
from nbtrain.errors import TaskError
from nbtrain.history import History


def given(kind: str) -> nbtrain.Task:
    """A task whose step tells a mean of the targets and, now and then, something else."""

    def step(model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y = batch
        found = {"loss": nn.functional.cross_entropy(model(x), y), "mean": y.double().mean()}
        if 0 in y:
            found["rare"] = 2.0
        if kind == "means":
            return found
        count = int(y.sum()) + 1
        return {name: value * count for name, value in found.items()} | {"count": count}

    task = build()
    task.step = step
    return task


def means() -> nbtrain.Task:
    return given("means")


def sums() -> nbtrain.Task:
    return given("sums")


BUILDS = {"means": means, "sums": sums}


def targets(run: nbtrain.Session, epoch: int) -> list[torch.Tensor]:
    """Return the micro-batches' targets of an epoch."""
    order = [int(i) for i in run._opened.order(epoch)]
    return [torch.tensor([i % 3 for i in order[at : at + 3]]) for at in range(0, 23, 3)]


@pytest.mark.parametrize("kind", BUILDS)
def test_means_over_a_window_an_epoch_and_a_validation_count_each_sample_once(
    tmp_path: Path, kind: str
) -> None:
    run = session(tmp_path, build=BUILDS[kind]).run()
    rows = list(run.history)
    for epoch in range(2):
        batches = targets(run, epoch)
        weights = [len(y) if kind == "means" else float(y.sum()) + 1 for y in batches]
        for window in range(3):
            part = slice(3 * window, 3 * window + 3)
            total = sum(
                float(y.double().mean()) * w for y, w in zip(batches[part], weights[part], strict=True)
            )
            row = rows[3 * epoch + window]
            assert row["mean"] == pytest.approx(total / sum(weights[part]), abs=1e-12)
            assert row["rare"] in (2.0, None)
        total = sum(float(y.double().mean()) * w for y, w in zip(batches, weights, strict=True))
        last = rows[3 * epoch + 2]
        assert last["train_mean"] == pytest.approx(total / sum(weights), abs=1e-12)
        assert last["train_rare"] == pytest.approx(2.0) and last["valid_rare"] == pytest.approx(2.0)
    assert rows[0]["train_mean"] is None
    whole = torch.arange(23) % 3
    if kind == "means":
        assert last["valid_mean"] == pytest.approx(float(whole.double().mean()), abs=1e-12)


@pytest.mark.parametrize("kind", BUILDS)
def test_an_epoch_has_the_mean_loss_of_all_its_windows(tmp_path: Path, kind: str) -> None:
    run = session(tmp_path, build=BUILDS[kind]).run()
    rows, out = list(run.history), "\n".join(run.lines)
    for epoch in range(2):
        of_epoch = rows[3 * epoch : 3 * epoch + 3]
        batches = targets(run, epoch)
        weights = [len(y) if kind == "means" else float(y.sum()) + 1 for y in batches]
        sizes = [sum(weights[at : at + 3]) for at in (0, 3, 6)]
        total = sum(row["loss"] * size for row, size in zip(of_epoch, sizes, strict=True))
        mean = of_epoch[-1]["train_loss"]
        assert mean == pytest.approx(total / sum(sizes), abs=1e-12)
        assert f"epoch {epoch + 1}: loss {number(mean)}, " in out
        assert mean != of_epoch[-1]["loss"] and of_epoch[0]["train_loss"] is None
    assert "train_loss" not in out


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_a_mean_loss_is_the_same_where_the_epoch_was_cut_in_its_middle(
    tmp_path: Path, kind: Any
) -> None:
    def trained(folder: str, micro_steps: int) -> nbtrain.Session:
        run = session(tmp_path / folder)
        for count, batch in enumerate(run):
            loss, _, _ = run.task.run(batch)
            run.update(loss, n=kind(len(batch[1])))
            if count == micro_steps:
                run.stop()
        return run

    whole = trained("whole", 100)
    assert 0 < trained("cut", 4).progress < 1
    again = trained("cut", 100)
    assert again.history["train_loss"] == whole.history["train_loss"]
    assert again.history["train_loss"][2] is not None


@pytest.mark.parametrize("kind", BUILDS)
def test_they_are_the_same_however_the_run_was_cut(tmp_path: Path, kind: str) -> None:
    assert_exact_wherever_cut(tmp_path, (4, 7, 12), build=BUILDS[kind])


def test_a_name_that_is_taken_or_a_value_that_is_no_number_is_refused(tmp_path: Path) -> None:
    run = session(tmp_path)
    loss, _, _ = run.task.run(next(iter(run)))
    for named, words in (
        ({"step": 1.0}, "'step' cannot be logged: the history has it"),
        ({"kl": [1.0]}, "'kl' is a builtins.list. Give a number"),
        ({"kl": torch.ones(2)}, "'kl' is a torch.Tensor. Give a number, or a tensor of one"),
    ):
        with pytest.raises(TaskError, match=words):
            run.update(loss, **named)
    task = build()
    for found, words in (
        ({"kl": 1.0}, 'step returned a dict without "loss": kl. Give'),
        ({}, 'step returned a dict without "loss": an empty one'),
        ({"loss": loss, "n": 3}, "'n' cannot be logged"),
    ):
        task.step = lambda model, batch, found=found: found
        with pytest.raises(TaskError, match=words):
            task.run(None)


def test_a_column_that_comes_later_is_empty_before() -> None:
    found = History()
    row = {"stage": 1, "epoch": 0, "progress": 0.1, "loss": 1.0, "lr": 0.1, "seconds": 0.0}
    found.add(step=1, **row)
    before = found.arrays()
    found.add(step=2, **row, kl=0.5)
    found.add(step=3, **row)
    assert found["kl"] == [None, 0.5, None]
    assert "kl" not in before and len(found.arrays()["kl"]) == 3
    again = History()
    again.load_state_dict(found.state_dict())
    assert list(again) == list(found)
    assert math.isnan(again.arrays()["kl"][0]) and again.last == {"step": 3, **row}


def own_loop(folder: Path, result: Path | None, micro_step: int = -1) -> None:
    """A GAN of two optimizers: the session's is the generator's, the critic and its own are parts."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    run = nbtrain.Session(
        "gan",
        model=generator,
        optimizer=torch.optim.Adam(generator.parameters(), lr=0.01),
        parts={"critic": critic, "critic_optimizer": critic_optimizer},
        train=Noisy(),
        batch_size=3,
        accumulate=2,
        epochs=2,
        num_workers=0,
        store=folder,
        device="cpu",
        bar=False,
    )
    real = nn.functional.binary_cross_entropy_with_logits
    for count, (x, _) in enumerate(run):
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        fake = generator(torch.randn(len(x), 4))
        critic_loss = real(critic(x), ones) + real(critic(fake.detach()), zeros)
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        if count == micro_step:
            run.save()
            die()
        run.update(real(critic(fake), ones), critic=critic_loss)
    found = {f"generator.{n}": v for n, v in generator.state_dict().items()}
    found |= {f"critic.{n}": v for n, v in critic.state_dict().items()}
    for index, state in critic_optimizer.state_dict()["state"].items():
        found |= {f"critic_optimizer.{index}.{n}": v for n, v in state.items()}
    for name in ("loss", "critic"):
        found[name] = torch.tensor(run.history[name], dtype=torch.float64)
    assert run.history.epochs[0]["train_critic"] > 0
    if result is not None:
        torch.save(found, result)


def test_two_optimizers_in_a_loop_of_ones_own_resume_exactly(tmp_path: Path) -> None:
    expected = tmp_path / "whole.pt"
    assert in_fresh_process(own_loop, tmp_path / "whole", expected) == 0
    for micro_step in (3, 6, 11):  # in the middle of a window, after the critic's own step
        folder, result = tmp_path / f"cut-{micro_step}", tmp_path / f"{micro_step}.pt"
        assert in_fresh_process(own_loop, folder, None, micro_step) == -signal.SIGKILL
        assert in_fresh_process(own_loop, folder, result) == 0
        assert_same_bits(torch.load(result), torch.load(expected))
