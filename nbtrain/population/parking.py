"""Members that wait take no room on the device when there is too little for the one that trains.

Their tensors stay where they are as long as they fit. What leaves goes to pinned memory of the host,
from where it is back by one copy; parts of the user's that are no modules stay. On a CPU nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nbtrain.task import Task

MARGIN = 1.2  # times what a slice has needed: another member may need a little more


def park(task: Task) -> None:
    """Move a task's tensors to the host's memory."""

    def away(tensor: Tensor) -> Tensor:
        return tensor.to("cpu").pin_memory() if tensor.is_cuda else tensor

    _move(task, away)


def fetch(task: Task, device: torch.device) -> None:
    """Move a parked task's tensors back to its device."""

    def back(tensor: Tensor) -> Tensor:
        # Some of an optimizer's numbers were on the host all the time, and were not pinned.
        return tensor.to(device) if device.type == "cuda" and tensor.is_pinned() else tensor

    _move(task, back)


class Room:
    """How much of the device a slice needs beside the tensors that stay there.

    Args:
        device: Where members train.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before, self._most = device, 0, 0

    def begin(self) -> None:
        """Note what is taken before a slice."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def is_tight(self) -> bool:
        """Say, after a slice, whether one more like the largest would find too little left."""
        if self._device.type != "cuda":
            return False
        peak = torch.cuda.max_memory_allocated(self._device)
        self._most = max(self._most, peak - self._before)
        free, _ = torch.cuda.mem_get_info(self._device)
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + held < MARGIN * self._most


def _move(task: Task, to: Callable[[Tensor], Tensor]) -> None:
    averages = [] if task.ema is None else [task.ema]
    modules = [
        task.model,
        *averages,
        *(part for part in task.parts.values() if isinstance(part, nn.Module)),
    ]
    for module in modules:
        module._apply(to)
    for state in task.optimizer.state.values():
        if not isinstance(state, dict):  # a number of the optimizer's own
            continue
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = to(value)
