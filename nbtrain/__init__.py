"""A training run that outlives its notebook.

The map, from the call site down; a module imports only what stands below it::

    magics       %nbtrain: thin words over what stands below
    resuming     resume: one line in a fresh kernel
    session      Session: the story of a run
    facts        what can be read of a session
    auditing     audit: does this code train reproducibly, and if not, where is the hidden randomness
    population   Population: members that train in turn, and copy the best; a package with its own map
    status       what is known of a session, as plain values
    rehearsal    would a fresh kernel resume this? tried in a fresh process
    finding      the learning rate range test
    waiting      the cell waits, another thread trains
    face         a session as a notebook shows it: the panel, and what stays without a kernel
    loop         windows, boundaries, the ends of epochs
    trial        the first steps of a run, trained for their bits alone
    keeping      when a run is saved
    driving      how training is started, ordered about and ended
    probe        one window, trained and told as hashes
    opening      from what the user wrote to what is alive
    arguments    what a session may be told, and what of it makes sense
    live         what is alive, and what a window does to it
    reading      a task's data, ready to be read
    saving       snapshots to checkpoints in the background
    checkpoint   parts to store and back: payload first, manifest last
    parts        what is alive, to a snapshot and back
    plots        the curves; frames and scales draw them
    growth       parameters that come and go between stages
    journal      the settings in force, and every change of them
    validation   mean loss and metrics, leaving training as it was
    metrics      what a validation gives, batch by batch
    bar, lines   one progress line, and what a session says
    poll         widget messages, handled while a cell is busy
    stores       where bytes survive
    recipe       the source that `build` needs; source writes one value of it
    forward      how a batch becomes a loss
    task         what `build` returns
    naming       what may be logged by which name
    data         the samples in their order, from any position on
    samples      which samples, in which order; samplers
    stream       a data set that is iterated
    thread       the thread that trains, computing as the cell would
    frozen       parameters that stand still, kept once
    grades       how good a resume is: what differs from the kernel before
    evidence     what an action moves, and whom it asks
    accumulation, budget, history, host, interrupts, judging, memory, orders, randomness, schedule,
    schedulers, trees
    errors       every exception, as a tree

Read `session` first. `python -m nbtrain demo` shows all of it in two minutes.
"""

import importlib.util
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from nbtrain.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    LossError,
    NbtrainError,
    NbtrainWarning,
    SessionError,
    StoreError,
    TrustError,
)
from nbtrain.population.space import loguniform, randint, uniform

if TYPE_CHECKING:
    from nbtrain.auditing import audit
    from nbtrain.population.population import Population
    from nbtrain.population.tuning import tune_trainable
    from nbtrain.randomness import sample_rng
    from nbtrain.resuming import resume
    from nbtrain.session import Session
    from nbtrain.task import Task

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DataError",
    "LossError",
    "NbtrainError",
    "NbtrainWarning",
    "Population",
    "Session",
    "SessionError",
    "StoreError",
    "Task",
    "TrustError",
    "audit",
    "loguniform",
    "randint",
    "resume",
    "sample_rng",
    "tune_trainable",
    "uniform",
]

__version__ = version("nbtrain")


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: `%load_ext nbtrain` must answer at once."""
    if name in ("Population", "Session", "Task", "audit", "resume", "sample_rng", "tune_trainable"):
        from nbtrain.auditing import audit
        from nbtrain.population.population import Population
        from nbtrain.population.tuning import tune_trainable
        from nbtrain.randomness import sample_rng
        from nbtrain.resuming import resume
        from nbtrain.session import Session
        from nbtrain.task import Task

        # All of them, so that a recipe finds each under this name, whichever was asked for.
        lazy = {"Population": Population, "Session": Session, "Task": Task}
        globals().update(lazy, audit=audit, resume=resume, sample_rng=sample_rng)
        globals().update(tune_trainable=tune_trainable)
        return globals()[name]
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """Add `%nbtrain` and `%%nbtrain` to a notebook; a second time changes nothing."""
    from nbtrain.magics import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Take them out again."""
    from nbtrain.magics import unload

    unload(shell)
