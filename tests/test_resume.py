"""A resumed run is the run: cut anywhere, gone on with in a fresh process, to the same bits."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from runs import (
    EPOCHS,
    MICRO_STEPS,
    NUM_SAMPLES,
    Noisy,
    assert_same_bits,
    bits,
    build,
    cut_and_die,
    die,
    finished,
    in_fresh_process,
    run_and_die,
    session,
)
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import nbtrain
from nbtrain import randomness
from nbtrain.errors import CheckpointError, NbtrainWarning

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no workers": ({}, {}),
    "one worker, then none": ({"num_workers": 1}, {}),
    "none, then two workers": ({}, {"num_workers": 2}),
    "four workers, then one": ({"num_workers": 4}, {"num_workers": 1}),
}


def dropping_last() -> nbtrain.Task:
    task = build()
    task.train = DataLoader(Noisy(), batch_size=3, shuffle=True, drop_last=True)
    return task


def far_ahead() -> nbtrain.Task:
    task = build()
    task.train = DataLoader(
        Noisy(), batch_size=3, shuffle=True, num_workers=2, prefetch_factor=5, persistent_workers=True
    )
    return task


def weighted() -> nbtrain.Task:
    task = build()
    sampler = WeightedRandomSampler(torch.arange(23).float() + 1, 23)
    task.train = DataLoader(Noisy(), batch_size=3, sampler=sampler)
    return task


def stepwise() -> nbtrain.Task:
    """A schedule of torch's own, that the user steps, as a part."""
    task = build()
    task.parts = {"schedule": torch.optim.lr_scheduler.StepLR(task.optimizer, 2, 0.5)}
    return task


def falling() -> nbtrain.Task:
    """A decay of one's own, which is a closure."""
    task, strength = build(), 0.3
    task.schedule = lambda progress: 1 / (1 + strength * progress**2)
    return task


def layered() -> nbtrain.Task:
    """Rates that fall from the last layer to the first, as timm makes them."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32, drop_rate=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.01, weight_decay=0.1, layer_decay=0.5)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Pictures(), valid=Pictures())


class Pictures(Dataset[Any]):
    """Random pictures."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3, 32, 32) + index / NUM_SAMPLES, index % 3


BUILDS = {"drop_last": dropping_last, "far ahead": far_ahead, "weighted": weighted}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_cut_at_any_micro_step_ends_in_the_same_bits(tmp_path: Path, way: str) -> None:
    before, after = WAYS[way]
    expected = finished(tmp_path / "whole")
    for micro_step in range(MICRO_STEPS + 1):
        folder = tmp_path / f"cut-{micro_step}"
        died = in_fresh_process(cut_and_die, folder, micro_step, **before)
        assert died == -signal.SIGKILL
        assert_same_bits(finished(folder, **after), expected)


@pytest.mark.parametrize("name", BUILDS)
def test_a_loader_that_is_taken_over_resumes_exactly(tmp_path: Path, name: str) -> None:
    expected = finished(tmp_path / "whole", build=BUILDS[name])
    for micro_step in (0, 4, 7, 8, 11):
        folder = tmp_path / f"cut-{micro_step}"
        died = in_fresh_process(cut_and_die, folder, micro_step, build=BUILDS[name])
        assert died == -signal.SIGKILL
        assert_same_bits(finished(folder, build=BUILDS[name], num_workers=0), expected)


def test_run_killed_in_any_call_of_the_loss_validation_too_ends_in_the_same_bits(
    tmp_path: Path,
) -> None:
    expected = finished(tmp_path / "whole")
    for calls in range(2 * MICRO_STEPS):  # a validation has as many batches as the training
        folder = tmp_path / f"cut-{calls}"
        assert in_fresh_process(run_and_die, folder, calls) == -signal.SIGKILL
        assert_same_bits(finished(folder), expected)


def test_a_resume_of_a_resume_of_a_resume_ends_in_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    for micro_step, workers in ((1, 0), (4, 2), (3, 1), (4, 0)):
        died = in_fresh_process(cut_and_die, folder, micro_step, num_workers=workers)
        assert died == -signal.SIGKILL
    run = session(folder)
    assert run.stage == 5
    assert_same_bits(finished(folder), finished(tmp_path / "whole"))


def test_what_another_cell_draws_in_between_changes_nothing(tmp_path: Path) -> None:
    run = session(tmp_path / "disturbed")
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        torch.rand(run.step + 1)
        random.seed(17)
    assert_same_bits(bits(run), finished(tmp_path / "whole"))


class Told(Dataset[Any]):
    """Samples that say which they are, and what their augmentation drew."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


def seen(folder: Path, **changes: Any) -> list[tuple[int, float]]:
    """Return the samples of a run in their order, reopened after every third step."""
    found: list[tuple[int, float]] = []
    sizes = iter(changes.pop("sizes"))
    while True:
        batch_size, accumulate = next(sizes)
        model = nn.Linear(1, 1)
        run = nbtrain.Session(
            "told",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            train=Told(),
            store=folder,
            epochs=EPOCHS,
            batch_size=batch_size,
            accumulate=accumulate,
            bar=False,
            num_workers=0,
        )
        for indices, drawn in run:
            found += zip(indices.tolist(), drawn.tolist(), strict=True)
            run.update(model(drawn.float()[:, None]).mean())
            if run.step % 3 == 0 and not run.is_done and changes["cuts"]:
                run.stop()
        if run.is_done:
            return found


def test_batch_size_and_accumulation_may_change_between_stages(tmp_path: Path) -> None:
    expected = seen(tmp_path / "whole", sizes=[(3, 3)], cuts=False)
    cut = seen(tmp_path / "cut", sizes=[(3, 3), (5, 1), (2, 2), (4, 1), (7, 2)] * 9, cuts=True)
    assert sorted(index for index, _ in expected[:23]) == list(range(23))
    assert cut == expected


def edit_live(folder: Path, result: Path, cuts: bool) -> None:
    """Change settings by hand at three steps, cut or not."""
    edits: dict[int, dict[str, Any]] = {
        1: {"accumulate": 1, "warmup_epochs": 2},
        4: {"lr": 0.01},
        6: {"batch_size": 5, "accumulate": 2},
    }
    run = session(folder, epochs=3)
    while not run.is_done:
        made = -1
        for batch in run:
            if run.step in edits and made != run.step:
                made = run.step
            loss, _, _ = run.task.run(batch)
            run.update(loss)
            if run.step in edits:
                run.set(**edits.pop(run.step))
                if cuts:
                    run.stop()
        run = session(folder, epochs=3) if cuts else run
    torch.save(bits(run), result)


def test_a_run_with_live_edits_replays_to_the_same_bits(tmp_path: Path) -> None:
    for name, cuts in (("whole", False), ("cut", True)):
        result = tmp_path / f"{name}.pt"
        assert in_fresh_process(edit_live, tmp_path / name, result, cuts) == 0
    assert_same_bits(torch.load(tmp_path / "cut.pt"), torch.load(tmp_path / "whole.pt"))


def step_by_hand(folder: Path, result: Path, until: int) -> None:
    """Train with a schedule of torch's own; die in the body of a step's last micro-step."""
    run = session(folder, build=stepwise, warmup_epochs=0, decay="constant", save_every=1e-9)
    for batch in run:
        loss, _, _ = run.task.run(batch)
        before = run.step
        run.update(loss)
        if run.step > before:
            run.task.parts["schedule"].step()
        if run.step == until:
            die()
    torch.save(bits(run), result)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_schedule_of_torchs_own_resumes_as_a_part(tmp_path: Path) -> None:
    expected = tmp_path / "whole.pt"
    assert in_fresh_process(step_by_hand, tmp_path / "whole", expected, -1) == 0
    rates = torch.load(expected)["history.lr"]
    assert len(set(rates.tolist())) == 3
    for until in range(1, 6):
        folder, result = tmp_path / f"cut-{until}", tmp_path / f"{until}.pt"
        assert in_fresh_process(step_by_hand, folder, result, until) == -signal.SIGKILL
        assert in_fresh_process(step_by_hand, folder, result, -1) == 0
        assert_same_bits(torch.load(result), torch.load(expected))


SHAPES: dict[str, dict[str, Any]] = {
    "a function": {"build": falling, "decay": "constant", "warmup": "cosine"},
    "a plateau": {"decay": "plateau", "plateau_patience": 0, "gamma": 0.5, "direction": "max"},
    "restarts": {"decay": "restarts", "period": 0.4, "multiplier": 2, "floor": 0.01},
    "one cycle": {"decay": "onecycle", "warmup_epochs": 0, "warmup": "cosine"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_schedule_resumes_exactly(tmp_path: Path, shape: str) -> None:
    changes = {"epochs": 3, "warmup_epochs": 0.5} | SHAPES[shape]
    expected = finished(tmp_path / "whole", **changes)
    assert len(set(expected["history.lr"].tolist())) > 2
    for calls in (5, 10, 18, 26, 40):  # of the loss, of which 16 are an epoch with its validation
        folder = tmp_path / f"cut-{calls}"
        assert in_fresh_process(run_and_die, folder, calls, **changes) == -signal.SIGKILL
        assert_same_bits(finished(folder, **changes), expected)


def test_a_function_of_ones_own_is_what_the_rates_are(tmp_path: Path) -> None:
    run = session(tmp_path, build=falling, decay="constant", warmup_epochs=0).run()
    places = [row["progress"] for row in run.history]  # after each step
    starts = [0.0, *places[:-1]]
    assert run.history["lr"] == [0.05 * (1 / (1 + 0.3 * at**2)) for at in starts]
    assert run.journal.settings["decay"] == "function"


def a_table() -> nbtrain.Task:
    task = build()
    task.schedule = lambda progress: [1.0, 0.1, 0.01][int(progress)]
    return task


def test_a_function_that_ends_with_the_run_is_never_asked_beyond_it(tmp_path: Path) -> None:
    run = session(tmp_path, build=a_table, decay="constant", warmup_epochs=0, epochs=3)
    run.plot()
    run.run()
    assert run.state == "done"
    assert [row["lr"] for row in run.history.epochs] == pytest.approx([0.05, 0.005, 0.0005])
    again = session(tmp_path, build=a_table, decay="constant", warmup_epochs=0, epochs=3)
    assert again.status()["lr"] == again.lr == run.lr == pytest.approx(0.0005)


broken: list[int] = []


def breaking() -> nbtrain.Task:
    task = build()
    task.schedule = lambda progress: float("nan") if broken else 1 / (1 + progress)
    return task


def test_a_function_that_raises_costs_no_step_that_was_trained(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"build": breaking, "decay": "constant", "warmup_epochs": 0}
    expected = bits(session(tmp_path / "whole", **changes).run())
    run = session(tmp_path / "broken", **changes)
    run.task.model.register_forward_pre_hook(lambda *_: broken.append(1) if run.step == 4 else None)
    with pytest.raises(ValueError, match="decay gave nan at progress"):
        run.run()
    broken.clear()
    run.task.model._forward_pre_hooks.clear()
    assert run.step == 4
    assert_same_bits(bits(run.run()), expected)


def test_a_function_comes_back_in_one_line_with_the_recipe(tmp_path: Path) -> None:
    expected = session(tmp_path / "whole", build=falling, decay="constant").run()
    for batch in (run := session(tmp_path / "cut", build=falling, decay="constant")):
        run.update(run.task.run(batch)[0])
        if run.step == 4:
            run.stop()
    resumed = nbtrain.resume("tiny", store=tmp_path / "cut", trust_code=True).run()
    assert resumed.history["lr"] == expected.history["lr"]
    assert_same_bits(bits(resumed), bits(expected))


def test_a_function_that_build_brings_later_is_a_change_from_there_on(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"decay": "constant", "warmup_epochs": 0}
    session(tmp_path, epochs=1, **changes).run()
    run = session(tmp_path, epochs=2, build=falling, **changes).run()
    assert run.history["lr"] == [0.05] * 3 + [
        0.05 * (1 / (1 + 0.3 * at**2)) for at in (1.0, 1 + 9 / 23, 1 + 18 / 23)
    ]
    assert nbtrain.resume("tiny", store=tmp_path, trust_code=True).is_done


def test_a_function_where_no_fresh_kernel_would_find_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Let build bring it: return nbtrain.Task\(..., schedule="):
        session(tmp_path, decay=lambda progress: 1.0)
    with pytest.raises(ValueError, match="two decays: 'cosine', and the task's function"):
        session(tmp_path, build=falling)
    with pytest.raises(ValueError, match=r"Let build give it, Task\(schedule=function\)"):
        session(tmp_path, decay="function")
    session(tmp_path, build=falling, decay="constant", epochs=1).run()
    with pytest.raises(CheckpointError, match="a function, which the task brings no more"):
        session(tmp_path, decay="constant", epochs=1)


def test_a_loop_of_ones_own_brings_its_function_by_its_cells(tmp_path: Path) -> None:
    task = build()
    fields = {name: getattr(task, name) for name in ("model", "optimizer", "train")}
    given: dict[str, Any] = {"build": None, "warmup_epochs": 0, **fields}
    run = session(tmp_path, decay=lambda progress: 1 / (1 + progress), **given)
    for batch in run:
        run.update(run.task.run(batch)[0])
    assert run.history["lr"][3] == 0.05 / 2
    assert session(tmp_path, decay=lambda progress: 1 / (1 + progress), **given).is_done


def test_a_plateau_is_lowered_by_the_validations_and_said(tmp_path: Path) -> None:
    run = session(tmp_path, epochs=5, **SHAPES["a plateau"] | {"warmup_epochs": 0}).run()
    losses = run.history["valid_loss"]
    losses = [loss for loss in losses if loss is not None]
    made = [(e.progress, e.what, e.by) for e in run.journal.entries]
    best, expected = -float("inf"), []
    for epoch, loss in enumerate(losses, 1):
        if loss > best + 1e-4 * abs(best) or best == -float("inf"):
            best = loss
        else:
            expected.append((float(epoch), "factor", "plateau"))
    assert made == expected
    assert made
    assert run.lr == 0.05 * 0.5 ** len(made)
    assert any(line.startswith("plateau: factor 1 -> 0.5") for line in run.lines)


def test_layers_keep_their_shares_of_the_rate_under_every_edit_and_after_a_cut(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"build": layered, "warmup_epochs": 0.5, "decay": "cosine"}
    expected = session(tmp_path / "whole", **arguments)
    groups = expected.task.optimizer.param_groups
    shares = [group["lr_scale"] for group in groups]
    assert len(set(shares)) > 3
    assert max(shares) == 1.0
    trained: list[list[float]] = []
    expected.task.optimizer.register_step_pre_hook(
        lambda o, *_: trained.append([group["lr"] for group in o.param_groups])
    )
    expected.run()
    curve = [expected.journal.schedule(at) for at in (0.0, 9 / 23, 18 / 23, 1.0)]
    assert trained[:4] == [[0.01 * factor * share for share in shares] for factor in curve]
    for batch in (run := session(tmp_path / "cut", **arguments)):
        run.update(run.task.run(batch)[0])
        if run.step == 4:
            run.stop()
    resumed = session(tmp_path / "cut", **arguments)
    assert resumed.journal.peak_lr == 0.01
    assert_same_bits(bits(resumed.run()), bits(expected))
    resumed.journal.edit(resumed.step, resumed.progress, "hand", epochs=4, lr=0.05)
    factor = resumed.journal.schedule(2.5)
    assert resumed.journal.rates(2.5) == [0.05 * factor * share for share in shares]


def test_scales_that_nothing_applies_are_told(tmp_path: Path) -> None:
    with pytest.warns(NbtrainWarning, match="have lr_scale, as timm's layer decay makes it"):
        session(tmp_path, build=layered, warmup_epochs=0, decay="constant")


def test_training_in_another_thread_with_workers_gives_the_same_bits(tmp_path: Path) -> None:
    run = session(tmp_path / "threaded", num_workers=2)
    thread = threading.Thread(target=run.run)
    thread.start()
    thread.join(60)
    assert run.is_done
    assert_same_bits(bits(run), finished(tmp_path / "whole"))


def test_accumulation_alone_gives_the_bits_of_a_plain_loop_when_it_is_one(tmp_path: Path) -> None:
    run = session(tmp_path, accumulate=1, warmup_epochs=0, decay="constant", epochs=1)
    plain = build()
    plain.model.load_state_dict(run.task.model.state_dict())
    for step, batch in enumerate(run):
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        randomness.seed(0, "step", step, 0)
        plain.optimizer.zero_grad()
        nn.functional.cross_entropy(plain.model(batch[0]), batch[1]).backward()
        plain.optimizer.step()
    for one, other in zip(run.task.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("plan", [{}, {"warmup_epochs": 0, "decay": "constant"}])
def test_a_rate_that_the_cell_changes_for_one_group_is_a_change_from_there_on(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    def opened(*rates: float) -> nbtrain.Session:
        def grouped() -> nbtrain.Task:
            task = build()
            layers = [task.model.get_submodule(name) for name in "014"]
            groups = [{"params": m.parameters(), "lr": r} for m, r in zip(layers, rates, strict=True)]
            task.optimizer = torch.optim.SGD(groups, lr=0.1)
            return task

        return session(tmp_path, build=grouped, epochs=3, **plan)

    def shares(run: nbtrain.Session, until: int) -> list[float]:
        for batch in run:
            loss, n, _ = run.task.run(batch)
            run.update(loss, n=n)
            if run.step == until:
                break
        lrs = [group["lr"] for group in run.task.optimizer.param_groups]
        return [lr / lrs[0] for lr in lrs]

    assert shares(opened(0.1, 0.01, 0.01), 2) == pytest.approx([1, 0.1, 0.1])
    run = opened(0.1, 0.001, 0.01)
    assert "group_lrs: [0.1, 0.01, 0.01] -> [0.1, 0.001, 0.01]" in run.lines[-1]
    assert shares(run, 4) == pytest.approx([1, 0.01, 0.1])
    run = opened(0.1, 0.001, 0.01)
    assert "group_lrs" not in run.lines[-1] and run.lr == run.journal.rates(run.progress)[0]
    assert shares(run, 5) == pytest.approx([1, 0.01, 0.1])
    run = opened(0.05, 0.0005, 0.005)  # all of them by one factor
    assert shares(run, 6) == pytest.approx([1, 0.01, 0.1])
    assert [e.what for e in run.journal.entries if e.what == "group_lrs"] == ["group_lrs"]
    assert run.journal.peak_lr == 0.05
