"""The mean loss and metrics over the validation data, leaving training as it was.

Each sample counts once, also in a ragged last batch; a batch of which a step counts nothing weighs
nothing. The model is put into eval mode and each of its modules back into the mode it was in;
randomness is keyed, so a validation done again gives the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nbtrain import randomness
from nbtrain.data import Loader
from nbtrain.forward import Forward
from nbtrain.metrics import Measuring
from nbtrain.task import Task


def validate(
    task: Task,
    loader: Loader,
    batch_size: int,
    *,
    seed: int,
    forward: Forward,
    proceed: Callable[[], bool],
    room: int | None = None,
) -> dict[str, float] | None:
    """Return {"valid_loss": mean, metric: mean, ...}, or None where `proceed` said no on the way.

    Args:
        task: Model, or its EMA where it has one; loss, metrics.
        loader: The validation data, in order.
        batch_size: Samples in a batch.
        seed: The session's.
        forward: How a batch becomes a loss.
        proceed: Asked before each batch.
        room: Most samples that the device has memory for at a time, where that is less than a batch.

    Raises:
        TaskError: a metric gave something that is no number.
    """
    task = task.validated
    modes = {module: module.training for module in task.model.modules()}
    measuring = Measuring(task.metrics if task.step is None else {}, forward.device)
    loader.start(0, 0, batch_size, epochs=1, room=room)
    task.model.eval()
    try:
        with torch.no_grad():
            number = 0
            while (found := next(loader, None)) is not None:
                if not proceed():
                    return None
                num_samples, batch = found
                randomness.seed(seed, "valid", number)
                batch = forward.moved(batch)
                loss, count, output = forward.run(task, batch)
                n = num_samples if count is None else count
                measuring.add("valid_loss", loss, n)
                for name, value in task.named(output).items():
                    measuring.add(f"valid_{name}", value, n)
                if task.step is None:
                    measuring.see(forward.read(output), batch[1], num_samples)
                number += 1
            return measuring.read()
    finally:
        measuring.close()
        for module, training in modes.items():
            module.training = training
