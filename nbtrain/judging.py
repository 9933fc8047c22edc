"""By what a run is judged: which metric, which way, how often, and for how long without getting better.

Nothing of it is counted or kept: that a validation is due follows from the step, and that a run has
stopped getting better from the rows of its history. So a resumed run ends where the uncut one does, and
another patience holds for what was seen before it too.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbtrain.errors import TaskError

LOSS = "valid_loss"
UNITS = ("epochs", "steps")


@dataclass(frozen=True)
class Judging:
    """How a run is judged.

    Args:
        metric: One of the validation's, or of what is logged.
        direction: "max" or "min".
        patience: How many validations without a better one end the run; None never ends it.
        every: Between two validations, so many epochs or steps; None validates never.
    """

    metric: str = LOSS
    direction: str = "min"
    patience: int | None = None
    every: tuple[int, str] | None = (1, "epochs")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Judging:
        """Return what the user's arguments mean.

        Raises:
            ValueError: one of them makes no sense.
        """
        metric, patience = arguments.get("metric", LOSS), arguments.get("patience")
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"metric={metric!r} must be a name, such as {LOSS!r}.")
        direction = direction_of(metric, arguments.get("direction"))
        if patience is not None and (type(patience) is not int or patience < 1):
            raise ValueError(f"patience={patience!r} must be a whole number from 1 up, or None.")
        every = arguments.get("validate_every", "1 epoch")
        return cls(metric, direction, patience, None if every is None else _every(every))

    def is_due(self, step: int, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Whether a validation comes inside an epoch, before the next window.

        Args:
            step: Optimizer updates done.
            rows: The history's validations, and its epochs' ends.
        """
        if self.every is None or self.every[1] != "steps" or not step or step % self.every[0]:
            return False
        return not any(row["step"] == step for row in reversed(list(rows)[-2:]))

    def is_due_at_end(self, step: int, num_epochs: int, epochs: int | None) -> bool:
        """Whether a validation comes at an epoch's end; it always does at the last one's.

        Args:
            step: Optimizer updates done.
            num_epochs: Epochs done, with this one.
            epochs: Of the whole run, or None.
        """
        if self.every is None:
            return False
        amount, unit = self.every
        return (step if unit == "steps" else num_epochs) % amount == 0 or num_epochs == epochs

    def score(self, written: Mapping[str, Any]) -> float | None:
        """Return what a validation is judged by; None where it has none, or it is not finite."""
        value = written.get(self.metric)
        return float(value) if value is not None and math.isfinite(value) else None

    def is_over(self, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the last validations were all no better than one before them."""
        if self.patience is None:
            return False
        best, since, sign = math.inf, 0, 1 if self.direction == "min" else -1
        for row in rows:
            if row.get(self.metric) is None:
                continue
            score = self.score(row)
            is_better = score is not None and sign * score < best
            best, since = (sign * score, 0) if score is not None and is_better else (best, since + 1)
        return since >= self.patience

    def verdict(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Say what has ended a run early."""
        values = [row[self.metric] for row in rows if row.get(self.metric) is not None]
        num_spoilt = sum(not math.isfinite(value) for value in values[-(self.patience or 0) :])
        odd = f", {num_spoilt} of them not finite" if num_spoilt else ""
        count = "a validation" if self.patience == 1 else f"{self.patience} validations"
        return f"{self.metric} has not got better in {count}{odd}"

    def refuse_unknown(self, metrics: Iterable[str]) -> None:
        """Refuse a metric that no validation will give, before any training.

        Args:
            metrics: Names of the task's metrics; one that keeps count may give several by its name.

        Raises:
            TaskError: says which there are.
        """
        known = [LOSS, *metrics]
        if not any(self.metric == name or self.metric.startswith(f"{name}_") for name in known):
            near = difflib.get_close_matches(self.metric, known, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise TaskError(
                f"metric={self.metric!r} is not among what the validation gives: {', '.join(known)}. "
                f"{hint}Name one of these, or give it to Task(metrics={{...}})."
            )

    def refuse_waiting(self, waits: Mapping[str, bool], *, has_valid: bool) -> None:
        """Refuse what waits for validations where there are none.

        Raises:
            ValueError: says what waits, and what to give.
        """
        found = [
            n for n, waiting in {"patience=": self.patience is not None, **waits}.items() if waiting
        ]
        if found and not (has_valid and self.every is not None):
            missing = "validate_every=" if has_valid else "Task(valid=)"
            raise ValueError(f"{found[0]} waits for validations, and there are none. Give {missing}.")

    def check(self, written: Mapping[str, Any]) -> None:
        """Refuse a validation that does not give what the run is judged by.

        Raises:
            TaskError: says what it does give.
        """
        if self.metric not in written:
            raise TaskError(
                f"metric={self.metric!r} is not among what the validation gives: {', '.join(written)}. "
                "Name one of these, give it to Task(metrics={...}), or log it: session.log(...)."
            )

    def facts(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint's manifest tells of this."""
        score = self.score(written)
        found = {"metric": self.metric, "direction": self.direction, "score": score}
        return found | {LOSS: score if self.metric == LOSS else None}


def gone_on_with(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Leave out the checkpoints that a later stage was not begun from, of (stage, number of commit).

    Such as those of another kernel, or of a mount that showed them late: its numbers are no lower.
    """
    found = list(places)
    return [(s, n) for s, n in found if not any(later > s and at <= n for later, at in found)]


def best(facts: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return which checkpoint has the best score, the earliest of equals, if any.

    Only those count that are judged as the newest of them is: another metric is no better or worse;
    and whose model has the weights that the newest of all has: `fresh` may have given it others.

    Args:
        facts: Of each checkpoint, by its number.
    """
    grown = facts[max(facts)].get("grown", 0) if facts else 0
    alike = [number for number, found in facts.items() if found.get("grown", 0) == grown]
    scored = {number: found for number in alike if (found := score(facts[number])) is not None}
    if not scored:
        return None
    judged = scored[max(scored)][:2]
    sign = 1 if judged[1] == "min" else -1
    return min((sign * found[2], n) for n, found in scored.items() if found[:2] == judged)[1]


def score(facts: Mapping[str, Any]) -> tuple[str, str, float] | None:
    """Return a checkpoint's metric, its direction and its value there, if it was judged."""
    if facts.get("score") is not None:
        return facts["metric"], facts["direction"], facts["score"]
    if facts.get(LOSS) is not None:  # as it was written before there was another
        return LOSS, "min", facts[LOSS]
    return None


def direction_of(metric: str, direction: str | None) -> str:
    """Return "max" or "min"; where none is given, "min" for a name that ends in loss or error.

    Raises:
        ValueError: it is neither.
    """
    if direction is None:
        return "min" if metric.endswith(("loss", "error")) else "max"
    if direction not in ("max", "min"):
        raise ValueError(f"direction={direction!r} must be 'max', 'min', or None for by the name.")
    return direction


def _every(value: Any) -> tuple[int, str]:
    words = value.split() if isinstance(value, str) else []
    unit = {"epoch": "epochs", "step": "steps"}.get(words[-1], words[-1]) if words else ""
    if len(words) != 2 or unit not in UNITS or not words[0].isdecimal() or not int(words[0]):
        raise ValueError(
            f'validate_every={value!r} cannot be read. Write "1 epoch", "500 steps", or None for never.'
        )
    return int(words[0]), unit
