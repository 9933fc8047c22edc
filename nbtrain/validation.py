"""The mean loss and metrics over the validation data, leaving training as it was.

Each sample counts once, also in a ragged last batch. The model is put into eval mode and each of its
modules back into the mode it was in; randomness is keyed, so a validation done again gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from nbtrain import randomness
from nbtrain.data import Loader, moved
from nbtrain.errors import TaskError
from nbtrain.task import Task


def validate(
    task: Task,
    loader: Loader,
    batch_size: int,
    *,
    seed: int,
    device: torch.device,
    proceed: Callable[[], bool],
) -> dict[str, float] | None:
    """Return {"valid_loss": mean, metric: mean, ...}, or None where `proceed` said no on the way.

    Args:
        task: Model, loss, metrics.
        loader: The validation data, in order.
        batch_size: Samples in a batch.
        seed: The session's.
        device: Where the model is.
        proceed: Asked before each batch.

    Raises:
        TaskError: a metric gave something that is no number.
    """
    modes = {module: module.training for module in task.model.modules()}
    sums: dict[str, list[tuple[Any, float]]] = {}
    loader.start(0, 0, batch_size, epochs=1)
    task.model.eval()
    try:
        with torch.no_grad():
            number = 0
            while (found := next(loader, None)) is not None:
                if not proceed():
                    return None
                num_samples, batch = found
                randomness.seed(seed, "valid", number)
                batch = moved(batch, device)
                loss, count, output = task.run(batch)
                sums.setdefault("valid_loss", []).append((loss, count or num_samples))
                for name, metric in task.metrics.items() if output is not None else ():
                    value = metric(output, batch[1])
                    sums.setdefault(name, []).append((_mean(name, value), num_samples))
                number += 1
    finally:
        for module, training in modes.items():
            module.training = training
    return {
        name: sum(float(value) * n for value, n in found) / sum(n for _, n in found)
        for name, found in sums.items()
    }


def _mean(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double().mean() if value.ndim else value
    if isinstance(value, Real):  # numpy's scalars too
        return value
    raise TaskError(
        f"The metric {name!r} gave a {type(value).__name__}. "
        "Let it return a number or a tensor: the batch's mean, or a value for each sample."
    )
