"""A task's data, ready to be read: settings, order, loaders; and the journal they begin with.

A session reads one task; a population reads one for each member, under a seed of the member's own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from nbtrain import data, schedulers
from nbtrain.errors import DataError, NbtrainWarning
from nbtrain.journal import SETTINGS, Journal
from nbtrain.schedule import FUNCTION
from nbtrain.stream import Stream
from nbtrain.task import Task

DEFAULT_BATCH = 32
STREAM = "train data"  # the part that is a stream's state


def decay_apart(
    arguments: dict[str, Any], fields: dict[str, Any], build: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a session's arguments and the task's fields, with a decay that is a function among these.

    Raises:
        ValueError: there is a build, which has to bring it: no fresh kernel could find it elsewhere.
    """
    function = arguments["decay"]
    if not callable(function):
        return arguments, fields
    if build is not None:
        raise ValueError(
            "decay= is a function, which a fresh kernel would not have. "
            "Let build bring it: return nbtrain.Task(..., schedule=function)."
        )
    return arguments | {"decay": FUNCTION}, fields | {"schedule": function}


class Reading:
    """What is read, in which order, and by which settings.

    Args:
        task: Has the data and the optimizer.
        arguments: What the user wrote: settings, "num_workers".
        seed: Of the order and the augmentation.
        valid_seed: Of the validation data's augmentation; None takes the same.
        device: Where the batches go.

    Raises:
        DataError: the data cannot be read, or not with these settings.
        ValueError: an argument makes no sense, or there are two schedules.
    """

    def __init__(
        self,
        task: Task,
        arguments: dict[str, Any],
        *,
        seed: int,
        device: torch.device,
        valid_seed: int | None = None,
    ) -> None:
        self.task, self.seed = task, seed
        self._device, self._workers = device, arguments["num_workers"]
        self.source = data.source(
            task.train, "train", shuffle=True, collate=task.collate, skip_seen=task.skip_seen
        )
        if isinstance(self.source.dataset, Stream) and self.source.dataset.has_state:
            if not isinstance(task.parts.get(STREAM, self.source.dataset), Stream):
                raise DataError(f"{STREAM!r} is the stream's own part. Give yours another name.")
            task.parts = {**task.parts, STREAM: self.source.dataset}
        self.order = data.Order(self.source, seed)
        self.found = self._found(arguments)  # settings that the task brings and nobody wrote
        self.settings: dict[str, Any] = {name: arguments.get(name) for name in SETTINGS} | self.found
        self.settings["milestones"] = tuple(arguments["milestones"])
        planned = self.settings["warmup_epochs"] or self.settings["decay"] != "constant"
        self.group_lrs = schedulers.peaks(task.optimizer, is_planned=bool(planned))
        self.journal = Journal(self.settings, self.group_lrs, task.schedule)
        self.journal.refuse_no_function(self.journal.settings)
        self._refuse_two_schedules()
        self.journal.scheduler = "" if task.scheduler is None else type(task.scheduler).__name__
        self.journal.scales = schedulers.scales(task.optimizer)
        self._tell_of_idle_scales()
        if misfit := self.order.misfit(self.settings["batch_size"]):
            raise DataError(misfit)
        self.train = self._loader(self.source, (seed, "train"), self.order)
        self.valid: data.Loader | None = None
        self.valid_batch = 0
        if task.valid is not None:
            seed = seed if valid_seed is None else valid_seed
            source = data.source(task.valid, "valid", shuffle=False, collate=task.collate)
            source.drop_last = False
            self.valid_batch = source.batch_size or self.settings["batch_size"]
            self.valid = self._loader(source, (seed, "valid"), data.Order(source, seed))

    def close(self) -> None:
        """End the workers."""
        self.train.close()
        if self.valid is not None:
            self.valid.close()

    def _found(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if arguments["batch_size"] is None:
            found["batch_size"] = self.source.batch_size or self._largest() or DEFAULT_BATCH
        elif self.order.is_batched and arguments["batch_size"] != self._largest():
            raise DataError(
                f"batch_size={arguments['batch_size']!r}, but the train data have a batch sampler, "
                "which makes the batches. Leave batch_size out."
            )
        if self.task.schedule is not None:
            self._refuse_two_decays(arguments["decay"])
            found["decay"] = FUNCTION
        return found

    def _refuse_two_decays(self, decay: str) -> None:
        if decay not in ("constant", FUNCTION):
            raise ValueError(
                f"There are two decays: {decay!r}, and the task's function. Leave one of them out."
            )

    def _refuse_two_schedules(self) -> None:
        for name, part in self.task.parts.items():
            # One of a critic's optimizer, say, is no concern of the session's.
            is_over_ours = getattr(part, "optimizer", None) is self.task.optimizer
            if isinstance(part, LRScheduler) and is_over_ours and self.journal.writes_rates:
                raise ValueError(
                    f"There are two schedules: the part {name!r}, and the session's own "
                    "(warmup_epochs, decay, base_lr). Leave one of them out."
                )

    def _largest(self) -> int | None:
        """Return the size of the first epoch's largest batch, where a batch sampler makes them."""
        if not self.order.is_batched:
            return None
        return max(self.order.sizes(0, 0, 1, drop_last=False), default=None)

    def _tell_of_idle_scales(self) -> None:
        applied = self.journal.writes_rates or any(
            hasattr(p, "step_update") for p in self.task.parts.values()
        )
        if not applied and {*self.journal.scales} != {1.0}:
            warnings.warn(
                "The optimizer's groups have lr_scale, as timm's layer decay makes it, and nothing "
                "applies it: the rates are the optimizer's or a scheduler's of torch's.\n"
                'Let the session write them: warmup_epochs=, or a decay such as decay="cosine".',
                NbtrainWarning,
                stacklevel=5,
            )

    def _loader(
        self, source: data.Source, words: tuple[int | str, ...], order: data.Order
    ) -> data.Loader:
        workers = self._workers
        if workers is None:
            workers = source.num_workers
        if workers is None:
            workers = data.default_workers(source.dataset)
        if not isinstance(workers, int) or workers < 0:
            raise ValueError(f"num_workers={workers!r} must be a whole number from 0 up.")
        if workers and isinstance(source.dataset, Stream):
            raise DataError(
                f"num_workers={workers}, but the data are a stream: each worker would read one of its "
                "own, in an order that depends on how many there are. Give num_workers=0."
            )
        pin = source.pin_memory if source.pin_memory is not None else self._device.type == "cuda"
        return data.Loader(source, words, order, self.settings["batch_size"], workers, pin)
