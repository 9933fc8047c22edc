"""Where a state came from is a chain of slices; what it was trained with is plain JSON."""

from __future__ import annotations

import itertools
import json

import pytest
from herds import grown

from nbtrain.errors import SessionError
from nbtrain.population import ancestry
from nbtrain.population.evolution import Turn
from nbtrain.population.table import Row


def test_a_chain_leads_from_the_first_round_to_the_state() -> None:
    table = grown(rounds=5)
    known = ancestry.by_key(table.rows)
    for row in table.rows:
        chain = ancestry.of(row, known)
        assert [one.round for one in chain] == list(range(row.round + 1)) and chain[-1] is row
        for before, after in itertools.pairwise(chain):
            assert after.source_key == before.key
            assert ancestry.begins(after, known) == before.progress
    assert ancestry.of(None, known) == [] and ancestry.schedule(None, known) == []


def test_the_schedule_has_an_entry_where_something_changed_and_is_json() -> None:
    table = grown(rounds=6)
    known = ancestry.by_key(table.rows)
    copy = next(row for row in table.rows if row.source not in (None, row.member) and row.changes)
    schedule = ancestry.schedule(copy, known)
    assert schedule[0][0] == 0.0 and schedule[-1] == (
        known[copy.source_key or (0, 0)].progress,
        copy.hyperparameters,
    )
    assert all(one[1] != other[1] for one, other in itertools.pairwise(schedule))
    assert json.loads(json.dumps(schedule)) == [[at, values] for at, values in schedule]


def test_what_no_file_could_keep_is_named() -> None:
    row = Row.of(Turn(0, 0, None, {"lr": {1, 2}}), score=1.0)
    with pytest.raises(SessionError, match="set"):
        ancestry.schedule(row, {row.key: row})
