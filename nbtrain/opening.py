"""From what the user wrote to what is alive: host, store, clock, recipe, task, data, device.

Everything that can be refused is refused here, in the first seconds and not at hour nine; what is in
the store is compared with what the user wrote before anything is touched.
"""

from __future__ import annotations

import os
import re
import secrets
import time
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from typing import Any

import torch

from nbtrain import (
    checkpoint,
    grades,
    growth,
    host,
    parts,
    randomness,
    recipe,
    schedulers,
    task,
)
from nbtrain.arguments import check, check_name, task_of, traced
from nbtrain.budget import make_budget
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import (
    CheckpointError,
    DataError,
    NbtrainWarning,
    SessionError,
    explain,
)
from nbtrain.forward import Forward, chosen, use_tf32
from nbtrain.journal import SETTINGS, Entry
from nbtrain.judging import Judging
from nbtrain.live import Live
from nbtrain.population import replaying
from nbtrain.reading import Reading, decay_apart
from nbtrain.saving import Saver
from nbtrain.stores import FolderStore, find_store

IMPORTED = secrets.token_hex(8)

_open: weakref.WeakValueDictionary[tuple[str, str], Any] = weakref.WeakValueDictionary()
_newest: weakref.ref[Any] | None = None


class Ground:
    """Where a run stands: its host and clock, its stores, and the recipe of `build`.

    Args:
        levels: Frames of ours above this call, so that a warning points at the user's line.
    """

    def __init__(
        self,
        name: str,
        build: Callable[..., task.Task] | None,
        store: Any,
        budget: str | float | None,
        started_at: float | None,
        device: str | torch.device | None,
        clock: Callable[[], float] | None,
        arguments: dict[str, Any],
        levels: int,
    ) -> None:
        check_name(name)
        check(arguments)
        self.host = host.detect()
        self.clock = clock or host.boot_clock
        self.budget, self.clock_words = make_budget(self.host, budget, started_at, self.clock)
        if clock is None:
            self.budget.working = time.monotonic
        self.store, self.stores = store, stores(store, self.host)
        refuse_second(name, self)  # before `build`, whose random numbers would go into the training
        self.build = build
        self.recipe = None if build is None else recipe.capture(build)
        for problem in self.recipe.problems if self.recipe else ():
            warnings.warn(
                f"A fresh kernel could not rebuild this session: {problem}",
                NbtrainWarning,
                stacklevel=2 + levels,
            )
        self.arguments: dict[str, Any] = {
            k: v.total_seconds() if isinstance(v, timedelta) else list(v) if isinstance(v, tuple) else v
            for k, v in arguments.items()
        }
        self.seed = arguments["seed"]
        if arguments["deterministic"]:
            randomness.deterministic()
        self.device = chosen(device)
        use_tf32(arguments.get("tf32"), self.device)

    @property
    def recipe_source(self) -> str:
        """The recipe as text, empty for a loop of the user's own."""
        return self.recipe.source if self.recipe else ""

    @property
    def recipe_words(self) -> str:
        """Whether a fresh kernel could rebuild the session, in words."""
        if self.recipe is None:
            return "none: a loop of your own goes on by running its cells again"
        if self.recipe.problems:
            return f"incomplete: {self.recipe.problems[0]}"
        return f"{len(self.recipe.source.splitlines())} lines, sha256 {self.recipe.sha256[:12]}"

    def way_on(self, name: str) -> str:
        """Return the line that goes on in a fresh kernel, or "the same cells" where none can."""
        if self.recipe is None or self.recipe.problems:
            return "the same cells"
        given = isinstance(self.store, (str, os.PathLike))
        where = f"store={str(self.store)!r}, " if given else ""
        return f"nbtrain.resume({name!r}, {where}trust_code=True).run()"


class Opened(Ground):
    """What a session was made from, and what that gave."""

    def __init__(
        self,
        name: str,
        build: Callable[[], task.Task] | None,
        fields: dict[str, Any],
        store: Any,
        budget: str | float | None,
        started_at: float | None,
        device: str | torch.device | None,
        clock: Callable[[], float] | None,
        arguments: dict[str, Any],
    ) -> None:
        arguments, fields = decay_apart(arguments, fields, build)
        arguments = arguments | {"replay": replaying.read(arguments["replay"])}
        super().__init__(name, build, store, budget, started_at, device, clock, arguments, levels=3)
        randomness.seed(self.seed, "build")
        self.replay = replaying.of(build, arguments["replay"], self.seed)
        first = self.replay.first if self.replay is not None else {}
        self.task = task_of(self.replay.built if self.replay is not None else build, fields)
        self.forward = Forward.of(arguments, self.device)
        self.forward.prepare(self.task)
        self.judging = how = Judging.of(arguments)
        schedulers.refuse_other_direction(self.task.scheduler, how.metric, how.direction)
        read = Reading(self.task, arguments | first, seed=self.seed, device=self.device)
        if self.replay is not None:
            self.replay.check(self.task, read.journal)
        self.arguments |= read.found
        self.source, self.settings, self.journal = read.source, read.settings, read.journal
        self.order, self.train, self.valid = read.order, read.train, read.valid
        self.valid_batch, self._groups = read.valid_batch, read.group_lrs

    def live(self) -> Live:
        """Return what will be trained, at its start."""
        drop_last, clip_norm = self.source.drop_last, self.arguments["clip_norm"]
        return Live(
            self.task, self.journal, self.order, drop_last, self.forward, clip_norm, self.judging
        )

    def fingerprint(self, live: Live) -> dict[str, Any]:
        """Return what can change a bit here and now, as plain values."""
        return grades.fingerprint(
            self.device,
            self.task.model,
            micro_batch=live.micro_batch,
            num_workers=self.train.num_workers,
            recipe=self.recipe.code_sha256[:12] if self.recipe else "",
            precision=self.forward.precision,
            channels_last=self.forward.channels_last,
        )

    def identity(self, live: Live) -> dict[str, Any]:
        """Return what a later kernel compares itself with, as plain values."""
        return {
            "arguments": self.arguments,
            "entry": self.recipe.entry if self.recipe else None,
            "problems": list(self.recipe.problems) if self.recipe else [],
            "num_samples": len(self.source.dataset),
            "group_lrs": self._groups,
            "seed": self.seed,
            "kernel": kernel(),
            "fingerprint": self.fingerprint(live),
        }

    def find(self, name: str) -> tuple[Saver, Snapshot | None]:
        """Return the session's saver, and its newest whole checkpoint if it has one.

        Raises:
            SessionError: what is stored is a population.
        """
        keep = self.arguments["keep"]
        found = checkpoint.find(self.stores, name)
        if not found:
            return Saver(name, self.stores, keep, self.budget, []), None
        if any("needs" in manifest.facts for manifest in found):
            raise SessionError(f"{name!r} is a population. Give the session another name.")
        newest, snapshot = checkpoint.load_newest(found)
        return Saver(name, self.stores, keep, self.budget, found, newest), snapshot

    def put(self, found: Snapshot, live: Live) -> list[str]:
        """Put what was found back, grade that, and write into its journal what the user changed since.

        Returns:
            In words, what is now other than it was, or than the cell says.

        Raises:
            CheckpointError, DataError: it does not fit what the user wrote; nothing was changed.
        """
        state = found.state
        _same("The seed has changed, and with it all order.", state["seed"], self.seed)
        before = state["arguments"]
        _same("The schedule to replay has changed.", before.get("replay"), self.arguments["replay"])
        length = len(self.source.dataset)
        if state["num_samples"] != length:
            what, there = "The training data have another length.", state["num_samples"]
            raise DataError(explain(what, checkpoint=there, session=length, way_out=parts.MISFIT))
        if self.replay is not None:
            self.replay.adopt(self.task.optimizer, found)
        found, grown = growth.fitted(found, self.task)
        live.put(found)
        # A stage is a stretch in one process, however often its cells are run.
        live.stage += state["kernel"] != kernel()
        notes = growth.note(grown, live.journal, live.step, live.progress, self._groups)
        changes = {
            name: self.settings[name]
            for name in SETTINGS
            if name in self.arguments and self.arguments[name] != before.get(name)
        }
        made = self._regrouped(state["group_lrs"], live, changes)
        made += live.journal.edit(live.step, live.progress, "cell", **changes)
        then = traced(before)
        for name, value in traced(self.arguments).items():
            made += live.journal.note(live.step, live.progress, "cell", name, then[name], value)
        notes += [f"{e.what}: {e.old} -> {e.new}, as the cell says now" for e in made]
        for name, value in live.journal.settings.items():
            if name in self.arguments and value != self.settings[name]:
                opened = self.settings[name]
                notes.append(f"{name}={value} stays, as it was set live; it was opened with {opened}")
        kept = recipe.Recipe(found.recipe, "").code_sha256
        if self.recipe is not None and kept != self.recipe.code_sha256:
            notes.append("the code of build is not what it was; the new one is used")
        # Last: the micro-batch is what the cell has just made it.
        live.grade = grades.compare(state.get("fingerprint"), self.fingerprint(live))
        return notes

    def _regrouped(self, before: list[float], live: Live, changes: dict[str, Any]) -> list[Entry]:
        """Write down that the optimizer's groups are built with other rates than they were.

        Args:
            before: What they were built with.
            live: Has the journal.
            changes: Of settings; added to where the first group's rate is another.
        """
        here, journal = self._groups, live.journal
        if here == before or journal.scheduler or len(here) != len(before):
            return []
        made = []
        if not schedulers.is_scaled(before, here):
            made = journal.rebase(live.step, live.progress, "cell", here)
        if here[0] != before[0] or not journal.writes_rates:
            changes["lr"] = here[0]
        return made

    def refuse_length(self, live: Live) -> None:
        """Refuse a scheduler that ends before the run does.

        Raises:
            TaskError: says both numbers.
        """
        scheduler, settings = self.task.scheduler, live.journal.settings
        if scheduler is None or settings["epochs"] is None:
            return
        num_left = settings["epochs"] - live.epoch
        if schedulers.per(scheduler, self.task.scheduler_per) == "step":
            num_left = self.order.num_windows(live.epoch, live.position, settings)
        schedulers.refuse_length(scheduler, num_left, is_resumed=live.step > 0, levels=3)

    def close(self) -> None:
        """End the workers."""
        self.train.close()
        if self.valid is not None:
            self.valid.close()


def kernel() -> str:
    """Return what tells this process from any other, also from one that it was forked from."""
    return f"{IMPORTED}-{os.getpid()}"


def stores(store: Any, here: host.Host) -> list[Any]:
    """Return the place to commit to and, if the store is a remote one, the store behind it."""
    found = find_store(store, here)
    if not found.is_remote:
        return [found]
    words_of = re.sub(r"[^A-Za-z0-9]+", "-", found.place).strip("-")[-60:]
    place = f"{words_of}-{sha256(found.place.encode()).hexdigest()[:12]}"
    return [FolderStore(here.scratch / place), found]


def retire(name: str, opened: Ground) -> None:
    """Let an older session of this name in this kernel save what it has, and end its workers.

    Raises:
        SessionError: it trains right now.
    """
    before = refuse_second(name, opened)
    if before is not None:
        before.leave()
        before.close()


def refuse_second(name: str, opened: Ground) -> Any:
    """Return the older session of this name in this kernel, or None.

    Raises:
        SessionError: it trains right now.
    """
    before = _open.get((opened.stores[-1].place, name))
    if before is not None and before.runs_elsewhere:
        raise SessionError(
            f"{name!r} is training in this kernel already. "
            "Stop it first, or give this one another name."
        )
    return before


def refuse_while_training(what: str) -> None:
    """Refuse what would draw from the generators that a training run uses.

    Raises:
        SessionError: something trains in this kernel.
    """
    for (_, name), loop in list(_open.items()):
        if loop.state == "running":
            raise SessionError(
                f"{name!r} is training in this kernel, and {what} would disturb its random numbers. "
                "Pause it first, session.pause()."
            )


def refuse_beside(loop: Any) -> None:
    """Refuse to train while another thread does: both draw from the generators of the process.

    Raises:
        SessionError: says which trains.
    """
    for (_, name), other in list(_open.items()):
        if other is not loop:
            other.await_end()
            if other.runs_elsewhere:
                raise SessionError(
                    f"{name!r} is training in this kernel, and a second training beside it would "
                    "disturb the random numbers of both. Wait for it, or stop it first."
                )


def register(name: str, opened: Ground, loop: Any) -> None:
    """Let this be the loop of its session in this kernel."""
    _open[opened.stores[-1].place, name] = loop


def remember(made: Any) -> None:
    """Let this session or population be the newest of this kernel."""
    global _newest
    _newest = weakref.ref(made)


def newest() -> Any:
    """Return the session or population that was made last in this kernel, if it is alive."""
    return _newest() if _newest is not None else None


def claim(name: str, opened: Ground, loop: Any) -> None:
    """Refuse to train with a session that a newer one of its name has replaced.

    Raises:
        SessionError: there is a newer one, or another thread trains this one.
    """
    if loop.runs_elsewhere:
        raise SessionError(f"{name!r} is training already. Stop it first.")
    if _open.get((opened.stores[-1].place, name)) is not loop:
        raise SessionError(f"A newer session {name!r} was made in this kernel. Use that one.")


def _same(what: str, there: object, here: object) -> None:
    if there != here:
        raise CheckpointError(explain(what, checkpoint=there, session=here, way_out=parts.MISFIT))
