"""Parameters that come and go: what is named begins afresh, all else goes on to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    Noisy,
    assert_exact_wherever_cut,
    assert_same_bits,
    bits,
    session,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nbtrain
from nbtrain import CheckpointError
from nbtrain.errors import SessionError, TaskError


class Net(nn.Module):
    def __init__(self, outputs: int = 3, head: str = "head") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU())
        self.neck = nn.Linear(8, 8)
        self.name = head
        setattr(self, head, nn.Linear(8, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head: nn.Module = getattr(self, self.name)
        return head(self.neck(self.body(x)))


def made(net: nn.Module, groups: Any = None, **fields: Any) -> nbtrain.Task:
    held = groups or [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=0.05)
    return nbtrain.Task(model=net, optimizer=optimizer, train=Noisy(), valid=Noisy(), **fields)


def small() -> nbtrain.Task:
    return made(Net())


def frozen() -> nbtrain.Task:
    net = Net()
    net.body.requires_grad_(False)
    return made(net)


def unfrozen() -> nbtrain.Task:
    return made(Net(), fresh=["body.*"])


def unfrozen_in_a_group_of_its_own() -> nbtrain.Task:
    net = Net()
    groups = [
        {"params": [*net.neck.parameters(), *net.head.parameters()]},
        {"params": net.body.parameters(), "lr": 0.001},
    ]
    return made(net, groups, fresh=["body.*"])


def wider() -> nbtrain.Task:
    return made(Net(outputs=5), fresh=["head.*"])


def renamed() -> nbtrain.Task:
    return made(Net(outputs=4, head="fc"), fresh=["head.*", "fc.*"])


def refrozen() -> nbtrain.Task:
    task = frozen()
    task.fresh = ["body.*"]
    return task


def state_of(run: nbtrain.Session) -> dict[str, dict[str, torch.Tensor]]:
    """Return the moments by the names of the parameters."""
    optimizer = run.task.optimizer
    return {
        name: {key: value.clone() for key, value in optimizer.state[p].items()}
        for name, p in run.task.model.named_parameters()
        if p in optimizer.state
    }


def weights_of(run: nbtrain.Session) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.task.model.state_dict().items()}


def one_epoch(folder: Path, build: Any) -> nbtrain.Session:
    run = session(folder, build=build)
    for batch in run:
        if run.epoch == 1:
            break
        run.update(run.task.run(batch)[0])
    return run


CASES: dict[str, tuple[Any, Any, str, dict[str, str]]] = {
    "unfrozen": (frozen, unfrozen, "body", {"moments afresh": "body.0.weight, body.0.bias"}),
    "in a group of its own": (frozen, unfrozen_in_a_group_of_its_own, "body", {"moments afresh": "bo"}),
    "wider head": (small, wider, "head", {"weights afresh": "head.weight, head.bias"}),
    "another head": (
        small,
        renamed,
        "fc",
        {"weights afresh": "fc.weight, fc.bias", "weights gone": "head.weight, head.bias"},
    ),
    "frozen again": (unfrozen, refrozen, "none", {"moments gone": "body.0.weight, body.0.bias"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_new_begins_as_built_and_all_else_goes_on_to_the_bit(tmp_path: Path, case: str) -> None:
    old, new, prefix, told = CASES[case]
    before = one_epoch(tmp_path, old)
    weights, moments = weights_of(before), state_of(before)
    run = session(tmp_path, build=new)
    built = session(tmp_path / "built", build=new)
    assert run.step == before.step
    keeps_weights = "weights afresh" not in told
    for name, value in weights_of(run).items():
        origin = weights if keeps_weights or not name.startswith(prefix) else weights_of(built)
        assert torch.equal(value, origin[name]), name
    held = {id(p) for group in run.task.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.task.model.named_parameters():
        now = run.task.optimizer.state.get(parameter, {})
        if name.startswith(prefix) or id(parameter) not in held:
            assert not now, name
        else:
            assert now.keys() == moments[name].keys()
            assert all(torch.equal(now[key], moments[name][key]) for key in now), name
    notes = {e.what: e.new for e in run.journal.entries if e.by == "cell"}
    for kind, names in told.items():
        assert notes[kind].startswith(names)
        assert any(kind in line for line in run.lines)
    run.run()
    assert run.is_done


@pytest.mark.parametrize("case", ["unfrozen", "in a group of its own", "wider head"])
def test_a_run_that_has_grown_resumes_to_the_same_bits(tmp_path: Path, case: str) -> None:
    old, new, *_ = CASES[case]
    for folder in (tmp_path / "whole", tmp_path / "cut-4"):
        one_epoch(folder, old)
    assert_exact_wherever_cut(tmp_path, [4], build=new)


@pytest.mark.parametrize("new", [wider, renamed])
def test_the_average_has_another_head_too_and_goes_on_elsewhere(tmp_path: Path, new: Any) -> None:
    def with_ema(build: Any) -> Any:
        def built() -> nbtrain.Task:
            task = build()
            task.ema = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            return task

        return built

    before = session(tmp_path, build=with_ema(small)).run().task.ema.state_dict()
    run = session(tmp_path, build=with_ema(new), epochs=3)
    now, model = run.task.ema.state_dict(), run.task.model.state_dict()
    assert now.keys() == {"n_averaged", *(f"module.{name}" for name in model)}
    for name, value in now.items():
        is_new = name.startswith(("module.head", "module.fc"))
        assert torch.equal(value, model[name.removeprefix("module.")] if is_new else before[name]), name
    run.run()
    reopened = session(tmp_path, build=with_ema(new), epochs=3).task.ema.state_dict()
    assert_same_bits(reopened, run.task.ema.state_dict())
    assert run.is_done


def test_the_best_is_one_that_the_model_fits(tmp_path: Path) -> None:
    session(tmp_path, build=small).run()
    run = session(tmp_path, build=wider, epochs=3)
    with pytest.raises(SessionError, match="no best yet"):
        run.best()
    run.run()
    assert run.best().head.weight.shape == (5, 8)
    assert session(tmp_path, build=wider, epochs=3).best().head.weight.shape == (5, 8)


def test_the_same_cell_again_changes_nothing_more(tmp_path: Path) -> None:
    one_epoch(tmp_path, small)
    grown = session(tmp_path, build=wider).run()
    again = session(tmp_path, build=wider)
    assert_same_bits(bits(again), bits(grown))
    assert [e.what for e in again.journal.entries].count("weights afresh") == 1


def test_another_groups_rate_is_the_one_that_was_built(tmp_path: Path) -> None:
    one_epoch(tmp_path, frozen)
    run = session(tmp_path, build=unfrozen_in_a_group_of_its_own)
    assert run.journal.group_lrs == [0.05, 0.001]
    rates = run.journal.rates(1.0)
    assert rates[1] == pytest.approx(rates[0] / 50)
    assert session(tmp_path, build=unfrozen_in_a_group_of_its_own).journal.group_lrs == [0.05, 0.001]


@pytest.mark.parametrize(
    ("old", "new", "fresh", "message"),
    [
        (small, wider, (), r"'head.weight', and fresh=\[...\] of.*\(3, 8\).*\(5, 8\)"),
        (small, wider, ["neck.*"], r"does not fit at 'head.weight'"),
        (small, renamed, ["fc.*"], r"does not fit at 'head.weight'.*not held"),
        (frozen, unfrozen, (), r"other numbers of parameters.*\[4\].*\[8\]"),
        (frozen, unfrozen, ["body.0.*"], r"optimizer does not fit at 'body.1.weight'.*not held.*held"),
    ],
)
def test_what_is_not_named_is_refused_and_nothing_is_changed(
    tmp_path: Path, old: Any, new: Any, fresh: Any, message: str
) -> None:
    one_epoch(tmp_path, old)

    def changed() -> nbtrain.Task:
        task = new()
        task.fresh = fresh
        return task

    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        session(tmp_path, build=changed)
    assert session(tmp_path, build=old).is_done is False


def scheduled(grown: bool) -> nbtrain.Task:
    task = unfrozen_in_a_group_of_its_own() if grown else frozen()
    task = replace(task, scheduler=LambdaLR(task.optimizer, lambda n: 0.9**n), scheduler_per="epoch")
    return task.check()


def test_a_scheduler_of_other_groups_is_refused(tmp_path: Path) -> None:
    def first() -> nbtrain.Task:
        return scheduled(False)

    def then() -> nbtrain.Task:
        return scheduled(True)

    plain: dict[str, Any] = {"warmup_epochs": 0, "decay": "constant"}
    session(tmp_path, build=first, epochs=1, **plain).run()
    with pytest.raises(CheckpointError, match=r"(?s)made for another number of groups.*1.*2"):
        session(tmp_path, build=then, epochs=2, **plain)
    assert session(tmp_path, build=first, epochs=2, **plain).run().is_done


def test_names_are_a_list() -> None:
    with pytest.raises(TaskError, match=r"fresh=\) is 'head.*Give a list of names"):
        made(Net(), fresh="head.*").check()


def halved() -> nbtrain.Task:
    task = made(Net().to(torch.bfloat16))
    task.train = task.valid = Bf16()
    return task


class Bf16(Noisy):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x.bfloat16(), y


def test_float32_moments_under_bf16_parameters_keep_their_type_and_their_bits(tmp_path: Path) -> None:
    run = session(tmp_path, build=halved)
    for batch in run:
        loss, _, _ = run.task.run(batch)
        run.update(loss)
        for state in run.task.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].float().mul_(1 + 2**-12)
        if run.step == 1:
            break
    before = state_of(run)
    assert before["neck.weight"]["exp_avg"].dtype == torch.float32
    assert (
        before["neck.weight"]["exp_avg"].bfloat16().float() != before["neck.weight"]["exp_avg"]
    ).any()
    after = state_of(session(tmp_path, build=halved))
    for name, state in before.items():
        for key, value in state.items():
            assert after[name][key].dtype == value.dtype
            assert torch.equal(after[name][key], value), f"{name} {key}"
