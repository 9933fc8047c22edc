"""Population based training that survives its notebook: open, train, stop, go on.

A population is a few members that train in turn, and after each round the worst go on from copies of
the best. What a user says to it is here; the loop is `rounds`, what a round is follows from `table` and
`evolution`, and a member's part in it is `member`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nbtrain import data, host, opening, waiting
from nbtrain.arguments import ARGUMENTS as OF_SESSION
from nbtrain.arguments import shared
from nbtrain.bar import number
from nbtrain.budget import seconds
from nbtrain.errors import NbtrainWarning, SessionError
from nbtrain.opening import Ground
from nbtrain.population import ancestry, engines, founding, standing
from nbtrain.population import space as spaces
from nbtrain.population.ancestry import Schedule
from nbtrain.population.making import Maker
from nbtrain.population.standing import Standing
from nbtrain.population.table import Row
from nbtrain.reading import DEFAULT_BATCH
from nbtrain.session import Session
from nbtrain.task import Task
from nbtrain.validation import validate

ARGUMENTS = (
    *founding.FROZEN,
    *("engine", "resources"),
    *(name for name in OF_SESSION if name not in (*founding.FROZEN, "keep")),
)


class Population:
    """Members that train in turn; after each round the worst go on from copies of the best.

    All of it is a function of the arguments and the seed: killed at any moment and resumed, it ends in
    the bits of a run that was never cut. If the store holds a population of this name it is continued.

    Every member's task is built by `build`; let a large data set be read once, outside of it or in a
    cached function, and not once for each member.

    Args:
        name: Letters, digits, ".", "_", "-".
        build: Returns the Task, with validation data; takes hyperparameters by name.
        members: How many, at least 2.
        interval: Training between two validations: "4 epochs", "500 steps", or a number of epochs.
        space: By name, where a hyperparameter is drawn from: uniform(), loguniform(), randint(), or a
            list. A name is an argument of build, or a setting such as lr or batch_size.
        metric: What members are judged by: a metric of the task, or "valid_loss".
        direction: "max" or "min"; None is "min" for a name that ends in loss or error, else "max".
        quantile: The part that is replaced after each round, at most 0.5.
        mode: "pbt"; "random": nobody is replaced; "halving": the worst end, and cost no more.
        factors: What a value is multiplied by when a copy explores.
        resample: How likely a value is drawn anew instead.
        epochs: Length of each member's run; None has no end but the budget's.
        store, budget, started_at, device, deterministic, num_workers, clock: As for `Session`.
        batch_size, accumulate, warmup_epochs, warmup, decay, milestones, gamma, clip_norm: As for
            `Session`, for all members; what is in the space goes before.
        seed: Of everything random.
        save_every: Longest time between two saves inside a slice, besides those at its end.
        engine: Where members train: "local", here in turn; "ray", as many at once as a Ray cluster has
            room for, to the same bits on the same kind of device. It computes with as many threads
            as here: with several workers on one machine, `torch.set_num_threads(1)` is the faster.
        resources: For "ray": Ray's options for each worker, such as {"num_cpus": 2, "num_gpus": 0.25};
            None is 1 CPU, and 1 GPU where the cluster has some. What shares a GPU must fit on it.
        bar: Whether `run` shows how far it is: in a notebook the panel, elsewhere a line.
        **options: precision, channels_last, compile, tf32, and what else `Schedule` takes.

    Raises:
        ValueError: an argument makes no sense.
        BudgetError: the time is over already.
        TaskError, DataError, RecipeError: what `build` gives or needs cannot be used.
        CheckpointError: what is stored is another population, or no part of it is whole.
        SessionError: what is stored is a session; or this population trains already.
        StoreError: the place cannot be reached.
        ModuleNotFoundError: Ray is asked for, and not installed.
    """

    _face: Any = None

    def __init__(
        self,
        name: str,
        build: Callable[..., Task],
        *,
        members: int,
        interval: str | float,
        space: Mapping[str, Any],
        metric: str = "valid_loss",
        direction: str | None = None,
        quantile: float = 0.25,
        mode: str = "pbt",
        factors: tuple[float, ...] = (0.8, 1.2),
        resample: float = 0.25,
        epochs: int | None = None,
        store: Any = None,
        budget: str | float | None = "auto",
        started_at: float | None = None,
        batch_size: int | None = None,
        accumulate: int = 1,
        num_workers: int | None = None,
        seed: int = 0,
        warmup_epochs: float = 0,
        warmup: str = "linear",
        decay: str = "constant",
        milestones: tuple[float, ...] = (),
        gamma: float = 0.1,
        clip_norm: float | None = None,
        device: str | torch.device | None = None,
        deterministic: bool = False,
        save_every: str | float = "5m",
        engine: str = "local",
        resources: Mapping[str, Any] | None = None,
        bar: bool = True,
        clock: Callable[[], float] | None = None,
        **options: Any,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k in ARGUMENTS} | shared(options)
        evolution = founding.evolution(arguments)
        self._ground = Ground(name, build, store, budget, started_at, device, clock, arguments, 2)
        self.name, self._shows, self.budget = name, bar, self._ground.budget
        self._maker = Maker(build, evolution.space, arguments, self._ground.device, self._ground.recipe)
        # First, because one that is paused saves now, and that is where to go on from.
        opening.retire(name, self._ground)
        found = founding.found(name, self._ground, self._maker, evolution)
        made = engines.chosen(engine, arguments["resources"], device)
        every_s = seconds(save_every) or math.inf
        self._rounds = made(name, self._ground, self._maker, found, every_s, bar)
        opening.register(name, self._ground, self._rounds)
        opening.remember(self)

    @classmethod
    def reopened(
        cls, name: str, build: Callable[..., Task], arguments: Mapping[str, Any], **changes: Any
    ) -> Population:
        """Open a stored population with the arguments that were stored with it."""
        stored = {k: v for k, v in arguments.items() if k in ARGUMENTS}
        stored["space"] = spaces.from_plain(stored["space"])
        if changes.get("engine") == "local":
            stored["resources"] = None  # they were for Ray's workers
        return cls(name, build, **(stored | changes))

    # ---- training

    def run(self) -> Population:
        """Train until all epochs are done, the budget ends, or somebody says stop; then return.

        Whatever ends it, the state is saved first, and `run` again goes on from there. In a notebook
        the panel is shown, and acts while the cell runs; a pause only holds the training there, until
        Resume, Stop or a second interrupt.

        Raises:
            DataError: the data set raised; the state before that window is saved.
            StoreError: the last save failed; the state is still here, and `run` again saves it.
            KeyboardInterrupt: it was interrupted; everything is saved.
            Exception: what the first member raised, where all of them have failed; nothing is lost,
                and `run` tries that round again.
        """
        return self.start().wait()

    def start(self) -> Population:
        """Train in a thread of its own, and return at once; what it raises is raised by `wait`.

        Raises:
            SessionError: it is training already, or a newer population of this name was made.
        """
        self._rounds.start(self._train)
        return self

    def wait(self) -> Population:
        """Wait for a started run to end, showing it as `run` does; raises what `run` raises."""
        shows = self._shows and host.is_notebook()
        watched = shows and not self._ground.host.is_batch
        try:
            show = (lambda: self._faced().show(panel=watched)) if shows else None
            waiting.wait(self._rounds, watched=watched, show=show)
        finally:
            if self._face is not None:
                self._face.settle()
        return self

    def _train(self) -> None:  # of this object, which lives as long as it trains
        self._rounds.train()

    def pause(self) -> None:
        """Save and hold at the next boundary, also inside a slice; `run` or `start` goes on."""
        self._rounds.halt("pause")

    def stop(self) -> None:
        """Save and end at the next boundary, also inside a slice; `run` goes on."""
        self._rounds.halt("stop")

    # ---- reading

    @property
    def state(self) -> str:
        """One of "ready", "running", "paused", "stopped", "done", "failed"."""
        return self._rounds.state

    @property
    def reason(self) -> str:
        """What ended the loop: "budget", "interrupt", "terminate", "stop", "pause", "error"."""
        return self._rounds.reason

    @property
    def asked(self) -> str:
        """The order that waits for the next boundary: "", "pause", "stop"."""
        return self._rounds.asked

    @property
    def is_done(self) -> bool:
        """Whether every member has reached the end."""
        return self._rounds.is_done

    @property
    def members(self) -> list[Standing]:
        """The members, in the order of their numbers."""
        return [Standing(self._rounds, member) for member in self._rounds.members]

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict for each slice that is over; `pandas.DataFrame(population.history)` is a table."""
        return [
            {
                "round": row.round + 1,  # as in all that is said: the first is 1
                "member": row.member,
                "source": row.source,
                "progress": row.progress,
                "step": row.step,
                "score": row.score,
                **row.hyperparameters,
                **row.metrics,
                "error": row.error,
            }
            for row in self.rows
        ]

    @property
    def rows(self) -> list[Row]:
        """The slices that are over, as they are kept; `history` has them as dicts."""
        return list(self._rounds.table.rows)

    @property
    def best_row(self) -> Row | None:
        """The slice that the best state ended, if one is over."""
        return self._rounds.now_best

    @property
    def schedule(self) -> Schedule:
        """What the best state was trained with, from its first slice on: (progress, hyperparameters).

        Progress is in epochs; each entry is in force until the next one. It is plain JSON, and what
        `replay` and `Session(replay=)` take; empty before the first slice is over.
        """
        return ancestry.schedule(self.best_row, ancestry.by_key(self.rows))

    @property
    def lines(self) -> list[str]:
        """What the population has said, oldest first; the last some hundred lines."""
        return self._rounds.lines.last()

    def best(self) -> torch.nn.Module:
        """Return a copy of the best member's model, in eval mode: the highest of the scores now.

        It is that of the newest states, not of all that ever were: the best score of many rounds
        would be the luckiest one too.

        Raises:
            SessionError: no member has ended its first slice; or it is training.
        """
        return self._rounds.model(self._rounds.best()).eval()

    def replay(self, name: str, **changes: Any) -> Session:
        """Return a session that trains one model from its start with the schedule of the best state.

        It follows the hyperparameters of that lineage, each from its place on, and writes them into its
        journal; its order, augmentation and first weights are its own, so its weights are not the
        population's. `session.plot(compare=[...])` lays several over each other.

        Settings (batch_size, accumulate, ...) and what `build` takes for its optimizer (lr, momentum,
        weight_decay, ...) are replayed; what shapes the model never changed. A hyperparameter that
        changed and acts elsewhere, such as dropout, is refused.

        Args:
            name: Of the session.
            **changes: Arguments of `Session` that shall differ, such as epochs= or replay=.

        Raises:
            SessionError: there is no best yet, or a hyperparameter cannot be replayed.
        """
        self._rounds.best()
        ground = self._ground
        same = {k: v for k, v in ground.arguments.items() if k in OF_SESSION and k != "keep"}
        own = {
            "store": ground.store,
            "device": ground.device,
            "clock": ground.clock,
            "bar": self._shows,
        }
        given = same | own | {"replay": self.schedule} | changes
        return Session(name, self._maker.build, **given)

    def test(self, dataset: Any) -> dict[str, float]:
        """Return what the best model's validation would give on other data, once, at the end.

        That it was done is kept with the population: whoever chooses by a test set has none left.

        Args:
            dataset: A data set or DataLoader as the task's `valid`.

        Raises:
            SessionError: it is training, a newer one of this name was made, or there is no best yet.
        """
        rounds, ground = self._rounds, self._ground
        opening.claim(self.name, ground, rounds)  # it is written down, and states are read
        row = rounds.best()
        tests = rounds.founded.tests
        if tests:
            warnings.warn(
                f"The test set was used before, {len(tests)} times: what is chosen by it now has "
                "none left that is new to it.",
                NbtrainWarning,
                stacklevel=2,
            )
        task = self._maker.built(row.hyperparameters)
        task.model, task.ema = rounds.storing.model(row), None
        source = data.source(dataset, "test", shuffle=False, collate=task.collate)
        source.drop_last = False
        size = source.batch_size or ground.arguments["batch_size"] or DEFAULT_BATCH
        order = data.Order(source, ground.seed)
        loader = data.Loader(source, (ground.seed, "test"), order, size, 0)
        seed, forward = ground.seed, self._maker.forward
        found = validate(task, loader, size, seed=seed, forward=forward, proceed=lambda: True)
        metrics = {name.replace("valid_", "test_"): value for name, value in (found or {}).items()}
        tests.append({"round": row.round + 1, "member": row.member, **metrics})
        rounds.storing.note()
        return metrics

    def status(self) -> dict[str, Any]:
        """Return what is known now, as plain values; times in seconds."""
        return standing.of(self.name, self._rounds, self._ground)

    def panel(self) -> None:
        """Show the panel in this cell: members, live picture, controls; shown again it is the same one.

        Raises:
            SessionError: this is no notebook.
        """
        if not host.is_notebook():
            raise SessionError("A panel needs a notebook. Here there are status() and plot().")
        self._faced().show(panel=True)

    def plot(self, what: str = "scores") -> Any:
        """Return a matplotlib Figure.

        Args:
            what: "scores": those of all members and their hyperparameters, over progress;
                "lineage": who went on from whose state.

        Raises:
            ValueError: it is neither.
        """
        rows, best, evolution = self.rows, self.best_row, self._rounds.table.evolution
        if what == "lineage":
            from nbtrain.population import genealogy

            return genealogy.picture(self.name, evolution, rows, best)
        if what != "scores":
            raise ValueError(f'plot({what!r}) is not known. There are "scores" and "lineage".')
        from nbtrain.population import portrait

        metric, epochs = (self._ground.arguments[name] for name in ("metric", "epochs"))
        return portrait.picture(self.name, evolution, metric, epochs, rows, best)

    def _faced(self) -> Any:
        if self._face is None:
            from nbtrain.face.herd import Herd

            self._face = Herd(self, self._rounds.table.evolution)
        return self._face

    def __repr__(self) -> str:
        why = f" ({self.reason})" if self.reason not in ("", self.state) else ""
        best = self._rounds.now_best
        score = "no best yet" if best is None or best.score is None else f"best {number(best.score)}"
        return (
            f"<population {self.name!r}: {self.state}{why}, {len(self._rounds.members)} members, "
            f"round {self._rounds.now_round + (not self.is_done)}, {score}>"
        )
