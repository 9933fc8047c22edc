"""A population may be killed at any moment: what is there goes on, to the bits of one that was not.

Children are forked from a process that never computes. Each trains the same population and kills
itself: at a call of the loss, which is inside a slice; at the end of a slice, before or after its
commit; or at a change to the disk. Another child goes on from what is left.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from herds import MEMBERS, assert_same_bits, finish, population
from runs import die, in_fresh_process
from test_crash import Mortal
from torch import nn

import nbtrain
from nbtrain import checkpoint
from nbtrain.population.rounds import Rounds
from nbtrain.stores import FolderStore

SLICES = 9
LOSSES = 16  # calls in a slice: 8 micro-batches of training, 8 of validation
DISK_EVERY = 17


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forked(function: Callable[..., Any], *args: Any) -> int:
    """Call a function in a fork of this process; return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watch_disk(folder: Path, log: Path) -> None:
    """Write down how full the folder is at the end of each commit, before anything is removed."""
    commit = checkpoint.commit
    # The death of a process loses no page that was written; a sync only takes time here.
    os.fsync = lambda descriptor: None

    def watched(*args: Any) -> Any:
        manifest = commit(*args)
        with open(log, "a", encoding="utf-8") as lines:
            lines.write(f"{num_bytes(folder)}\n")
        return manifest

    checkpoint.commit = watched


def die_in_a_loss(folder: Path, log: Path, calls: int) -> None:
    watch_disk(folder, log)
    left = iter(range(calls))

    def dying(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            die()
        return nn.functional.cross_entropy(output, target)

    found = population(folder)
    made = found._maker.build

    def build_dying(**values: Any) -> nbtrain.Task:
        task = made(**values)
        task.loss = dying
        return task

    found._maker.build = build_dying
    found.run()


def die_at_a_slices_end(folder: Path, log: Path, slices: int, committed: bool) -> None:
    watch_disk(folder, log)
    close = Rounds._close

    def dying(self: Rounds, *args: Any) -> None:
        close(self, *args)
        if len(self.table.rows) == slices:
            if committed:
                self.shelf.wait()
            die()

    Rounds._close = dying  # type: ignore[method-assign]
    population(folder).run()


def die_at_a_change(folder: Path, log: Path, change: int) -> None:
    Mortal(folder, log.with_suffix(".commits"), change)
    watch_disk(folder, log)
    population(folder).run()


def go_on(folder: Path, log: Path, result: Path) -> None:
    watch_disk(folder, log)
    finish(folder, result)


def one_death(here: Path, function: Callable[..., None], *args: Any) -> int:
    """Die once and go on; return how the first child ended."""
    here.mkdir()
    folder, log = here / "store", here / "log"
    code = forked(function, folder, log, *args)
    assert code in (0, -signal.SIGKILL)
    (here / "after").write_text(str(num_bytes(folder)))
    assert forked(go_on, folder, log, here / "bits.pt") == 0, here.name
    return code


def sweep(root: Path) -> None:
    """Die everywhere."""
    for calls in range(3, SLICES * LOSSES, 9):
        assert one_death(root / f"loss-{calls:03d}", die_in_a_loss, calls) == -signal.SIGKILL
    for slices in range(1, SLICES + 1):
        for committed in (False, True):
            here = root / f"slice-{slices}-{committed}"
            assert one_death(here, die_at_a_slices_end, slices, committed) == -signal.SIGKILL
    change, code = 1, -signal.SIGKILL
    while code == -signal.SIGKILL:
        code = one_death(root / f"change-{change:03d}", die_at_a_change, change)
        change += DISK_EVERY
    whole = root / "whole"
    whole.mkdir()
    assert forked(go_on, whole / "store", whole / "log", whole / "bits.pt") == 0


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("herd")
    assert in_fresh_process(sweep, root) == 0
    return root


def deaths(swept: Path, kind: str) -> list[Path]:
    return sorted(here for here in swept.iterdir() if here.name.startswith(kind))


@pytest.mark.parametrize(("kind", "least"), [("loss", 15), ("slice", 18), ("change", 10)])
def test_a_population_that_was_killed_ends_in_the_bits_of_one_that_was_not(
    swept: Path, kind: str, least: int
) -> None:
    expected = torch.load(swept / "whole/bits.pt", weights_only=False)
    found = deaths(swept, kind)
    assert len(found) >= least
    for here in found:
        assert_same_bits(torch.load(here / "bits.pt", weights_only=False), expected)


def test_a_store_never_holds_more_than_twice_the_population(swept: Path) -> None:
    held = checkpoint.find([FolderStore(swept / "whole/store")], "herd")
    newest = {m.facts["member"]: m.num_bytes for m in reversed(held) if m.facts["member"] is not None}
    size = sum(newest.values())
    assert len(newest) == MEMBERS
    seen = [
        (here.name, int(line) / size)
        for here in swept.iterdir()
        for line in [*(here / "log").read_text().splitlines(), *_after(here)]
    ]
    assert len(seen) > 500
    assert max(share for _, share in seen) <= 2.0, max(seen, key=lambda pair: pair[1])


def _after(here: Path) -> list[str]:
    path = here / "after"
    return [path.read_text()] if path.exists() else []
