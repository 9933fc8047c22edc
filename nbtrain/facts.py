"""What can be read of a session: where it is, what was seen, and what it has said."""

from __future__ import annotations

from nbtrain.bar import number
from nbtrain.history import History
from nbtrain.journal import Journal
from nbtrain.live import Live
from nbtrain.loop import Loop
from nbtrain.task import Task


class Facts:
    """A session, as it is read; reading changes nothing, from any thread."""

    name: str
    _live: Live
    _loop: Loop

    @property
    def state(self) -> str:
        """One of "ready", "running", "paused", "stopped", "done", "failed"."""
        return self._loop.state

    @property
    def reason(self) -> str:
        """What ended the loop: "budget", "interrupt", "terminate", "stop", "pause", "error"; or "done",
        "early" where it no longer got better."""
        return self._loop.reason

    @property
    def asked(self) -> str:
        """The order that waits for the next boundary: "", "pause", "stop", "save", "set"."""
        return self._loop.asked

    @property
    def task(self) -> Task:
        """Model, optimizer, data and loss."""
        return self._live.task

    @property
    def history(self) -> History:
        """What was seen, step by step."""
        return self._live.history

    @property
    def journal(self) -> Journal:
        """The settings in force and every change of them."""
        return self._live.journal

    @property
    def stage(self) -> int:
        """The number of this stretch in one kernel, from 1."""
        return self._live.stage

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self._live.step

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self._live.epoch

    @property
    def progress(self) -> float:
        """Samples seen, as epochs."""
        return self._live.progress

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained."""
        return self._live.is_done

    @property
    def lr(self) -> float:
        """The learning rate of the next step, first group."""
        return self._live.lr

    @property
    def lines(self) -> list[str]:
        """What the session has said, oldest first; the last some hundred lines."""
        return self._loop.lines.last()

    def __repr__(self) -> str:
        why = f" ({self.reason})" if self.reason not in ("", self.state) else ""
        return (
            f"<session {self.name!r}: {self.state}{why}, stage {self.stage}, "
            f"epoch {self.progress:.2f}, step {self.step}, loss {number(self._live.loss)}>"
        )
