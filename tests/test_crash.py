"""A machine may die at any change to the disk: what was committed loads, and the run goes on exactly.

A child counts the changes that its stores make and kills itself at one of them: before a file is
made, with half of its bytes written, before it is renamed, cut short or removed. The sweep dies at
the first change, the second, the third, until a child survives.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits, bits, build, die, in_fresh_process, session

import nbtrain
from nbtrain import checkpoint
from nbtrain.checkpoint import Snapshot
from nbtrain.stores import MANIFEST, DriveStore, FolderStore, Store

KEEP = 2
EVERY = 6  # of the deaths, one in so many is gone on from to the end
PLACES: dict[str, Callable[[Path], Store]] = {"folder": FolderStore, "mirror": DriveStore}


class Mortal:
    """Kills this process at one of the changes below a folder, and counts what was committed."""

    def __init__(self, folder: Path, log: Path, die_at: int) -> None:
        self._folder, self._die_at = str(folder), die_at
        self._log = open(log, "ab", buffering=0)  # noqa: SIM115
        self._open_files: dict[int, str] = {}
        self._real = {name: getattr(os, name) for name in ("open", "write", "close", "replace")}
        for name in ("open", "write", "close", "replace"):
            setattr(os, name, getattr(self, name))
        for name in ("mkdir", "rmdir", "unlink"):
            setattr(os, name, self._counted(getattr(os, name)))
        os.ftruncate = self._counted(os.ftruncate)
        # The death of a process loses no page that was written; a sync only takes time here.
        os.fsync = lambda descriptor: None

    def _change(self, path: Any) -> bool:
        """Count; True if this is the change to die at."""
        path = self._open_files.get(path, "") if isinstance(path, int) else os.fspath(path)
        self._die_at -= path.startswith(self._folder)
        return path.startswith(self._folder) and self._die_at == 0

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def dying(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._change(path):
                die()
            return real(path, *args, **kwargs)

        return dying

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and self._change(path):
            die()
        descriptor = self._real["open"](path, flags, *args, **kwargs)
        if flags & os.O_WRONLY:
            self._open_files[descriptor] = os.fspath(path)
        return int(descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        if self._change(descriptor):
            self._real["write"](descriptor, data[: len(data) // 2])
            die()
        written = int(self._real["write"](descriptor, data))
        self._note_commit(self._open_files.get(descriptor, ""))
        return written

    def close(self, descriptor: int) -> None:
        self._open_files.pop(descriptor, None)
        self._real["close"](descriptor)

    def replace(self, source: Any, target: Any) -> None:
        if self._change(target):
            die()
        self._real["replace"](source, target)
        self._note_commit(os.fspath(target))

    def _note_commit(self, path: str) -> None:
        if path.startswith(self._folder) and os.path.basename(path) == MANIFEST:
            self._log.write(b".")


def train(place: str, folder: Path, machine: Path) -> nbtrain.Session:
    """Train two epochs: four checkpoints, of which the first goes and the second is the best."""
    os.environ["XDG_CACHE_HOME"] = str(machine)  # where a remote store is committed to first
    torch.manual_seed(0)
    task = {name: value for name, value in vars(build()).items() if name != "valid"}
    store = PLACES[place](folder)
    run = session(folder, build=None, store=store, keep=KEEP, batch_size=12, accumulate=1, **task)
    saver, request = run._loop.keeping.saver, run._loop.keeping.saver.request

    def in_turn(snapshot: Snapshot) -> None:
        saver.wait()  # else a copy that waits is passed over, and children make other changes
        request(snapshot)

    saver.request = in_turn  # type: ignore[method-assign]
    for epoch in run.epochs():
        for batch in epoch:
            loss, _, _ = run.task.run(batch)
            run.update(loss)
        run.log(valid_loss=float(run.epoch))
    return run


def train_and_die(place: str, folder: Path, machine: Path, log: Path, die_at: int) -> None:
    Mortal(folder, log, die_at)
    train(place, folder, machine)


def finish(place: str, folder: Path, machine: Path, result: Path) -> None:
    torch.save(bits(train(place, folder, machine)), result)


def forked(function: Callable[..., Any], *args: Any) -> int:
    """Call a function in a fork of this process, which never computes; return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sweep(place: str, root: Path) -> None:
    """Die at change 1, 2, 3 ... until a child survives; go on from some of what they left."""
    code = -signal.SIGKILL
    die_at = 0
    while code == -signal.SIGKILL:
        die_at += 1
        here = root / f"{die_at:03d}"
        here.mkdir()
        folder, log = here / "store", here / "log"
        code = forked(train_and_die, place, folder, here / "machine", log, die_at)
        assert code in (0, -signal.SIGKILL)
        if die_at % EVERY == 0:
            copy = shutil.copytree(folder, here / "copy")
            # The machine is gone with what was on it; only a remote store is reached from another.
            machine = here / "another machine"
            assert forked(finish, place, copy, machine, here / "bits.pt") == 0, f"from {die_at}"


@pytest.fixture(scope="module", params=PLACES)
def swept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    assert in_fresh_process(sweep, request.param, root) == 0
    return root


def deaths(swept: Path) -> Iterator[tuple[int, int, list[int], list[str]]]:
    """Give for each death: the change, how many were committed, which load, the warnings."""
    for here in sorted(swept.iterdir()):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = checkpoint.find([PLACES[place_of(swept)](here / "store")], "tiny")
        loaded = [checkpoint.load(manifest).number for manifest in found]
        words = [str(warning.message) for warning in told]
        yield int(here.name), len((here / "log").read_bytes()), loaded, words


def place_of(swept: Path) -> str:
    return swept.name.rstrip("0123456789")


def test_every_checkpoint_that_was_committed_loads_after_a_death_at_any_change(swept: Path) -> None:
    seen = list(deaths(swept))
    assert len(seen) > 50
    assert {committed for _, committed, _, _ in seen} == {0, 1, 2, 3, 4}
    for die_at, committed, numbers, _ in seen:
        newest = numbers[0] if numbers else 0
        assert newest == committed, f"the newest is lost by a death at change {die_at}"
        assert len(numbers) >= min(2, committed), f"at change {die_at} only {numbers} are left"


def test_the_best_is_there_after_a_death_at_any_change(swept: Path) -> None:
    for die_at, committed, numbers, _ in deaths(swept):
        assert committed < 2 or 2 in numbers, f"the best is lost at change {die_at}: {numbers}"
    assert numbers == [4, 3, 2]


def test_a_folder_never_has_a_torn_manifest_and_a_mirror_names_its_own(swept: Path) -> None:
    for die_at, _, _, told in deaths(swept):
        assert len(told) <= ("mirror" in swept.name), f"at change {die_at}: {told}"
        assert all(MANIFEST in words and "set aside" in words for words in told)


def test_a_run_that_died_at_a_change_ends_in_the_bits_of_one_that_did_not(swept: Path) -> None:
    survivor = max(swept.iterdir()).name
    whole = swept.with_name(f"{swept.name}-whole")
    whole.mkdir()
    result = whole / "bits.pt"
    assert in_fresh_process(finish, place_of(swept), whole / "store", whole / "machine", result) == 0
    expected = torch.load(result)
    resumed = sorted(swept.glob("*/bits.pt"))
    assert len(resumed) == int(survivor) // EVERY >= 8
    for each in resumed:
        assert_same_bits(torch.load(each), expected)


def die_again_and_again(folder: Path, result: Path) -> None:
    """Die some thirty changes after each start, every time a few later, until the run is done."""
    log = folder.with_suffix(".log")
    lives = iter(range(33, 70, 2))
    while forked(train_and_die, "folder", folder, folder, log, next(lives)):
        pass
    finish("folder", folder, folder, result)


def test_a_run_that_dies_again_and_again_gets_on_and_leaves_no_debris(tmp_path: Path) -> None:
    folder, result = tmp_path / "often", tmp_path / "often.pt"
    assert in_fresh_process(die_again_and_again, folder, result) == 0
    expected = tmp_path / "whole.pt"
    assert in_fresh_process(finish, "folder", tmp_path / "whole", tmp_path, expected) == 0
    ends = torch.load(result), torch.load(expected)
    assert_same_bits(*ends)
    store = FolderStore(folder)
    found = checkpoint.find([store], "tiny")
    assert found[0].facts["stage"] >= 3
    oldest = min(m.number for m in found[:KEEP])
    left = {name.split("/")[1] for name in store.list("tiny")} - {m.id for m in found}
    assert not [id for id in left if int(id.split("-")[0]) < oldest]
