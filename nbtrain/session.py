"""The story of a run: open, train, save, close; and go on in the next kernel.

A session is what is alive (`live`), made from what the user wrote (`opening`) and trained by a loop
(`loop`); here is what a user says to it. Your own loop and `run()` are the same: `run` is four lines
on `for batch in session`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing
from typing import Any

import torch
from torch import Tensor

from nbtrain import (
    auditing,
    finding,
    growth,
    host,
    opening,
    parts,
    rehearsal,
    status,
    waiting,
)
from nbtrain.arguments import ARGUMENTS
from nbtrain.auditing import Audit
from nbtrain.budget import seconds
from nbtrain.data import Epoch
from nbtrain.errors import SessionError
from nbtrain.facts import Facts
from nbtrain.finding import RangeTest
from nbtrain.loop import Loop
from nbtrain.naming import as_logged, check_names, shown
from nbtrain.opening import Opened
from nbtrain.rehearsal import Rehearsal
from nbtrain.task import Task


class Session(Facts):
    """A training run that goes on where it was, in this kernel or the next.

    Give `build`, a function without required arguments that returns a `Task`; or the fields of a
    `Task` (model=, optimizer=, train=, ...) for a loop of your own. If the store holds a session of
    this name it is continued; nothing is ever restarted silently. A setting that differs from the
    checkpoint's is a change, made from here on and written into the journal.

    Args:
        name: Letters, digits, ".", "_", "-".
        build: Returns the Task; called under a random key of its own, so first weights repeat.
        store: A folder, a URL, a Store; None finds Kaggle's output, Drive, or a local folder.
        budget: "9h", "8h30m", seconds, or None, counted from the start of the machine; "auto" is the
            host's limit less what it needs itself, or 9 h where there is none.
        started_at: The machine's start in `time.time()` seconds, where the host is wrong about it.
        epochs: Length of the run; None has no end but the budget's.
        batch_size: Samples in a micro-batch; None takes the DataLoader's, or 32.
        accumulate: Micro-batches in a step.
        num_workers: Processes that fetch; None takes the DataLoader's, or one a core, at most 4.
        seed: Of everything random.
        warmup_epochs, warmup, decay, milestones, gamma, warmup_from, power, floor, period, multiplier:
            See `Schedule`. In a loop of your own, decay may be a function: see `Task`.
        plateau_patience: Validations without a better `metric` that decay "plateau" waits for; None
            is 10.
        base_lr, base_batch: Linear scaling: the rate, and the batch it was for.
        clip_norm: Largest norm of a step's gradient; None does not clip.
        precision: "fp32"; "bf16" or "fp16", of the forward pass; "mixed" is the one that the device is
            fast at. A loop of your own enters it by `with session.autocast():`.
        channels_last: Whether images and convolutions lie channels last, often faster with 16 bits.
        compile: Whether the model is compiled, each shape for itself (dynamic=False); or a dict of the
            arguments of `torch.compile`. A mode that tunes by time may differ in last bits each time.
        tf32: Whether a GPU may round float32 products to TF32; None leaves torch's switches.
        device: None is the GPU if there is one.
        deterministic: Whether an operation whose bits may vary on one machine raises, where torch
            has no other form of it; on a GPU slower. False leaves torch's switches as they are.
        metric, direction: Which is the best: a metric of the task, "valid_loss", or what `log` is told;
            "max" or "min", None is "min" for a name that ends in loss or error.
        patience: Validations without a better one that end the run early; None never does.
        validate_every: "1 epoch", "500 steps"; None never. The last epoch's end always has one.
        keep: Checkpoints to keep besides the best, at least 2.
        save_every: Longest time between two saves, besides those at the end of each epoch.
        replay: A schedule of hyperparameters to follow, as `Population.schedule` is one.
        bar: Whether `run` shows how far it is: in a notebook the panel, elsewhere a line.
        clock: Monotonic seconds; for tests.
        **task: The fields of a `Task`, instead of `build`.

    Raises:
        ValueError: an argument makes no sense.
        BudgetError: the time is over already.
        TaskError, DataError, RecipeError: what `build` gives or needs cannot be used.
        CheckpointError: what is stored does not fit, or no checkpoint of it is whole.
        StoreError: the place cannot be reached.
    """

    def __init__(
        self,
        name: str,
        build: Callable[..., Task] | None = None,
        *,
        store: Any = None,
        budget: str | float | None = "auto",
        started_at: float | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        accumulate: int = 1,
        num_workers: int | None = None,
        seed: int = 0,
        warmup_epochs: float = 0,
        warmup: str = "linear",
        decay: str | Callable[[float], float] = "constant",
        milestones: tuple[float, ...] = (),
        gamma: float = 0.1,
        warmup_from: float | None = None,
        power: float | None = None,
        floor: float | None = None,
        period: float | None = None,
        multiplier: float | None = None,
        plateau_patience: int | None = None,
        base_lr: float | None = None,
        base_batch: int | None = None,
        clip_norm: float | None = None,
        precision: str = "fp32",
        channels_last: bool = False,
        compile: bool | dict[str, Any] = False,
        tf32: bool | None = None,
        device: str | torch.device | None = None,
        deterministic: bool = False,
        metric: str = "valid_loss",
        direction: str | None = None,
        patience: int | None = None,
        validate_every: str | None = "1 epoch",
        keep: int = 3,
        save_every: str | float = "5m",
        replay: Any = None,
        bar: bool = True,
        clock: Callable[[], float] | None = None,
        **task: Any,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k in ARGUMENTS}
        opened = Opened(name, build, task, store, budget, started_at, device, clock, arguments)
        self.name, self.budget = name, opened.budget
        self._opened, self._shows = opened, bar
        self._enter(seconds(save_every) or math.inf)

    def _enter(self, save_every_s: float) -> None:
        """Be where the newest checkpoint is, and be known to the kernel."""
        # First, because a loop that an error left behind saves now, and that is where to go on from.
        opening.retire(self.name, self._opened)
        self._live = self._opened.live()
        self._loop = Loop(self.name, self._opened, self._live, save_every_s, self._shows)
        self._opened.refuse_length(self._live)
        opening.register(self.name, self._opened, self._loop)
        self._face: Any = None
        opening.remember(self)

    # ---- training

    def run(self) -> Session:
        """Train until all epochs are done, the budget ends, or somebody says stop; then return.

        Whatever ends it, the state is saved first, and `run` again goes on from there. In a notebook
        the panel is shown, and acts while the cell runs; a pause only holds the training there, until
        Resume, Stop or a second interrupt.

        Raises:
            LossError: the loss is not finite; the last good checkpoint is loaded again.
            DataError: the data set raised; the state before that window is saved.
            StoreError: the last save failed; the state is still here, and `save()` tries again.
            torch.OutOfMemoryError: there is no room for a single sample; short of that the window is
                done again in smaller micro-batches, and `session.lines` and the journal say so.
            KeyboardInterrupt: it was interrupted; everything is saved.
        """
        return self.start().wait()

    def start(self) -> Session:
        """Train in a thread of its own, and return at once: the kernel is free for other cells.

        Its bits are those of `run` as long as other cells draw nothing at random. What it raises is
        raised by `wait`. A kernel that ends meanwhile saves first.

        Raises:
            SessionError: it or another is training already, or a newer one of its name was made.
            TaskError, ValueError: `metric`, `patience` or a plateau wait for what no validation gives.
        """
        self._live.refuse_blind()
        self._loop.start(self._train)
        return self

    def wait(self) -> Session:
        """Wait for a started run to end, showing it as `run` does; raises what `run` raises."""
        shows = self._shows and host.is_notebook()
        watched = shows and not self._opened.host.is_batch
        try:
            show = (lambda: self._faced().show(panel=watched)) if shows else None
            waiting.wait(self._loop, watched=watched, show=show)
        finally:
            if self._face is not None:
                self._face.settle()
        return self

    def _train(self) -> None:
        with closing(iter(self)) as batches:
            for batch in batches:
                try:
                    with self.autocast():
                        loss, n, output = self.task.run(batch)
                    self.update(loss, n=n, **self.task.named(output))
                except Exception as error:
                    if not self._loop.gives_way(error):
                        raise

    def __iter__(self) -> Generator[Any]:
        """Give batches on the device, from where the session is, until it ends."""
        with closing(self.epochs()) as epochs:
            for epoch in epochs:
                yield from epoch

    def epochs(self) -> Generator[Epoch]:
        """Give the rest of this epoch, then the next ones; each gives batches.

        The epoch is closed when its body is done: with validation if there are validation data,
        with what `log` was told, and with a checkpoint.
        """
        return self._loop.epochs()

    def update(self, loss: Tensor, n: float | None = None, **named: Any) -> None:
        """Do backward; and at the end of the window clip, set the rates, step, and count.

        Args:
            loss: The micro-batch's mean loss, shape ().
            n: What it is the mean of: samples, tokens; the batch's samples if None.
            **named: Other means over these, such as kl=...: into the history, averaged over the window
                there, and at the epoch's end over the epoch, as train_kl.

        Raises:
            SessionError: there is no batch that waits for its loss.
            ValueError: the loss has no gradient, is no scalar, or n is not above 0.
            TaskError: all parameters are frozen; or what is named is no number, or its name is taken.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            if isinstance(loss, Tensor):
                self.task.refuse_frozen()
            raise ValueError(
                f"loss={shown(loss)} is no scalar with a gradient. "
                "Give the mean over the batch, not detached and not .item()."
            )
        if n is not None and not n > 0:
            raise ValueError(f"n={n!r} must be above 0: what the loss is the mean of.")
        check_names(named)
        self._loop.update(loss.squeeze(), n, named)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute a batch's forward pass and loss in this: it enters the session's precision.

        Not `update`, and nothing else: `with session.autocast(): loss = criterion(model(x), y)`.
        With "fp32" it does nothing.
        """
        return self._loop.autocast()

    def log(self, **metrics: float) -> None:
        """Write metrics of your own into the history, at the end of this epoch.

        Raises:
            TaskError: one is no number, or has a name that is taken; none of them is written.
        """
        self._live.logged |= as_logged(metrics)

    # ---- orders, from this thread or another

    def set(self, **changes: Any) -> None:
        """Change accumulate=, batch_size=, warmup_epochs=, lr=, ... from the next window on.

        `lr` is the peak: the rate where the schedule's factor is 1. Every change goes into the
        journal. `budget=` is changed at once.

        Raises:
            ValueError: a value makes no sense; nothing is changed.
        """
        settings = {name: value for name, value in changes.items() if name != "budget"}
        self.journal.tried(**settings)
        if "batch_size" in settings:
            self._opened.order.refuse(settings["batch_size"])
        if "budget" in changes:
            self.budget.limit_s = seconds(changes["budget"])
        self._loop.set(settings)

    def pause(self) -> None:
        """Save and hold at the next boundary, keeping the workers; `run` or `start` goes on."""
        self._loop.halt("pause")

    def stop(self) -> None:
        """Save and end the loop at the next boundary; `run` goes on."""
        self._loop.halt("stop")

    def save(self) -> None:
        """Commit a checkpoint now; inside a window, of the window's start.

        From another thread than the loop's this is an order, done at the next boundary.

        Raises:
            StoreError: the place refused; every checkpoint before is intact.
        """
        self._loop.save()

    def rehearse(self, within: str | float | None = "10m") -> Rehearsal:
        """Resume in a fresh process from the recipe, train one window there, and compare the bits.

        What is not saved yet is saved first; else neither the store nor the session changes. Your
        `build` runs there and one window here too: what your code keeps outside model, optimizer and
        parts is not put back.

        Raises:
            SessionError: it is training; pause it first.
            LossError, StoreError: it had to be saved first, and could not be.
        """
        self._loop.await_end()
        return rehearsal.rehearse(self.name, self._opened, self._loop, seconds(within))

    def find_lr(self, low: float = 1e-6, high: float = 1.0, steps: int = 100) -> RangeTest:
        """Train over rates that rise from low to high, put everything back, and tell the losses.

        The session is to the bit what it was, and its next run too. It stops early where the loss
        diverges.

        Raises:
            ValueError: low, high or steps make no sense.
            SessionError: something trains in this kernel, or only your own loop knows the loss.
        """
        self._loop.await_end()
        return finding.find(self.name, self._opened, self._loop, low=low, high=high, steps=steps)

    # ---- reading

    def audit(self, steps: int = 4) -> Audit:
        """Audit this session's `build` with its settings, as `nbtrain.audit` does; it stays as it is.

        Raises:
            SessionError: it is training, or was made without `build`.
        """
        self._loop.await_end()
        return auditing.audit_session(self.name, self._opened, self.journal.settings, steps)

    def best(self) -> torch.nn.Module:
        """Return a copy of the model with the best weights by `metric`, in eval mode; of its EMA if
        the task has one, for that is what is validated.

        The session's own model is left as it is, so training can go on.

        Raises:
            SessionError: there was no validation yet.
        """
        saver = self._loop.keeping.saver
        saver.wait(copies=False)
        manifest = saver.best()
        if manifest is None or manifest.facts.get("grown", 0) != growth.count(self.journal):
            raise SessionError(
                "There is no best yet: no epoch with validation was saved. "
                f"Give valid=, or session.log({self._live.judging.metric}=...)."
            )
        found = saver.load_best(manifest)
        return parts.model_of(self.task, found.model, found.tensors, found.state["trees"]).eval()

    def status(self) -> dict[str, Any]:
        """Return what is known now, as plain values; times in seconds."""
        return status.of(self, self._opened, self._loop)

    def panel(self) -> None:
        """Show the panel in this cell: live curves, and every control; shown again it is the same one.

        Raises:
            SessionError: this is no notebook.
        """
        if not host.is_notebook():
            raise SessionError("A panel needs a notebook. Here there are status(), plot() and set().")
        self._loop.is_watched = not self._opened.host.is_batch
        self._faced().show(panel=True)

    def plot(self, compare: Iterable[Session] = ()) -> Any:
        """Return a matplotlib Figure: loss and learning rate, past and, dotted, planned.

        With `compare=[...]` other sessions are laid over this one.
        """
        from nbtrain import plots

        if others := list(compare):
            return plots.compared([plots.told(session) for session in (self, *others)])
        return plots.curves(self.name, list(self.history), self.journal, self.progress)

    def _faced(self) -> Any:
        if self._face is None:
            from nbtrain.face import Face

            self._face = Face(self)
        return self._face
