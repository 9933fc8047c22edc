"""A trial of Ray Tune, trained in this process by a Tune that is played, and what must be equal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from herds import EPOCHS, build, timeless

import nbtrain
from nbtrain import checkpoint
from nbtrain.population import tuning
from nbtrain.stores import FolderStore


class Tune:
    """What a trial sees of Tune: reports are kept, and after so many of them the trial is stopped."""

    def __init__(self, folder: Path, number: int, found: Path | None, stop_after: int | None) -> None:
        self.reports: list[dict[str, Any]] = []
        self.folders: list[Path] = []
        self._folder, self._number, self._found, self._stop_after = folder, number, found, stop_after
        self.Checkpoint = SimpleNamespace(from_directory=Path)

    def get_context(self) -> Any:
        return SimpleNamespace(get_trial_id=lambda: f"a1b23_{self._number:05d}")

    def get_checkpoint(self) -> Any:
        return None if self._found is None else SimpleNamespace(as_directory=self._as_directory)

    @contextmanager
    def _as_directory(self) -> Iterator[str]:
        yield str(self._found)

    def report(self, metrics: dict[str, Any], *, checkpoint: Path) -> None:
        self.reports.append(metrics)
        self.folders.append(self._folder / str(len(self.folders)))
        shutil.copytree(checkpoint, self.folders[-1])
        if len(self.reports) == self._stop_after:
            raise SystemExit(0)  # as Tune does


def trial(
    folder: Path,
    number: int,
    config: dict[str, Any],
    *,
    found: Path | None = None,
    stop_after: int | None = None,
    build: Callable[..., nbtrain.Task] = build,
    **arguments: Any,
) -> Tune:
    """Train a trial, in this process."""
    tune = Tune(folder, number, found, stop_after)
    given = {"epochs": EPOCHS, "batch_size": 3, "warmup_epochs": 0.5, "device": "cpu"}
    before = tuning.package
    tuning.package = lambda name="ray": tune  # type: ignore[assignment]
    try:
        nbtrain.tune_trainable(build, **(given | arguments))(config)
    except SystemExit:
        assert stop_after is not None
    finally:
        tuning.package = before
    return tune


def bits_of(folder: Path) -> dict[str, Any]:
    """Return all that is in a trial's checkpoint, but for what a clock wrote."""
    _, found = checkpoint.load_newest(checkpoint.find([FolderStore(folder)], "trial"))
    clocks = ("history/steps/seconds", "history/steps/stage")
    told = {f"model.{name}": value for name, value in found.model.items()}
    told |= {name: value for name, value in found.tensors.items() if not name.endswith(clocks)}
    for name in ("place", "loss", "journal", "trees", "options", "logged", "split"):
        told[name] = timeless(found.state[name])
    return told
