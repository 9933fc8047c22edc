"""A session that trains nothing and says what it is told to, and a pen that draws nothing."""

from __future__ import annotations

import math
from typing import Any

from nbtrain.history import History
from nbtrain.journal import Journal
from nbtrain.plots import Columns, Rows

FIRST: dict[str, Any] = {
    "epochs": 20,
    "warmup_epochs": 5,
    "warmup": "linear",
    "decay": "cosine",
    "milestones": (),
    "gamma": 0.1,
    "batch_size": 32,
    "accumulate": 2,
    "lr": None,
    "base_lr": None,
    "base_batch": None,
}
EVIL = '<script>alert("&")</script>'


class Fake:
    """A session of 20 epochs of 5000 samples, whose facts a test sets and whose orders it counts."""

    def __init__(self, name: str = "cifar", **first: Any) -> None:
        self.name, self.history, self.lines = name, History(), ["cifar: new"]
        self.journal = Journal(FIRST | first, [0.1])
        self.calls: list[Any] = []
        self.error: Exception | None = None
        self.facts: dict[str, Any] = {
            "state": "ready",
            "reason": "",
            "asked": "",
            "own_loop": False,
            "error": "",
            "resumed": "new",
            "stage": 1,
            "step": 0,
            "progress": 0.0,
            "position": 0,
            "num_samples": 5000,
            "loss": math.nan,
            "metric": "valid_loss",
            "direction": "min",
            "lr": 0.001,
            "samples_per_s": 0.0,
            "budget_limit_s": 9 * 3600.0,
            "budget_left_s": 6 * 3600.0,
            "reserve_s": 90.0,
            "saved": [],
            "pending_bytes": 0,
            "store": "folder /drive",
            "recipe": "24 lines",
            "goes_on": "nbtrain.resume('cifar', trust_code=True).run()",
        }

    @property
    def state(self) -> str:
        return str(self.facts["state"])

    def status(self) -> dict[str, Any]:
        settings = self.journal.settings
        own = {"name": self.name, "epochs": settings["epochs"], "settings": dict(settings)}
        return own | {"peak_lr": self.journal.peak_lr} | self.facts

    def runs(self, step: int = 100, **facts: Any) -> None:
        """Be in the middle of training, with a row a step."""
        for count in range(len(self.history) + 1, step + 1):
            row = {"stage": 1, "epoch": 0, "step": count, "progress": count * 64 / 5000, "seconds": 0.0}
            self.history.add(loss=2.0 - count / 200, lr=0.01, **row)
        now = {"state": "running", "step": step, "progress": step * 64 / 5000, "position": step * 64}
        self.facts |= now | {"loss": 1.5, "samples_per_s": 100.0} | facts

    def start(self) -> None:
        self._called("start")

    def pause(self) -> None:
        self._called("pause")

    def save(self) -> None:
        self._called("save")

    def stop(self) -> None:
        self._called("stop")

    def set(self, **changes: Any) -> None:
        self._called(changes)

    def _called(self, what: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(what)


class Pen:
    """Counts the pictures, and keeps what each was asked to show; one takes its time on a clock."""

    def __init__(self) -> None:
        self.clock, self.took_s = Clock(), 0.0
        self.drawn: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def draw(
        self,
        columns: Columns,
        epochs: Rows,
        journal: Journal,
        progress: float,
        typed: Journal | None = None,
    ) -> None:
        if self.error is not None:
            raise self.error
        self.drawn.append({"rows": len(columns["step"]), "progress": progress, "typed": typed})

    def png(self) -> bytes:
        self.clock.now += self.took_s
        return b"picture %d" % len(self.drawn)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now, self.num_reads = 100.0, 0

    def __call__(self) -> float:
        self.num_reads += 1
        return self.now
