"""What may change inside a window is put back wherever that is cut, and comes with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Noisy, assert_exact_wherever_cut, assert_same_bits, bits, session
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nbtrain
from nbtrain import CheckpointError

CUTS = [1, 4, 12]  # each inside a window, the first one too


class Averaging(nn.Module):
    """A running mean that is None until the first batch; one that grows with each, too."""

    def __init__(self, first: Tensor | None, *, grows: bool = False) -> None:
        super().__init__()
        self.linear, self.grows = nn.Linear(6, 3), grows
        self.register_buffer("mean", first)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        now = y.detach().mean(0)
        if self.training and self.grows:
            self.mean = torch.cat([self.mean, now.mean().view(1)])
        elif self.training:
            self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        return y - 0.1 * (self.mean.sum() if self.grows else self.mean)


def task(model: nn.Module, held: nn.Module | None = None, **fields: Any) -> nbtrain.Task:
    optimizer = torch.optim.AdamW((held or model).parameters(), lr=0.05)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), **fields)


def bound_later() -> nbtrain.Task:
    return task(Averaging(None), valid=Noisy())


def bound_twice() -> nbtrain.Task:
    model = Averaging(None)
    return task(
        nn.ModuleList([model, model]), step=lambda m, batch: cross_entropy(m[1](batch[0]), batch[1])
    )


def growing() -> nbtrain.Task:
    return task(Averaging(torch.zeros(0), grows=True), valid=Noisy())


def taught(move: Callable[[Tensor, Tensor], Any]) -> nbtrain.Task:
    model = nn.ModuleDict({"student": nn.Linear(6, 3), "teacher": nn.Linear(6, 3)})
    nn.init.zeros_(model["student"].bias)  # its teacher's stands still until the first step is done
    model["teacher"].load_state_dict(model["student"].state_dict())
    model["teacher"].requires_grad_(False)

    def step(model: Any, batch: Any) -> Tensor:
        for slow, fast in zip(
            model["teacher"].parameters(), model["student"].parameters(), strict=True
        ):
            move(slow, fast)
        return cross_entropy(model["student"](batch[0]) + model["teacher"](batch[0]), batch[1])

    return task(model, model["student"], step=step)


def taught_by_binding() -> nbtrain.Task:
    def move(slow: Tensor, fast: Tensor) -> None:
        slow.data = slow.data * 0.9 + fast.data * 0.1

    return taught(move)


def taught_in_place() -> nbtrain.Task:
    return taught(lambda slow, fast: slow.data.mul_(0.9).add_(fast.data, alpha=0.1))


def adversarial() -> nbtrain.Task:
    model = nn.ModuleDict({"maker": nn.Linear(6, 6), "judge": nn.Linear(6, 1)})
    judging = torch.optim.Adam(model["judge"].parameters(), lr=0.01)

    def step(model: Any, batch: Any) -> Tensor:
        x, made = batch[0], model["maker"](batch[0])
        judging.zero_grad()
        (model["judge"](made.detach()).mean() - model["judge"](x).mean()).backward()
        judging.step()
        return made.square().mean() - model["judge"](made).mean()

    return task(model, model["maker"], step=step, parts={"judging": judging})


class Counting(torch.optim.SGD):
    """Keeps a count and an average under a key that is no parameter's, and steps by them."""

    def step(self, closure: Any = None) -> Any:
        kept = self.state["all"]
        kept["count"] = kept.get("count", 0) + 1
        norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).mean()
        kept["norm"] = 0.9 * kept.get("norm", norm) + 0.1 * norm
        for p in self.param_groups[0]["params"]:
            p.grad.div_(kept["norm"] * kept["count"])
        return super().step(closure)


def counting() -> nbtrain.Task:
    model = nn.Linear(6, 3)
    optimizer = Counting(model.parameters(), lr=0.05, momentum=0.9)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy())


WAYS = [bound_later, bound_twice, growing, taught_by_binding, taught_in_place, adversarial, counting]


@pytest.mark.parametrize("build", WAYS)
def test_what_forward_or_step_changes_resumes_to_the_same_bits(
    tmp_path: Path, build: Callable[[], nbtrain.Task]
) -> None:
    expected = assert_exact_wherever_cut(tmp_path, CUTS, build=build)
    for cut in CUTS:
        run = session(tmp_path / f"here-{cut}", build=build)
        for count, batch in enumerate(run):
            loss = run.task.run(batch)[0]
            if count == cut:
                break
            run.update(loss)
        assert_same_bits(bits(run.run()), expected)


def test_a_buffer_that_was_none_at_the_start_of_a_window_is_none_again(tmp_path: Path) -> None:
    run = session(tmp_path, build=bound_later)
    for batch in run:
        run.task.run(batch)
        assert run.task.model.mean is not None
        break
    assert run.task.model.mean is None
    found = run.find_lr(steps=10)
    assert run.task.model.mean is None and len(found.losses) == 10
    run.run()
    assert torch.equal(run.best().mean, session(tmp_path, build=bound_later).best().mean)


def test_a_buffer_that_was_built_otherwise_is_refused_before_anything_is_changed(
    tmp_path: Path,
) -> None:
    session(tmp_path, build=bound_later).run()
    for build, side in ((averaging_from_zero, r"\(3,\) float32"), (plain, "absent")):
        with pytest.raises(CheckpointError, match=rf"does not fit at 'mean'.*\n.*None\n.*{side}"):
            session(tmp_path, build=build)


def averaging_from_zero() -> nbtrain.Task:
    return task(Averaging(torch.zeros(3)), valid=Noisy())


def plain() -> nbtrain.Task:
    model = Averaging(None)
    del model.mean
    return task(model, valid=Noisy())


def test_frozen_weights_that_stand_still_cost_nothing_after_the_first_windows(tmp_path: Path) -> None:
    run = session(tmp_path, build=standing_still, epochs=4)
    copied = []
    for batch in run:
        run.update(run.task.run(batch)[0])
        copied.append(len(run._live._start.buffers))
    assert copied[0] == 2 and copied[-1] == 0


def standing_still() -> nbtrain.Task:
    return taught(lambda slow, fast: None)
