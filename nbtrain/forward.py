"""How a batch becomes a loss: on which device the model computes, in which precision and layout.

A session, a member of a population, a trial of an audit and a rehearsal all go through here, so that
what one of them computes is what each of them would. Weights, gradients and the optimizer's moments
stay float32; `autocast` takes the operations that bear it to 16 bits, in the forward pass only.

    fp32    as torch computes; nothing is entered
    bf16    float32's range: needs no scaling; fast from CUDA capability 8.0 on, and on CPUs
    fp16    fast on older GPUs too; small gradients are kept by a GradScaler, which is saved
    mixed   bf16 where the device does it fast, else fp16

Source: Micikevicius et al. 2018, arXiv:1710.03740; torch.amp.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbtrain.data import moved
from nbtrain.errors import NbtrainWarning, SessionError
from nbtrain.task import Task

PRECISIONS = ("fp32", "bf16", "fp16", "mixed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16_FROM = (8, 0)  # CUDA capability with bf16 in hardware; older ones emulate it in float32


@dataclass(frozen=True)
class Forward:
    """A forward pass.

    Args:
        device: Where it is done.
        precision: "fp32", "bf16" or "fp16".
        channels_last: Whether images and the weights of convolutions lie as (batch, y, x, channel).
        compile: Whether the model is compiled; or the arguments of `torch.compile`.
    """

    device: torch.device
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool | Mapping[str, Any] = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any], device: torch.device) -> Forward:
        """Return what the user's arguments mean on a device."""
        precision = arguments.get("precision", "fp32")
        if precision == "mixed":
            precision = "bf16" if has_bf16(device) else "fp16"
        elif precision == "bf16" and not has_bf16(device):
            warnings.warn(
                f"{torch.cuda.get_device_name(device)} has no bf16, and emulates it slowly. "
                'Use precision="fp16", or "mixed" which takes what a device is fast at.',
                NbtrainWarning,
                stacklevel=4,
            )
        compile = arguments.get("compile", False)
        return cls(device, precision, arguments.get("channels_last", False), compile)

    def prepare(self, task: Task) -> None:
        """Make a task's model ready for it, in place: its names, and its parameters, stay the same."""
        for module in (task.model, task.ema) if task.ema is not None else (task.model,):
            module.to(self.device)
            if self.channels_last:
                module.to(memory_format=torch.channels_last)
        if self.compile is not False:
            given = {} if self.compile is True else self.compile
            # Else a shape that comes later, such as an epoch's tail, lets the others be compiled anew,
            # with other sums: the bits of a run would hang on where it was cut.
            task.model.compile(**{"dynamic": False, **given})

    def moved(self, batch: Any) -> Any:
        """Return a batch as the model takes it."""
        batch = moved(batch, self.device)
        return _with_channels_last(batch) if self.channels_last else batch

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which a forward pass and its loss are computed."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def not_entered(self) -> SessionError:
        """Return the error for a loss that a loop of the user's own computed outside of it."""
        return SessionError(
            f"This loss was not computed in {self.precision}. Write: "
            "with session.autocast(): loss = ..., and session.update(loss) after it."
        )

    def run(self, task: Task, batch: Any) -> tuple[Tensor, float | None, Any]:
        """Return what `Task.run` gives for a batch that was moved."""
        with self.autocast():
            return task.run(batch)

    def read(self, output: Any) -> Any:
        """Return a model's output for a metric: autocast's 16 bits as float32, known to numpy too."""
        halves = self.precision != "fp32" and isinstance(output, Tensor) and output.is_floating_point()
        return output.float() if halves else output

    def new_scaler(self) -> torch.amp.GradScaler | None:
        """Return what keeps the small gradients of fp16, and None where there are none to keep."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None


def chosen(device: str | torch.device | None) -> torch.device:
    """Return the device that was asked for; None is the GPU where there is one.

    Raises:
        ValueError: torch does not know it, or it is not here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device={device!r} is none that torch knows. Give "cuda", "cuda:1", "cpu", or None.'
        ) from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(
            f"device={str(found)!r} is not here: torch sees {count or 'no'} GPU{'s' * (count > 1)}. "
            "Switch the accelerator on in the notebook's settings, or leave device= out."
        )
    return found


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_FROM
    return device.type == "cpu"


def use_tf32(wanted: bool | None, device: torch.device) -> None:
    """Let float32 products on a GPU be rounded to TF32 first, or not; None leaves torch as it is.

    It holds for the process, and changes nothing on a CPU. A GPU without TF32 computes as before.
    """
    if wanted is None or device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


def _with_channels_last(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch
    if isinstance(batch, Mapping):
        return {name: _with_channels_last(value) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_with_channels_last, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(_with_channels_last, batch))
    return batch
