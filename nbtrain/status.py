"""What is known of a session now, as plain values: for `status()`, the panel and the magics."""

from __future__ import annotations

from typing import Any

from nbtrain.loop import Loop
from nbtrain.opening import Opened


def of(session: Any, opened: Opened, loop: Loop) -> dict[str, Any]:
    """Return the facts; times in seconds, sizes in bytes."""
    live = loop.live
    return {
        "name": session.name,
        "state": session.state,
        "reason": session.reason,
        "asked": session.asked,
        "own_loop": loop.is_own and not loop.is_held,  # only its cell can go on
        "error": loop.worker.problem if loop.worker is not None else "",
        "resumed": loop.keeping.resumed,
        **live.grade.plain(),
        "stage": session.stage,
        "epoch": session.epoch,
        "epochs": session.journal.settings["epochs"],
        "step": session.step,
        "progress": session.progress,
        "position": live.position,
        "num_samples": live.num_samples,
        "loss": live.loss,
        "metric": live.judging.metric,
        "direction": live.judging.direction,
        "precision": live.forward.precision,
        "lr": session.lr,
        "peak_lr": session.journal.peak_lr,
        "samples_per_s": loop.samples_per_s if loop.state == "running" else 0.0,
        "settings": dict(session.journal.settings),
        "budget": opened.clock_words,
        "budget_limit_s": session.budget.limit_s,
        "budget_left_s": session.budget.left_s,
        "reserve_s": session.budget.reserve_s(validation=opened.valid is not None),
        "saved": [vars(saved) for saved in loop.keeping.saver.known()],
        "pending_bytes": loop.keeping.saver.pending_bytes,
        "store": opened.stores[-1].place,
        "recipe": opened.recipe_words,
        "goes_on": opened.way_on(session.name),
    }
