"""Where the device has no memory for a micro-batch: the window again, in smaller ones.

The step stays what it was: the window is read again, which gives the same samples with the same
augmentation since both are functions of the place, and each counts the same under the same
denominator, so the gradient is the mean over the same samples. What is drawn or computed for a
micro-batch as a whole, dropout's masks, BatchNorm's statistics, mixup, is done for the smaller ones,
as with a smaller `batch_size` and a larger `accumulate`; their keys are (seed, step, micro-step).

The size that had room is remembered for the model and the device: in the session and its checkpoints.
In a population all other members leave the device first.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# What other allocators than torch's own say, in plain RuntimeErrors.
_WORDS = (
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)

VALID = ", in the validation"  # behind a device's name
VALID_WAY_OUT = (
    "It was in the validation, with a single sample. Take smaller samples there, or a larger GPU: the "
    "session stands before this validation."
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that the device has too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def device_name(model: nn.Module) -> str:
    """Return what a model computes on, in words: "Tesla T4", "cpu"."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def room(rooms: Mapping[str, int], model: nn.Module, *, validates: bool = False) -> int | None:
    """Return how many samples there is room for at a time; None where that is not known."""
    if not rooms:
        return None
    device = device_name(model)
    known = (rooms.get(name) for name in ([device, device + VALID] if validates else [device]))
    return min((size for size in known if size is not None), default=None)


def release() -> None:
    """Give back what the failed attempt still holds: its errors' frames, and torch's cached blocks."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def halved(
    error: Exception, model: nn.Module, num_samples: int | None, *, is_torn: bool = False
) -> tuple[int, str]:
    """Return the size to try next, and in words what that changes.

    Args:
        error: What was raised.
        model: Looked through for what computes over a micro-batch.
        num_samples: Size of the micro-batch that had no room.
        is_torn: Whether it was in the optimizer's step.

    Raises:
        torch.OutOfMemoryError: a smaller micro-batch would not help, or there is none.
    """
    device = device_name(model)
    if is_torn or num_samples is None:
        raise torch.OutOfMemoryError(
            f"{device} has no memory for the optimizer's step, whatever the micro-batch.\n"
            "Take a smaller model, an optimizer with less state, or a larger GPU. "
            "Every checkpoint is intact."
        ) from error
    if num_samples == 1:
        raise torch.OutOfMemoryError(
            f"{device} has no memory for a micro-batch of 1 sample.\n"
            "Take a smaller model or smaller samples, or a larger GPU, where the session goes on. "
            "Every checkpoint is intact."
        ) from error
    size = -(-num_samples // 2)
    normed = any(isinstance(module, _NormBase) for module in model.modules())
    also = f"; BatchNorm sees at most {size} at a time" if normed else ""
    return size, (
        f"out of memory with a micro-batch of {num_samples} on {device}: at most {size} from here on. "
        f"The step's samples and their mean stay{also}"
    )


def give_way_in_validation(
    error: Exception, rooms: dict[str, int], model: nn.Module, batch_size: int
) -> str:
    """Let validations take half so many samples at a time; return in words what that changes.

    Raises:
        torch.OutOfMemoryError: it was a single sample.
    """
    before = min(batch_size, room(rooms, model, validates=True) or batch_size)
    if before == 1:
        error.add_note(VALID_WAY_OUT)
        raise error
    rooms[device_name(model) + VALID] = size = -(-before // 2)
    return f"out of memory in the validation with {before} at a time: at most {size} from here on"


def way_out(settings: Mapping[str, Any]) -> str:
    """Return what to write where the loop is the user's own, which nobody can run again."""
    size, accumulate = settings["batch_size"], settings["accumulate"]
    if size == 1:
        return "The micro-batch is 1 already. Take a smaller model or smaller samples."
    half, times = -(-size // 2), -(-size * accumulate // -(-size // 2))
    same = "the same samples a step" if half * times == size * accumulate else "nearly as many a step"
    return (
        f"session.set(batch_size={half}, accumulate={times}) takes {same} with less memory; "
        "then run the cell again: it goes on before this step. session.run() does it by itself."
    )
