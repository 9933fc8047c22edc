"""The learning rate range test: trained over ever higher rates, and the session as it was before.

It trains what is alive, from where the session stands, with its next samples, its windows and its
groups' proportions, but through a loader, a journal and a history of its own. Then weights, buffers,
optimizer, parts, modes and random states are put back, whatever ended it: the end, a divergence, an
error in the user's step, or an interrupt. What the user's code keeps elsewhere is not put back.

Source: Smith 2015, arXiv:1506.01186, section 3.3; rates in equal steps of their logarithm, the running
mean, and the stop where it is four times its best as in fastai (Howard and Gugger 2020,
arXiv:2002.04688); and of fastai's rules for a suggestion the one that it calls `minimum`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nbtrain import data, memory, opening, parts
from nbtrain.errors import SessionError
from nbtrain.history import History
from nbtrain.interrupts import Interrupted, Interrupts
from nbtrain.journal import Journal
from nbtrain.live import Live
from nbtrain.loop import Loop
from nbtrain.opening import Opened
from nbtrain.trial import undisturbed

SMOOTHING = 0.98
DIVERGED = 4.0  # times the best running mean
UNSETTLED = 0.1  # share of the steps at the start, where the running mean is of few losses
MIN_STEPS = 10
NEVER = 1_000_000  # presses

PLAIN = {"warmup_epochs": 0, "decay": "constant", "base_lr": None, "base_batch": None}


@dataclass(frozen=True, repr=False)
class RangeTest:
    """What a range test has seen; in a notebook it shows its plot.

    Attributes:
        lrs: The rates that were trained with, of the first group without its `lr_scale`.
        losses: Each window's mean loss, before the step with its rate.
        smoothed: Their running mean.
        suggestion: A tenth of the rate where the running mean is lowest; None where it does not fall.
        diverged: Whether it ended early because the loss rose to four times its best, or was not
            finite.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool

    def plot(self) -> Any:
        """Return a matplotlib Figure: losses and their running mean over the rates."""
        from nbtrain import plots

        return plots.swept(self.lrs, self.losses, self.smoothed, self.suggestion)

    def _repr_png_(self) -> Any:
        return self.plot()._repr_png_()

    def __repr__(self) -> str:
        found = "no suggestion" if self.suggestion is None else f"suggestion {self.suggestion:.2g}"
        over = f"{self.lrs[0]:.2g} to {self.lrs[-1]:.2g}" if self.lrs else "no rate"
        return f"<range test: {over}, {'diverged, ' if self.diverged else ''}{found}>"


def find(name: str, opened: Opened, loop: Loop, *, low: float, high: float, steps: int) -> RangeTest:
    """Train over rising rates and put everything back.

    Args:
        name: Of the session.
        opened, loop: Its parts.
        low, high: The first rate and the last.
        steps: How many rates, as many windows.

    Raises:
        ValueError: an argument makes no sense.
        SessionError: something trains in this kernel, or only a loop of the user's knows the loss.
        DataError: the data set raised; and whatever the user's code raises. All is as before.
    """
    _check(low, high, steps)
    opening.refuse_while_training("a range test")
    opening.claim(name, opened, loop)
    task = opened.task
    if opened.build is None and task.step is None and task.loss is cross_entropy:
        raise SessionError(
            "A loop of your own keeps its loss to itself. Give it to the session too, "
            "Session(..., loss=) or step=, or write build."
        )
    if loop.live.is_torn:  # its checkpoint could not be read when the last loop ended
        loop.keeping.fall_back()
    rates = np.geomspace(low, high, steps).tolist()
    found: list[RangeTest] = []
    # Under the lock of the orders: no click can start the training meanwhile.
    loop.order("find_lr", lambda: found.append(_tried(opened, loop.live, rates)))
    if not found:
        raise SessionError(f"{name!r} was started meanwhile. Pause it, then try again.")
    return found[0]


def suggest(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Return a tenth of the rate where the running mean is lowest, if it has fallen until there.

    Where it falls the steepest, another rule, is where the noise is in a short test.
    """
    lowest = int(np.argmin(smoothed)) if smoothed else 0
    if lowest <= UNSETTLED * len(lrs):
        return None
    return lrs[lowest] / 10


def _check(low: Any, high: Any, steps: Any) -> None:
    for name, value in (("low", low), ("high", high)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ValueError(f"{name}={value!r} must be a learning rate above 0.")
    if not low < high:
        raise ValueError(f"low={low!r} must be below high={high!r}.")
    if type(steps) is not int or steps < MIN_STEPS:
        raise ValueError(f"steps={steps!r} must be a whole number from {MIN_STEPS} up.")


def _tried(opened: Opened, live: Live, rates: list[float]) -> RangeTest:
    losses: list[float] = []
    smoothed: list[float] = []
    mean, diverged = 0.0, False
    trained = _losses(opened, live, rates)
    with (
        Interrupts() as signals,
        undisturbed(),
        _put_back(live),
        torch.enable_grad(),
        closing(trained),
    ):
        for number, loss in enumerate(trained, 1):
            if signals.asked == "interrupt":
                signals.forget(signals.num_presses)
                raise Interrupted("the range test was given up, and the session is as it was.")
            if signals.asked or not math.isfinite(loss):
                diverged = not signals.asked
                break
            mean = SMOOTHING * mean + (1.0 - SMOOTHING) * loss
            losses.append(loss)
            smoothed.append(mean / (1.0 - SMOOTHING**number))
            best = min(smoothed)
            if smoothed[-1] > best + (DIVERGED - 1.0) * abs(best):
                diverged = True
                break
    lrs = rates[: len(losses)]
    return RangeTest(tuple(lrs), tuple(losses), tuple(smoothed), suggest(lrs, smoothed), diverged)


def _losses(opened: Opened, live: Live, rates: list[float]) -> Generator[float]:
    """Train a window at each rate, and give its loss."""
    settings, how = live.journal.settings, opened.forward
    # Its scheduler would write rates of its own; as a part it is put back all the same.
    task = replace(opened.task, scheduler=None, scheduler_per=None, ema=None)
    journal = Journal(settings | PLAIN | {"lr": rates[0]}, live.journal.group_lrs)
    journal.scales = live.journal.scales
    order = data.Order(opened.source, opened.seed)
    twin = Live(task, journal, order, opened.source.drop_last, how, opened.arguments["clip_norm"])
    twin.adopt(None if live.scaler is None else live.scaler.state_dict())
    twin.step, twin.epoch, twin.position = live.place
    twin.num_samples, twin.rooms = live.num_samples, dict(live.rooms)
    size, workers = settings["batch_size"], opened.train.num_workers
    loader = data.Loader(opened.source, (opened.seed, "train"), order, size, workers)
    if not task.model.training:
        task.model.train()
    with closing(loader):
        for lr in rates:
            journal.edit(twin.step, twin.progress, "find_lr", lr=lr)
            while (loss := _loss(twin, loader, size, opened.seed)) is None:
                memory.release()
            yield loss


def _loss(twin: Live, loader: data.Loader, size: int, seed: int) -> float | None:
    """Train the next window; None where memory was short: it comes again, in smaller micro-batches."""
    window, num_samples = twin.next_window(), None
    if window is None:
        twin.close_epoch({})
        loader.turn()
        window = twin.next_window()
    assert window is not None
    twin.begin(window)
    loader.start(twin.epoch, twin.position, size, None, twin.room)
    try:
        while not window.is_full:
            given = next(loader)
            num_samples = given[0]
            twin.micro_step(given, seed)
    except RuntimeError as error:
        if not memory.is_shortage(error):
            raise
        twin.give_way(error, num_samples)
        return None
    assert window.loss is not None
    return float(window.loss)


@contextmanager
def _put_back(live: Live) -> Iterator[None]:
    """Be afterwards what was before; where that is cut or fails, the next loop loads the checkpoint."""
    task = live.task
    model, tensors, state = live.take()
    start = parts.Start(task)  # of what no state_dict has, too
    start.mark()
    modes = {module: module.training for module in task.model.modules()}
    live.is_torn = True  # until all is put back, which may be cut or fail
    try:
        yield
    finally:
        with Interrupts(at_once=NEVER):
            parts.put(task, History(), model, tensors, state["trees"])
            start.go_back()
            for module, training in modes.items():
                module.training = training
            live.is_torn = False
