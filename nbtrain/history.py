"""What was seen at each step, and at each epoch's end.

Every step has a row until there are `MAX_ROWS`; then every second row goes, and from there on every
second step is kept, and so on. Which rows remain depends on the number of steps alone, so a resumed
run has the very rows of the run that was never cut. An epoch's last step is always kept, in a row
that also has the validation.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

MAX_ROWS = 65_536
COLUMNS = ("stage", "epoch", "step", "progress", "loss", "lr", "seconds")
WHOLE = ("stage", "epoch", "step")


class History:
    """Rows of stage, epoch, step, progress, loss, lr, seconds, and validation where there was one.

    Iterating gives a dict a row, so `pandas.DataFrame(session.history)` is the whole table;
    `history["loss"]` is a column as a list, with None where a row has no such value.

    What a step logs by name has a column too, of the means over its window.

    Units: progress in epochs, seconds of training over all stages; loss is the window's mean, and at
    an epoch's end train_loss the mean over the epoch.
    """

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in COLUMNS}
        self._stride = 1
        self.epochs: list[dict[str, Any]] = []

    def add(self, **row: float) -> None:
        """Add a step's row, unless it falls between the rows that are kept."""
        if int(row["step"]) % self._stride:
            return
        if new := [name for name in row if name not in self._columns]:
            columns = dict(self._columns)  # for another thread may be walking through it
            for name in new:
                columns[name] = array("d", [math.nan]) * len(columns["step"])
            self._columns = columns
        for name, column in self._columns.items():
            column.append(row.get(name, math.nan))
        if len(self._columns["step"]) > MAX_ROWS:
            self._stride *= 2
            kept = [i for i, step in enumerate(self._columns["step"]) if not step % self._stride]
            self._columns = {
                name: array("d", (column[i] for i in kept)) for name, column in self._columns.items()
            }

    @property
    def last(self) -> dict[str, Any] | None:
        """The last step's row that is kept, or None."""
        if not self._columns["step"]:
            return None
        return {name: self._columns[name][-1] for name in COLUMNS}

    def close_epoch(self, row: dict[str, Any]) -> None:
        """Add an epoch's last step with what its validation gave."""
        self.epochs.append(row)

    def arrays(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return the steps' columns as copies of shape (rows,), all of one length, without validation.

        Any thread may ask while another adds rows.
        """
        columns = self._columns
        whole = min(len(column) for column in columns.values())  # a row may be half there
        # Cut first: a view of the column itself would forbid the loop's thread to add to it.
        return {name: np.frombuffer(column[:whole], np.float64) for name, column in columns.items()}

    def frame(self) -> Any:
        """Return all rows as a pandas DataFrame.

        Raises:
            ModuleNotFoundError: pandas is not installed; `list(history)` needs nothing.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            error.add_note("Install it with: pip install pandas. list(session.history) needs nothing.")
            raise

        return pandas.DataFrame(list(self))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ends = {row["step"]: row for row in self.epochs}
        found = dict.fromkeys(n for row in self.epochs for n in row if n not in COLUMNS)
        columns = self._columns
        named = [name for name in columns if name not in COLUMNS]
        names = list(dict.fromkeys([*COLUMNS[:-1], *named, *found, COLUMNS[-1]]))
        rows: list[dict[str, Any]] = []
        whole = min(map(len, columns.values()))  # the loop's thread may be adding a row
        for values in zip(*(column[:whole] for column in columns.values()), strict=True):
            row: dict[str, Any] = dict(zip(columns, values, strict=True))
            row.update({name: int(row[name]) for name in WHOLE})
            row.update({name: None for name in named if math.isnan(row[name])})
            rows.append(row | ends.pop(row["step"], {}))
        for row in sorted([*rows, *ends.values()], key=lambda row: row["step"]):
            yield {name: row.get(name) for name in names}

    def __getitem__(self, column: str) -> list[Any]:
        rows = list(self)
        if rows and column not in rows[0]:
            raise KeyError(f"{column!r} is not a column. There are: {', '.join(rows[0])}.")
        return [row[column] for row in rows]

    def __len__(self) -> int:
        return len({*self._columns["step"], *(row["step"] for row in self.epochs)})

    def __repr__(self) -> str:
        steps = int(self._columns["step"][-1]) if self._columns["step"] else 0
        return f"<history of {steps} steps and {len(self.epochs)} epochs>"

    def state_dict(self) -> dict[str, Any]:
        """Return everything, steps as float64 tensors of shape (rows,)."""
        columns = {name: torch.from_numpy(np.array(c)) for name, c in self._columns.items()}
        return {"stride": self._stride, "steps": columns, "epochs": [dict(r) for r in self.epochs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._stride = state["stride"]
        self._columns = {name: array("d", column.tolist()) for name, column in state["steps"].items()}
        self.epochs = [dict(row) for row in state["epochs"]]
