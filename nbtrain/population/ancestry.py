"""Where a state of a population came from: its slices in a row, and what they trained with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nbtrain.errors import SessionError
from nbtrain.population.table import Key, Row

Schedule = list[tuple[float, dict[str, Any]]]  # from this progress on, these hyperparameters


def by_key(rows: Sequence[Row]) -> dict[Key, Row]:
    """Return rows by the states that they ended in."""
    return {row.key: row for row in rows}


def begins(row: Row, known: dict[Key, Row]) -> float:
    """Return the progress at which a slice began."""
    return 0.0 if row.source_key is None else known[row.source_key].progress


def of(row: Row | None, known: dict[Key, Row]) -> list[Row]:
    """Return the slices that led to a state, oldest first and it itself last; nothing for None."""
    found: list[Row] = []
    while row is not None:
        found.append(row)
        row = known[row.source_key] if row.source_key is not None else None
    return found[::-1]


def schedule(row: Row | None, known: dict[Key, Row]) -> Schedule:
    """Return what a state was trained with: a new entry wherever that changed.

    Raises:
        SessionError: a value is none that a file could keep.
    """
    found: Schedule = []
    for slice in of(row, known):
        if not found or found[-1][1] != slice.hyperparameters:
            found.append((begins(slice, known), dict(slice.hyperparameters)))
    try:
        json.dumps(found)
    except TypeError as error:
        raise SessionError(f"The schedule cannot be written down: {error}.") from error
    return found
