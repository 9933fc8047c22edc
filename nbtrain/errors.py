"""Every exception and warning, and the one shape of a message.

::

    NbtrainError
    ├── BudgetError        the clock leaves no time to begin
    ├── CheckpointError    a checkpoint cannot be read, or does not fit this session
    ├── DataError          the data set changed, cannot be resumed, or failed at a sample
    ├── LossError          the loss is not a finite number
    ├── RecipeError        the source that `build` needs cannot be kept or run
    │   └── TrustError     stored code would run without the user's word
    ├── SessionError       no such session, or two of one name
    ├── StoreError         a place refused bytes
    └── TaskError          `build` returned the wrong thing

    NbtrainWarning         training goes on, but somebody should know

A bad argument is a plain `ValueError` at the call. After each of these every checkpoint that was
committed before is still there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.76  # of difflib's ratio: below it are words that only share letters, as foo and floor


class NbtrainError(Exception):
    """Something outside the arguments went wrong; committed checkpoints are intact."""


class BudgetError(NbtrainError):
    """The clock leaves no time to begin."""


class CheckpointError(NbtrainError):
    """A checkpoint cannot be read, or does not fit this session."""


class DataError(NbtrainError):
    """The data set changed, cannot be resumed, or failed at a sample."""


class LossError(NbtrainError):
    """The loss is not a finite number."""


class RecipeError(NbtrainError):
    """The source that `build` needs cannot be kept or run."""


class TrustError(RecipeError):
    """Stored code would run without the user's word."""


class SessionError(NbtrainError):
    """No such session, or two of one name."""


class StoreError(NbtrainError):
    """A place refused bytes; what was committed there before is intact."""


class TaskError(NbtrainError):
    """`build` returned the wrong thing."""


class NbtrainWarning(UserWarning):
    """Training goes on, but somebody should know."""


def explain(what: str, *, checkpoint: object, session: object, way_out: str) -> str:
    """Write a message in the house shape: what is wrong, both sides aligned, one way out."""
    return f"{what}\n  in checkpoint: {checkpoint}\n  in session:    {session}\n{way_out}"


def near(word: str, known: Iterable[str]) -> str:
    """Return what may have been meant by a word that is not known, or ""."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, ALIKE)), "")
