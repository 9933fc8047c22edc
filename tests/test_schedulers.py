"""Torch's schedulers, stepped by the session: torch's own rates, and after any cut the same."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    Noisy,
    assert_same_bits,
    bits,
    build,
    finish,
    in_fresh_process,
    run_and_die,
    session,
)
from torch import nn
from torch.optim import lr_scheduler as torchs
from torch.utils.data import DataLoader

import nbtrain
from nbtrain.errors import CheckpointError, NbtrainWarning, TaskError

# A table of lambdas is no recipe; `lambdas`, below, is one.
pytestmark = pytest.mark.filterwarnings("ignore:A fresh kernel could not rebuild")

EPOCHS, STEPS = 3, 9  # three windows an epoch
# Of an epoch's 17 places 8 are micro-steps, one is its end, and 8 are in its validation.
CUTS = (1, 3, 8, 12, 17 + 2, 17 + 8, 17 + 13, 34 + 7)


def warmed_up(optimizer: torch.optim.Optimizer) -> torchs.LRScheduler:
    rise = torchs.LinearLR(optimizer, 0.1, total_iters=3)
    fall = torchs.CosineAnnealingLR(optimizer, T_max=6)
    return torchs.SequentialLR(optimizer, [rise, fall], milestones=[3])


def chained(optimizer: torch.optim.Optimizer) -> torchs.LRScheduler:
    one = torchs.ConstantLR(optimizer, 0.5, total_iters=4)
    return torchs.ChainedScheduler([one, torchs.ExponentialLR(optimizer, 0.8)])


KINDS: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "StepLR, each step": (lambda o: torchs.StepLR(o, 2, 0.5), "step"),
    "StepLR, each epoch": (lambda o: torchs.StepLR(o, 1, 0.5), "epoch"),
    "MultiStepLR": (lambda o: torchs.MultiStepLR(o, [2, 5, 5], 0.3), "step"),
    "ConstantLR": (lambda o: torchs.ConstantLR(o, 0.25, total_iters=4), "step"),
    "ExponentialLR": (lambda o: torchs.ExponentialLR(o, 0.7), "epoch"),
    "PolynomialLR": (lambda o: torchs.PolynomialLR(o, total_iters=8, power=2), "step"),
    "CosineAnnealingLR": (lambda o: torchs.CosineAnnealingLR(o, T_max=7, eta_min=1e-4), "step"),
    "restarts": (lambda o: torchs.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2), "step"),
    "OneCycleLR": (lambda o: torchs.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1), None),
    "CyclicLR": (lambda o: torchs.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="triangular2"), None),
    "LambdaLR": (lambda o: torchs.LambdaLR(o, lambda n: 1 / (1 + n)), "step"),
    "MultiplicativeLR": (lambda o: torchs.MultiplicativeLR(o, lambda n: 0.9), "step"),
    "SequentialLR": (warmed_up, "step"),
    "ChainedScheduler": (chained, "step"),
    "ReduceLROnPlateau": (
        lambda o: torchs.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.9),
        None,
    ),
}


def building(kind: str) -> Callable[[], nbtrain.Task]:
    make, per = KINDS[kind]

    def made() -> nbtrain.Task:
        task = build()
        momentum: Any = {"momentum": 0.9} if kind == "CyclicLR" else {}
        if momentum:
            task.optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05, **momentum)
        scheduler = make(task.optimizer)
        fields = {name: getattr(task, name) for name in ("model", "optimizer", "train", "valid")}
        return nbtrain.Task(**fields, scheduler=scheduler, scheduler_per=per)

    return made


def opened(folder: Path, kind: str, **changes: Any) -> nbtrain.Session:
    arguments: dict[str, Any] = {"epochs": EPOCHS, "warmup_epochs": 0, "decay": "constant"}
    arguments |= {"build": building(kind)} if kind else {}
    return session(folder, **(arguments | changes))


def plain(tree: Any) -> Any:
    """Return a state as what can be compared."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def all_of(run: nbtrain.Session) -> Any:
    """Return what is no tensor: the optimizer's groups, and the scheduler's state."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in run.task.optimizer.param_groups]
    return plain([groups, run.task.scheduler.state_dict()])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_anywhere_has_the_rates_and_bits_of_one_that_was_not(
    tmp_path: Path, kind: str
) -> None:
    expected = opened(tmp_path / "whole", kind).run()
    rates = expected.history["lr"]
    assert len(set(rates)) > 1
    cuts, places = list[Path](), itertools.count()
    run = opened(tmp_path / "cut", kind)

    def cut() -> None:  # as a kill just after a save
        if next(places) in CUTS:
            run.save()
            cuts.append(tmp_path / f"cut-{len(cuts)}")
            shutil.copytree(tmp_path / "cut", cuts[-1])

    run.task.metrics = {"cut": lambda output, target: cut() or 0.0}  # and in validations
    for epoch in run.epochs():
        for batch in epoch:
            cut()  # inside windows, and before the first one
            run.update(run.task.run(batch)[0])
        cut()  # at the epoch's end
    assert next(places) == EPOCHS * (8 + 1 + 8)
    assert len(cuts) == len(CUTS)
    for folder in cuts:
        resumed = opened(folder, kind)
        resumed.run()
        found = bits(resumed)
        found.pop("history.cut", None)  # of the metric that only cuts
        assert_same_bits(found, bits(expected))
        assert all_of(resumed) == all_of(expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ReduceLROnPlateau"])
def test_the_rates_are_those_of_a_plain_loop_with_torchs_scheduler(tmp_path: Path, kind: str) -> None:
    run = opened(tmp_path, kind).run()
    task = building(kind)()
    per = task.scheduler_per or "step"
    expected = []
    for step in range(1, STEPS + 1):
        expected.append(task.optimizer.param_groups[0]["lr"])
        task.optimizer.step()
        if per == "step" or step % 3 == 0:
            task.scheduler.step()
    assert [row["lr"] for row in run.history] == expected


def test_a_plateau_of_torchs_hears_of_each_validation(tmp_path: Path) -> None:
    run = opened(tmp_path, "ReduceLROnPlateau").run()
    told = torchs.ReduceLROnPlateau(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.05), patience=0)
    told.factor, told.threshold = 0.5, 0.9
    for row in run.history.epochs:
        told.step(row["valid_loss"])
    assert run.task.scheduler.best == told.best
    assert run.lr == told.get_last_lr()[0] < 0.05


@pytest.mark.parametrize("kind", ["OneCycleLR", "SequentialLR", "LambdaLR"])
def test_it_survives_a_kill_and_a_fresh_process(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"epochs": EPOCHS, "warmup_epochs": 0, "decay": "constant"}
    for number, calls in enumerate((3, 20)):
        folder, result = tmp_path / f"cut-{number}", tmp_path / f"{number}.pt"
        dies = in_fresh_process(kill, folder, calls, kind, **changes)
        assert dies == -signal.SIGKILL
        assert in_fresh_process(complete, folder, result, kind, **changes) == 0
        assert_same_bits(torch.load(result), bits(opened(tmp_path / f"whole-{number}", kind).run()))


def lambdas() -> nbtrain.Task:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torchs.LambdaLR(optimizer, lambda step: 0.9**step)
    return nbtrain.Task(
        model=model, optimizer=optimizer, train=Noisy(), scheduler=scheduler, scheduler_per="step"
    )


@pytest.mark.filterwarnings("error")
def test_a_lambda_comes_back_with_the_recipe(tmp_path: Path) -> None:
    run = opened(tmp_path, "", build=lambdas)
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 4:
            break
    resumed = nbtrain.resume("tiny", store=tmp_path, trust_code=True)
    assert resumed.step == 4
    rates = resumed.run().history["lr"]
    assert rates == pytest.approx([0.1 * 0.9**step for step in range(STEPS)], rel=1e-12)
    assert rates == opened(tmp_path / "whole", "", build=lambdas).run().history["lr"]


def kill(folder: Path, calls: int, kind: str, **changes: Any) -> None:
    run_and_die(folder, calls, build=building(kind), **changes)


def complete(folder: Path, result: Path, kind: str, **changes: Any) -> None:
    finish(folder, result, build=building(kind), **changes)


def test_a_resume_warns_of_nothing_that_the_scheduler_itself_has_written(tmp_path: Path) -> None:
    """Warnings are errors here: OneCycleLR moves the betas, and has not stepped in this process."""
    run = opened(tmp_path, "OneCycleLR")
    for _ in run:
        run.update(run.task.run(_)[0])
        if run.step == 2:
            break
    assert opened(tmp_path, "OneCycleLR").step == 2


def test_another_class_is_refused_and_another_option_told(tmp_path: Path) -> None:
    opened(tmp_path, "StepLR, each step", epochs=1).run()
    with pytest.raises(CheckpointError, match="scheduler is of another class") as caught:
        opened(tmp_path, "PolynomialLR", epochs=1)
    assert "StepLR" in str(caught.value)
    assert "PolynomialLR" in str(caught.value)

    def other() -> nbtrain.Task:
        task = building("StepLR, each step")()
        task.scheduler.step_size = 7
        return task

    with pytest.warns(NbtrainWarning, match="step_size of the StepLR is the checkpoint's"):
        run = opened(tmp_path, "", build=other, epochs=1)
    assert run.task.scheduler.step_size == 2


def test_one_of_another_optimizer_is_no_second_schedule(tmp_path: Path) -> None:
    def with_critic() -> nbtrain.Task:
        task, critic = build(), torch.nn.Linear(6, 1)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        task.parts = {"critic": critic, "critic_optimizer": optimizer, "critic_scheduler": scheduler}
        return task

    run = session(tmp_path, build=with_critic)
    rates = []
    for batch in run:
        run.task.parts["critic_optimizer"].step()
        run.task.parts["critic_scheduler"].step()
        loss, n, _ = run.task.run(batch)
        run.update(loss, n=n)
        rates.append(run.task.parts["critic_optimizer"].param_groups[0]["lr"])
    assert len(set(rates)) > 1 and len(set(run.history["lr"])) > 1


def test_the_session_writes_no_rates_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two schedules"):
        opened(tmp_path, "LambdaLR", warmup_epochs=1)
    run = opened(tmp_path, "LambdaLR")
    with pytest.raises(ValueError, match="lr cannot be set: the rates are those of the LambdaLR"):
        run.set(lr=0.1)
    run.set(accumulate=2)
    run.run()
    assert run.lr == 0.05 / (1 + run.step)


def test_a_run_whose_rates_the_session_wrote_takes_no_scheduler(tmp_path: Path) -> None:
    session(tmp_path, epochs=1, decay="constant").run()
    with pytest.raises(CheckpointError, match="scheduler is of another class"):
        opened(tmp_path, "LambdaLR", epochs=1)


def test_a_rate_changed_in_build_is_told_and_stays_the_schedulers(tmp_path: Path) -> None:
    opened(tmp_path, "LambdaLR", epochs=1).run()

    def other() -> nbtrain.Task:
        task = build()
        task.optimizer.param_groups[0]["lr"] = 0.5
        scheduler = torchs.LambdaLR(task.optimizer, lambda n: 1 / (1 + n))
        fields = {name: getattr(task, name) for name in ("model", "optimizer", "train", "valid")}
        return nbtrain.Task(**fields, scheduler=scheduler, scheduler_per="step")

    with pytest.warns(NbtrainWarning, match="base_lrs of the LambdaLR"):
        run = opened(tmp_path, "", build=other, epochs=1)
    assert run.lr == 0.05 / 4


def some(train: Any = None, **fields: Any) -> nbtrain.Task:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {name: f(optimizer) if callable(f) else f for name, f in fields.items()}
    return nbtrain.Task(model=model, optimizer=optimizer, train=train or Noisy(), **given)


STEPWISE = KINDS["StepLR, each step"][0]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"scheduler": STEPWISE}, r'scheduler_per="step"\) or Task\(scheduler_per="epoch"'),
    ({"scheduler": STEPWISE, "scheduler_per": "batch"}, "Use one of: step, epoch"),
    ({"scheduler": 0.1}, "is a builtins.float, none of torch.optim.lr_scheduler"),
    ({"scheduler_per": "step"}, "is a builtins.NoneType"),
    ({"scheduler": lambda o: STEPWISE(some().optimizer), "scheduler_per": "step"}, "another optimizer"),
    ({"scheduler": KINDS["ReduceLROnPlateau"][0], "scheduler_per": "step"}, "needs a validation"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_what_cannot_be_stepped_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        some(**fields).check()


def test_its_name_among_the_parts_is_taken() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = STEPWISE(optimizer)
    parts = {"scheduler": nn.Linear(1, 1)}
    fields: dict[str, Any] = {"model": model, "optimizer": optimizer, "train": Noisy(), "parts": parts}
    with pytest.raises(TaskError, match="Rename the part"):
        nbtrain.Task(**fields, scheduler=scheduler, scheduler_per="step").check()


def test_a_plateau_without_its_metric_is_told_at_the_first_validation(tmp_path: Path) -> None:
    run = opened(tmp_path, "ReduceLROnPlateau", metric="accuracy", direction="min")
    with pytest.raises(TaskError, match="metric='accuracy' is not among what the validation gives"):
        run.run()
    assert opened(tmp_path, "ReduceLROnPlateau", metric="valid_loss").run().is_done


def one_cycle(length: int) -> Callable[[], nbtrain.Task]:
    def made() -> nbtrain.Task:
        return some(scheduler=lambda o: torchs.OneCycleLR(o, 0.1, total_steps=length))

    return made


def dropping() -> nbtrain.Task:
    train = DataLoader(Noisy(), batch_size=4, drop_last=True)
    return some(train, scheduler=lambda o: torchs.OneCycleLR(o, 0.1, total_steps=9))


def test_one_of_the_runs_length_lasts_to_its_end(tmp_path: Path) -> None:
    assert opened(tmp_path, "", build=one_cycle(STEPS)).run().is_done
    run = opened(tmp_path / "drops", "", build=dropping, batch_size=4, accumulate=2)
    assert run.run().step == EPOCHS * 3 == run.task.scheduler.total_steps  # of 8, 8 and 4 samples


def test_one_that_the_run_outlasts_is_refused_before_the_first_step(tmp_path: Path) -> None:
    words = rf"OneCycleLR has total_steps={STEPS - 1}, and the run steps it {STEPS} times.*onecycle"
    with pytest.raises(TaskError, match=words):
        opened(tmp_path, "", build=one_cycle(STEPS - 1))
    assert not list(tmp_path.iterdir())
    with pytest.warns(NbtrainWarning, match=f"total_steps={3 * STEPS}, and .* {STEPS} times only"):
        opened(tmp_path, "", build=one_cycle(3 * STEPS))


def test_one_cannot_be_lengthened_on_resume(tmp_path: Path) -> None:
    run = opened(tmp_path, "", build=one_cycle(STEPS))
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 4:
            break
    with (
        pytest.warns(NbtrainWarning, match="total_steps of the OneCycleLR is the checkpoint's"),
        pytest.raises(TaskError, match=rf"total_steps={STEPS}, .* {STEPS + 3} times.*a new name"),
    ):
        opened(tmp_path, "", build=one_cycle(STEPS + 3), epochs=EPOCHS + 1)
    assert opened(tmp_path, "", build=one_cycle(STEPS)).run().step == STEPS


def test_a_plateau_whose_mode_is_not_the_direction_is_refused(tmp_path: Path) -> None:
    build = building("ReduceLROnPlateau")  # whose mode is "min"
    words = r"mode='min', and the session's metric='accuracy' has direction='max'.*mode='max'"
    with pytest.raises(TaskError, match=words):
        opened(tmp_path, "", build=build, metric="accuracy")
    assert opened(tmp_path, "", build=build, metric="accuracy", direction="min").step == 0
