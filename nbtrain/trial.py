"""The first steps of a run, trained as a session trains them, and nothing kept of it but digests.

Each trial begins with a fresh `build` under the session's key and takes the session's own pieces:
order, loader, windows, updates. It needs no store, thread or file, and leaves random states and torch's
settings as they were.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nbtrain import data, memory, opening, randomness, task
from nbtrain.arguments import check_speed
from nbtrain.evidence import digest
from nbtrain.forward import Forward, chosen
from nbtrain.journal import SETTINGS, check
from nbtrain.live import Live
from nbtrain.reading import DEFAULT_BATCH, Reading

NO_SCHEDULE = {
    "warmup_epochs": 0,
    "warmup": "linear",
    "decay": "constant",
    "milestones": (),
    "gamma": 0.1,
}


@dataclass
class Trial:
    """What was seen of one run.

    Args:
        label: Its column.
        num_workers: Processes that fetched.
        first: Digests of the first weights and buffers, by name.
        order: Digest of the first epoch's order.
        samples: Digests of the batches, a list a step.
        losses: The windows' mean losses, a number a step.
        digits: What it takes to write a loss without losing a bit.
        last: Digests of the weights and buffers after the last step, by name.
    """

    label: str
    num_workers: int
    first: dict[str, str]
    order: str
    samples: list[list[str]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    digits: int = 9
    last: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> tuple[list[str], dict[str, str]]:
        """What is equal in two runs that are the same."""
        return [repr(loss) for loss in self.losses], self.last


class Bench:
    """Where the first steps are tried, as often as wanted.

    Args:
        build, batch_size, accumulate, num_workers, seed, device, precision: As for a `Session`.
        steps: How many.

    Raises:
        ValueError: an argument makes no sense.
        SessionError: something trains in this kernel.
    """

    def __init__(
        self,
        build: Callable[[], task.Task],
        steps: int,
        batch_size: int | None,
        accumulate: int,
        num_workers: int | None,
        seed: int,
        device: str | torch.device | None,
        precision: str = "fp32",
    ) -> None:
        if not callable(build):
            raise ValueError("build= is what a build returns. Give the function: build, not build().")
        opening.refuse_while_training("an audit")
        for name, value in (("steps", steps), ("seed", seed)):
            if type(value) is not int or (name == "steps" and value < 1):
                least = " from 1 up" if name == "steps" else ""
                raise ValueError(f"{name}={value!r} must be a whole number{least}.")
        if num_workers is not None and (type(num_workers) is not int or num_workers < 0):
            raise ValueError(f"num_workers={num_workers!r} must be a whole number from 0 up.")
        size = DEFAULT_BATCH if batch_size is None else batch_size
        self._settings = dict.fromkeys(SETTINGS) | NO_SCHEDULE | {"accumulate": accumulate}
        check(self._settings | {"batch_size": size})
        check_speed({"precision": precision})
        self.build, self.steps, self.seed = build, steps, seed
        self._batch_size, self._num_workers = batch_size, num_workers
        self.device = chosen(device)
        self.forward = Forward.of({"precision": precision}, self.device)

    def fresh(self) -> Fresh:
        """Call `build` under its key, and make ready what it gives."""
        return Fresh(self.build, self._batch_size, self._settings, self.seed, self.forward)

    def workers(self, source: data.Source) -> int:
        """Return how many workers a session would take."""
        found = source.num_workers if self._num_workers is None else self._num_workers
        return data.default_workers(source.dataset) if found is None else found

    def run(self, label: str, num_workers: int | None = None, threads: int | None = None) -> Trial:
        """Train the first steps, from a fresh `build`.

        Args:
            label: Of the trial.
            num_workers: None is as a session would.
            threads: Of torch on the CPU; None is as they are.
        """
        with undisturbed():
            if threads is not None:
                torch.set_num_threads(threads)
            fresh = self.fresh()
            workers = self.workers(fresh.source) if num_workers is None else num_workers
            trial = Trial(label, workers, fresh.weights(), digest(_numbers(fresh.order(0))))
            loader = data.Loader(
                fresh.source, (self.seed, "train"), fresh.order, fresh.batch_size, workers
            )
            with closing(loader), torch.enable_grad():
                self._train(fresh, loader, trial)
            trial.last = fresh.weights()
            return trial

    def _train(self, fresh: Fresh, loader: data.Loader, trial: Trial) -> None:
        live, seed = fresh.live, self.seed
        fresh.task.model.train()
        randomness.seed(seed, "epoch", 0)
        while live.step < self.steps:
            window = live.next_window()
            if window is None:
                live.close_epoch({})
                loader.turn()
                randomness.seed(seed, "epoch", live.epoch)
                continue
            live.begin(window)
            loader.start(live.epoch, live.position, fresh.batch_size, None)
            samples = []
            while not window.is_full:
                num_samples, batch = next(loader)
                samples.append(digest(batch))
                live.micro_step((num_samples, batch), seed)
            assert window.loss is not None
            trial.samples.append(samples)
            trial.losses.append(float(window.loss))
            trial.digits = 17 if window.loss.dtype == torch.float64 else 9


class Fresh:
    """What `build` gives under its key, made ready as a session does, and nothing of it trained."""

    def __init__(
        self,
        build: Callable[[], task.Task],
        batch_size: int | None,
        settings: dict[str, Any],
        seed: int,
        forward: Forward,
    ) -> None:
        randomness.seed(seed, "build")
        self.task = task.call(build)
        self.forward = forward
        self.forward.prepare(self.task)
        written = settings | {"batch_size": batch_size, "num_workers": 0}
        read = Reading(self.task, written, seed=seed, device=forward.device)
        self.source, self.order = read.source, read.order
        self.batch_size: int = read.settings["batch_size"]
        self.live = Live(self.task, read.journal, self.order, self.source.drop_last, self.forward)

    def weights(self) -> dict[str, str]:
        """Return digests of the weights and buffers, by name."""
        return {name: digest(value) for name, value in self.task.model.state_dict().items()}


def _numbers(indices: Any) -> list[int]:
    return indices.tolist() if isinstance(indices, torch.Tensor) else list(indices)


def said(what: str, act: Callable[[], Any]) -> Any:
    """Do something, print how long it took, and give what it gave."""
    began = time.monotonic()
    try:
        done = act()
    except RuntimeError as error:
        if memory.is_shortage(error):  # a session would go on in smaller micro-batches
            error.add_note(
                "An audit compares runs of one size. Give it a smaller batch_size=, and accumulate= so "
                "many times larger: nbtrain.audit(build, batch_size=16, accumulate=4)."
            )
        raise
    print(f"{what}: {time.monotonic() - began:.1f} s", flush=True)
    return done


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave random states, grad mode and torch's settings behind as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    cudnn, device = torch.backends.cudnn, torch.get_default_device()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    algorithms, tf32 = (cudnn.benchmark, cudnn.deterministic), torch.get_float32_matmul_precision()
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = range(torch.cuda.device_count()) if has_cuda else ()
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_grad_enabled(grad)
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(was_deterministic, warn_only=warns_only)
            cudnn.benchmark, cudnn.deterministic = algorithms
            if torch.get_float32_matmul_precision() != tf32:
                torch.set_float32_matmul_precision(tf32)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)
