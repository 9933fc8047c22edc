"""Micro-batches to one update, with one denominator a window.

A window is the samples of one optimizer step. Each micro-step adds its share, mean loss times its
samples over the window's samples, so the gradient is the mean over all samples of the window: also
in the ragged tail of an epoch, where the last micro-batch or the last window is smaller, and where
dividing by a fixed number of micro-steps goes wrong.

Parameters do not change inside a window. That makes it atomic: whatever happens inside, its start is
still at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nbtrain.errors import TaskError


@dataclass
class Window:
    """One optimizer step in the making.

    Args:
        num_samples: Samples that the window will hold, known before it begins.
        num_micro_steps: Micro-steps that it will take.
    """

    num_samples: int
    num_micro_steps: int
    micro_step: int = 0
    weight: float = 0.0
    loss: Tensor | None = field(default=None, repr=False)
    has_gradient: bool = field(default=False, repr=False)
    named: dict[str, tuple[Any, float]] = field(default_factory=dict, repr=False)

    @property
    def is_full(self) -> bool:
        """Whether every micro-step is done."""
        return self.micro_step == self.num_micro_steps

    def add(
        self,
        loss: Tensor,
        n: float,
        scaler: torch.amp.GradScaler | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Run backward for a micro-step's mean loss, which stands for n samples.

        Args:
            loss: Mean over the micro-batch, shape ().
            n: Samples in it; or tokens, boxes: whatever the mean was taken over. Where that is 0, the
                loss adds nothing.
            scaler: Keeps the small gradients of fp16, which are unscaled before `finish`.
            optimizer: Has the parameters whose gradients are gathered.

        Raises:
            TaskError: nothing was counted in the whole window, so that it has no mean; or the gradients
                of its earlier micro-steps were thrown away.
        """
        if self.has_gradient and not _has_gradient(optimizer):
            raise TaskError(
                f"The gradients of the {self.micro_step} micro-batches before this one are gone. "
                "session.update() zeroes them after each step: leave optimizer.zero_grad() out."
            )
        share = n / self.num_samples
        try:
            # With one micro-step a window the share is 1: the very bits of a plain loop.
            part = loss if share == 1.0 else loss * share
            part = part if scaler is None else scaler.scale(part)
            part.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "second time" in str(error):
                error.add_note("session.update(loss) does the backward: leave loss.backward() out.")
            raise
        if self.num_micro_steps > 1:
            self.has_gradient = _has_gradient(optimizer)
        part = loss.detach() * share
        self.loss = part if self.loss is None else self.loss + part
        self.weight += n
        self.micro_step += 1
        if self.is_full and not self.weight:
            raise TaskError(
                f"step has counted 0 in all {self.num_samples} samples of a window, which has no mean "
                "loss then. Leave such samples out of the data, or raise accumulate."
            )

    def log(self, named: Mapping[str, Any], n: float) -> None:
        """Add other values of a micro-step, each a mean over n; `named` has sums and weights."""
        if not n:
            return
        for name, value in named.items():
            total, weight = self.named.get(name, (0.0, 0.0))
            value = value.detach().squeeze() if isinstance(value, Tensor) else float(value)
            self.named[name] = total + value * n, weight + n

    def finish(self, parameters: Iterable[Tensor], clip_norm: float | None = None) -> Tensor:
        """Make the gradients those of the window's mean loss, clip them, and return that loss.

        Where n counted something else than samples, the true denominator is known only now.
        """
        assert self.loss is not None
        parameters = [p for p in parameters if p.grad is not None]
        if self.weight != self.num_samples:
            correction = self.num_samples / self.weight
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], correction)
            self.loss = self.loss * correction
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        return self.loss


def _has_gradient(optimizer: torch.optim.Optimizer | None) -> bool:
    groups = [] if optimizer is None else optimizer.param_groups
    return any(p.grad is not None for group in groups for p in group["params"])


def cuts(num_samples: int, room: int | None) -> list[int]:
    """Cut a micro-batch into as few as there is room for, whose sizes differ by one at most.

    Even ones, because a rest of a single sample would be no batch for BatchNorm.
    """
    if room is None or num_samples <= room:
        return [num_samples]
    count = -(-num_samples // room)
    return [num_samples // count + (number < num_samples % count) for number in range(count)]


def plan(
    left: int, *, batch_size: int, accumulate: int, drop_last: bool = False, room: int | None = None
) -> Window | None:
    """Return the next window of an epoch with so many samples left, or None at the epoch's end.

    A window never reaches over the end of an epoch: the tail is a smaller window of its own. With
    `drop_last` a last micro-batch that is not full is left out. Where the device has room for less
    than a batch, each is done in several micro-steps; the window's samples stay what they are.
    """
    if drop_last:
        left -= left % batch_size
    num_samples = min(left, batch_size * accumulate)
    if num_samples <= 0:
        return None
    whole, rest = divmod(num_samples, batch_size)
    num_micro_steps = whole * len(cuts(batch_size, room))
    if rest:
        num_micro_steps += len(cuts(rest, room))
    return Window(num_samples, num_micro_steps)


def of(sizes: Iterable[int], room: int | None = None) -> Window | None:
    """Return the window of these batches, whatever their sizes, or None where there are none."""
    found = list(sizes)
    num_micro_steps = sum(len(cuts(size, room)) for size in found)
    return Window(sum(found), num_micro_steps) if found else None
