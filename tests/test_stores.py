"""The room's invariant: a name is written once and whole, and what was committed stays.

First the contract, the same for every place; then what each place owes besides.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations

from nbtrain.errors import NbtrainWarning, StoreError
from nbtrain.stores import (
    MANIFEST,
    DriveStore,
    FolderStore,
    FsspecStore,
    KaggleStore,
    MemoryStore,
    Store,
    find,
    find_store,
)

MODEL = "cifar/000004-ab12cd/model.safetensors"
RECEIPT = f"cifar/000004-ab12cd/{MANIFEST}"

PLACES: dict[str, Callable[[Path], Store]] = {
    "folder": lambda path: FolderStore(path / "sessions"),
    "folder with a space and a quote": lambda path: FolderStore(path / "Anna's runs" / "nb train"),
    "drive": lambda path: DriveStore(path / "nbtrain"),
    "kaggle": lambda path: KaggleStore(path / "working/nbtrain", [path / "input"]),
    "memory": lambda path: MemoryStore(),
    "fsspec memory": lambda path: FsspecStore(f"memory://{path}"),
    "fsspec file": lambda path: FsspecStore(f"file://{path}/remote"),
}


@pytest.fixture(params=PLACES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return PLACES[request.param](tmp_path)


# The contract


def test_every_place_is_a_store_and_says_what_it_is(store: Store) -> None:
    assert isinstance(store, Store)
    assert store.place
    assert store.degree in ("local", "copied", "durable", "unknown")
    assert isinstance(store.is_remote, bool)


def test_opening_and_listing_an_empty_place_writes_nothing(store: Store, tmp_path: Path) -> None:
    assert store.list() == store.list("cifar") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        b"weights",
        b"",
        bytearray(b"weights"),
        memoryview(b"weights"),
        memoryview(array.array("d", [1.5, 2.5])),
        bytes(range(256)) * 5000,
    ],
    ids=["bytes", "empty", "bytearray", "memoryview", "wide memoryview", "a megabyte"],
)
def test_what_was_written_is_read_back(store: Store, data: bytes | bytearray | memoryview) -> None:
    store.write(MODEL, data)
    assert store.read(MODEL) == bytes(data)
    assert type(store.read(MODEL)) is bytes


def test_later_changes_of_the_callers_buffer_change_nothing(store: Store) -> None:
    data = bytearray(b"weights")
    store.write(MODEL, data)
    data[:] = b"garbage"
    assert store.read(MODEL) == b"weights"


def test_list_names_all_below_a_folder_and_nothing_beside_it(store: Store) -> None:
    names = sorted(["a", "cifar/note", MODEL, RECEIPT, "cifar2/000001-aaaaaa/x", "cif/000001-a/x"])
    for name in names:
        store.write(name, b"x")
    assert store.list() == names
    assert store.list("cifar") == sorted(["cifar/note", MODEL, RECEIPT])
    assert store.list("cifar/000004-ab12cd") == sorted([MODEL, RECEIPT])
    assert store.list("cif") == ["cif/000001-a/x"]
    assert store.list("ci") == store.list(MODEL) == []


def test_an_existing_name_is_refused_and_stays_as_it_was(store: Store) -> None:
    store.write(MODEL, b"first")
    for other in (b"other", b"o"):
        with pytest.raises(StoreError, match="exists already"):
            store.write(MODEL, other)
    assert store.read(MODEL) == b"first"


def test_reading_what_is_absent_names_the_file_and_the_place(store: Store) -> None:
    with pytest.raises(StoreError) as caught:
        store.read(MODEL)
    assert MODEL in str(caught.value) and store.place in str(caught.value)


def test_delete_removes_that_file_alone(store: Store) -> None:
    store.write(MODEL, b"x")
    store.write(RECEIPT, b"y")
    store.delete(RECEIPT)
    assert store.list() == [MODEL] and store.read(MODEL) == b"x"


def test_a_deleted_name_may_be_written_again(store: Store) -> None:
    store.write(MODEL, b"before")
    store.delete(MODEL)
    store.write(MODEL, b"now")
    assert store.read(MODEL) == b"now"


def test_deleting_what_is_absent_is_fine(store: Store) -> None:
    store.delete(MODEL)
    store.write(RECEIPT, b"y")
    store.delete(MODEL)
    store.delete("mnist/000001-aaaaaa/x")
    assert store.list() == [RECEIPT]


def test_empty_folders_go_with_their_last_file(store: Store, tmp_path: Path) -> None:
    store.write(MODEL, b"x")
    store.write("mnist/000001-aaaaaa/x", b"x")
    store.delete(MODEL)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("cifar", "000004-ab12cd")]
    assert store.list() == ["mnist/000001-aaaaaa/x"]


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "../x", "cifar/../x", "cifar/..", "/etc/passwd", "cifar//x", "cifar/", "/"),
        *("a/b/c/d", ".hidden", "cifar/.x.tmp", "a\\b", "C:x", "x\n", "a b", "-x", "é", "x" * 101),
        *("\0", "~", "cifar/000004-ab12cd/../../../x"),
    ],
)
def test_a_name_that_could_leave_the_root_is_a_bad_argument(store: Store, name: str) -> None:
    for act in (
        lambda: store.list(name),
        lambda: store.read(name),
        lambda: store.write(name, b"x"),
        lambda: store.delete(name),
    ):
        with pytest.raises(ValueError, match="is not a name in a store"):
            act()
    assert store.list() == []


def test_an_empty_name_is_no_file(store: Store) -> None:
    for act in (lambda: store.read(""), lambda: store.write("", b"x"), lambda: store.delete("")):
        with pytest.raises(ValueError, match="is not a name in a store"):
            act()


@pytest.mark.parametrize("place", ["drive", "fsspec memory", "fsspec file"])
def test_a_copy_that_was_cut_off_can_be_made_again(place: str, tmp_path: Path) -> None:
    store = PLACES[place](tmp_path)
    assert store.is_remote
    store.write(MODEL, b"the whole file")
    store.write(MODEL, b"the whole file")
    wide = memoryview(array.array("d", [1.5, 2.5]))
    store.write("cifar/000004-ab12cd/wide", wide)
    store.write("cifar/000004-ab12cd/wide", wide)
    store.write(RECEIPT, b"torn")
    store.write(RECEIPT, b"whole now")
    assert store.read(MODEL) == b"the whole file" and store.read(RECEIPT) == b"whole now"


@pytest.mark.parametrize("place", ["folder", "kaggle", "memory"])
def test_a_near_place_takes_a_name_only_once(place: str, tmp_path: Path) -> None:
    store = PLACES[place](tmp_path)
    assert not store.is_remote
    store.write(MODEL, b"same")
    with pytest.raises(StoreError, match="exists already"):
        store.write(MODEL, b"same")
    with pytest.raises(StoreError, match="exists already"):
        store.write(MODEL, b"longer than before")


# A folder, and what all mounted places share with it


class Crash(BaseException):
    """This process is dead."""


CHANGES = ["open", "write", "ftruncate", "truncate", "fsync", "close", "replace"]
CHANGES += ["unlink", "mkdir", "rmdir"]


@contextlib.contextmanager
def watched(act: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `act` before each change of the disk that goes through `os`."""

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            act(name, args)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield


def dies_at(change: int) -> Callable[[str, tuple[Any, ...]], None]:
    """From this change on nothing happens any more, not even tidying up."""
    count = iter(range(10**9))

    def act(name: str, args: tuple[Any, ...]) -> None:
        if next(count) >= change:
            raise Crash

    return act


def survives(change: int, act: Callable[[], object]) -> bool:
    try:
        with watched(dies_at(change)):
            act()
    except Crash:
        return False
    return True


def test_after_death_at_any_change_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    num_deaths = 0
    for change in range(1000):
        store = FolderStore(tmp_path / str(change))
        if survives(change, partial(store.write, MODEL, b"x" * 100)):
            break
        num_deaths += 1
        assert store.list() in ([], [MODEL])
        if store.list():
            assert store.read(MODEL) == b"x" * 100
        else:
            store.write(MODEL, b"again")
            assert store.read(MODEL) == b"again"
        store.delete(MODEL)
        assert list((tmp_path / str(change)).iterdir()) == []
    assert num_deaths > 10


@pytest.mark.parametrize("kind", [FolderStore, DriveStore])
def test_death_while_deleting_harms_no_other_file(kind: type[FolderStore], tmp_path: Path) -> None:
    num_deaths = 0
    for change in range(1000):
        store = kind(tmp_path / str(change))
        store.write(MODEL, b"x")
        store.write("cifar/000005-ab12cd/x", b"other")
        if survives(change, partial(store.delete, MODEL)):
            break
        num_deaths += 1
        assert store.read("cifar/000005-ab12cd/x") == b"other"
        store.delete(MODEL)
        assert store.list() == ["cifar/000005-ab12cd/x"]
    assert num_deaths > 2


def test_after_death_a_file_on_drive_is_absent_torn_or_whole_and_can_be_written(
    tmp_path: Path,
) -> None:
    num_deaths = 0
    for change in range(1000):
        store = DriveStore(tmp_path / str(change))
        if survives(change, partial(store.write, MODEL, b"x" * 100)):
            break
        num_deaths += 1
        store.write(MODEL, b"x" * 100)
        assert store.read(MODEL) == b"x" * 100
    assert num_deaths > 3


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_counts(
    tmp_path: Path,
) -> None:
    open_paths: dict[str, str] = {}
    seen: list[tuple[str, str]] = []

    def act(name: str, args: tuple[Any, ...]) -> None:
        if name == "open":
            open_paths["last"] = Path(args[0]).name
        seen.append((name, open_paths["last"] if name == "fsync" else ""))

    with watched(act):
        FolderStore(tmp_path / "root").write(MODEL, b"x")
    order = [step for step in seen if step[0] in ("mkdir", "fsync", "replace")]
    assert order == [
        ("mkdir", ""),
        ("fsync", tmp_path.name),
        ("mkdir", ""),
        ("fsync", "root"),
        ("mkdir", ""),
        ("fsync", "cifar"),
        ("fsync", ".model.safetensors.tmp"),
        ("replace", ""),
        ("fsync", "000004-ab12cd"),
    ]


@pytest.mark.parametrize("kind", [FolderStore, DriveStore])
def test_a_system_that_takes_few_bytes_at_once_still_gets_all(
    kind: type[FolderStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data[:3])))
    kind(tmp_path / "x").write(MODEL, b"0123456789")
    assert kind(tmp_path / "x").read(MODEL) == b"0123456789"


@pytest.mark.parametrize("kind", [FolderStore, DriveStore])
@pytest.mark.parametrize("call", ["write", "fsync", "close"])
def test_a_failed_write_is_told_and_leaves_nothing(
    kind: type[FolderStore], call: str, tmp_path: Path
) -> None:
    store = kind(tmp_path / "x")
    store.write(RECEIPT, b"kept")
    file: list[int] = []

    def act(name: str, args: tuple[Any, ...]) -> None:
        if name == "write":
            file[:] = [args[0]]
        if name == call and args[0] in file:
            if name == "close":
                os.fsync(file.pop())
            raise OSError(errno.EIO, "Input/output error")

    with watched(act), pytest.raises(StoreError, match="Input/output error") as caught:
        store.write(MODEL, b"x" * 1000)
    assert isinstance(caught.value.__cause__, OSError)
    assert "intact" in str(caught.value)
    assert store.list() == [RECEIPT] and store.read(RECEIPT) == b"kept"
    assert [path.name for path in (tmp_path / "x/cifar/000004-ab12cd").iterdir()] == [MANIFEST]


def test_temp_files_are_never_listed_and_go_when_the_name_is_written(tmp_path: Path) -> None:
    home = tmp_path / "cifar/000004-ab12cd"
    home.mkdir(parents=True)
    (home / ".model.safetensors.tmp").write_bytes(b"left by a crash, and longer")
    store = FolderStore(tmp_path)
    assert store.list() == []
    store.write(MODEL, b"short")
    assert store.read(MODEL) == b"short"
    assert [path.name for path in home.iterdir()] == ["model.safetensors"]


def test_temp_files_go_with_the_folder(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write(RECEIPT, b"x")
    (tmp_path / "cifar/000004-ab12cd/.model.safetensors.tmp").write_bytes(b"left by a crash")
    store.delete(RECEIPT)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_a_crash_left_only_temp_files_goes_at_a_later_write(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    left, live = tmp_path / "cifar/000001-aaaaaa", tmp_path / "cifar/000002-aaaaaa"
    for path in (left, live):
        path.mkdir(parents=True)
        (path / ".model.safetensors.tmp").write_bytes(b"x")
    long_ago = time.time() - 2 * 3600
    os.utime(left / ".model.safetensors.tmp", (long_ago, long_ago))
    store.write("cifar/000000-aaaaaa/x", b"whole files stay")
    long_ago_too = tmp_path / "cifar/000000-aaaaaa/x"
    os.utime(long_ago_too, (long_ago, long_ago))
    store.write(MODEL, b"x")
    assert not left.exists()
    assert (live / ".model.safetensors.tmp").exists(), "another notebook may be writing it"
    assert store.list() == ["cifar/000000-aaaaaa/x", MODEL]


def test_a_folder_that_another_process_removes_meanwhile_fails_no_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "cifar/000001-aaaaaa"
    gone.mkdir(parents=True)
    real = os.listdir

    def listdir(folder: Any) -> list[str]:
        if Path(folder) == gone:
            gone.rmdir()
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    FolderStore(tmp_path).write(MODEL, b"x")
    assert not gone.exists() and FolderStore(tmp_path).read(MODEL) == b"x"


def test_what_others_put_into_the_folder_is_not_listed_and_not_removed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write(MODEL, b"x")
    (tmp_path / "cifar/.ipynb_checkpoints").mkdir()
    (tmp_path / "cifar/my notes (1).txt").write_text("x")
    (tmp_path / "cifar/000004-ab12cd/deeper").mkdir()
    (tmp_path / "cifar/000004-ab12cd/deeper/x").write_text("x")
    assert store.list() == [MODEL]
    store.delete(MODEL)
    assert (tmp_path / "cifar/000004-ab12cd/deeper/x").exists()
    assert (tmp_path / "cifar/my notes (1).txt").exists()


def test_links_inside_the_root_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "id").mkdir(parents=True)
    (outside / "id/x").write_text("secret")
    root = tmp_path / "root"
    (root / "cifar/id").mkdir(parents=True)
    (root / "evil").symlink_to(outside)
    (root / "cifar/id/x").symlink_to(outside / "id/x")
    store = FolderStore(root)
    assert store.list() == []
    for act in (
        lambda: store.list("evil"),
        lambda: store.read("evil/id/x"),
        lambda: store.read("cifar/id/x"),
        lambda: store.write("evil/id/y", b"x"),
        lambda: store.write("cifar/id/x", b"x"),
        lambda: store.delete("evil/id/x"),
    ):
        with pytest.raises(StoreError):
            act()
    store.delete("cifar/id/x")
    assert [path.name for path in outside.rglob("*")] == ["id", "x"]
    assert (outside / "id/x").read_text() == "secret"


@pytest.mark.parametrize("is_mounted", [True, False])
def test_a_checkpoint_that_was_moved_and_linked_back_is_not_passed_over(
    tmp_path: Path, is_mounted: bool
) -> None:
    store, home = FolderStore(tmp_path / "root"), tmp_path / "root/cifar/000004-ab12cd"
    store.write("cifar/000004-ab12cd/manifest.json", b"{}")
    (tmp_path / "root/cifar/newest").symlink_to(home)  # for the user's own eyes
    (tmp_path / "notes").mkdir()
    (tmp_path / "root/cifar/notes").symlink_to(tmp_path / "notes")
    assert store.list("cifar") == ["cifar/000004-ab12cd/manifest.json"]
    large = tmp_path / "large disk"
    home.rename(large)
    home.symlink_to(large)
    if not is_mounted:
        large.rename(tmp_path / "unplugged")
    with pytest.raises(StoreError, match=r"(?s)000004-ab12cd leads to .* through a link.*store="):
        store.list("cifar")
    assert store.list() == []
    home.unlink()
    (large if is_mounted else tmp_path / "unplugged").rename(home)
    assert store.list("cifar") == ["cifar/000004-ab12cd/manifest.json"]


def test_a_device_is_no_file(tmp_path: Path) -> None:
    home = tmp_path / "cifar/000004-ab12cd"
    home.mkdir(parents=True)
    null = os.stat("/dev/null")
    try:
        os.mknod(home / "model.safetensors", null.st_mode, null.st_rdev)
    except PermissionError:
        pytest.skip("this user may not make a device")
    assert FolderStore(tmp_path).list() == []
    with pytest.raises(StoreError, match="not a regular file"):
        FolderStore(tmp_path).read(MODEL)


def test_a_root_that_is_a_link_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = FolderStore(tmp_path / "link")
    store.write(MODEL, b"x")
    assert store.list() == FolderStore(tmp_path / "real").list() == [MODEL]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with these options."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        if os.name != "posix" or os.geteuid() != 0:
            pytest.skip("only root can mount a tmpfs")
        path = tmp_path / f"mount{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"no tmpfs here: {result.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("kind", [FolderStore, DriveStore])
def test_a_full_disk_is_told_and_what_was_there_is_intact(
    kind: type[FolderStore], mount: Callable[[str], Path]
) -> None:
    store = kind(mount("size=1m") / "nbtrain")
    store.write(MODEL, b"x" * 300_000)
    with pytest.raises(StoreError, match="No space left on device") as caught:
        store.write("cifar/000005-ab12cd/model.safetensors", b"y" * 1_000_000)
    assert "Free space" in str(caught.value) and store.place in str(caught.value)
    assert store.list() == [MODEL] and store.read(MODEL) == b"x" * 300_000
    store.write("cifar/000006-ab12cd/model.safetensors", b"z" * 600_000)


@pytest.mark.parametrize("kind", [FolderStore, DriveStore])
def test_a_read_only_place_opens_and_says_so_at_the_first_write(
    kind: type[FolderStore], mount: Callable[[str], Path]
) -> None:
    store = kind(mount("ro") / "nbtrain")
    assert store.list() == []
    with pytest.raises(StoreError, match=r"(?s)Read-only file system.*store="):
        store.write(MODEL, b"x")


# Google Drive


def test_drive_gives_the_final_name_at_once_and_never_renames(tmp_path: Path) -> None:
    opened: list[tuple[str, int]] = []

    def act(name: str, args: tuple[Any, ...]) -> None:
        assert name not in ("replace", "truncate", "ftruncate")
        if name == "open" and args[1] & os.O_CREAT:
            opened.append((str(args[0]), args[1] & (os.O_EXCL | os.O_TRUNC | os.O_APPEND)))

    store = DriveStore(tmp_path / "nbtrain")
    with watched(act):
        store.write(MODEL, b"x")
    assert opened == [(str(tmp_path / "nbtrain" / MODEL), os.O_EXCL)]
    assert (store.degree, store.is_remote) == ("copied", True)


def test_drive_empties_a_file_before_it_goes_to_the_trash(tmp_path: Path) -> None:
    store = DriveStore(tmp_path / "nbtrain")
    store.write(MODEL, b"x" * 1000)
    sizes = []
    with watched(
        lambda name, args: sizes.append(Path(args[0]).stat().st_size) if name == "unlink" else None
    ):
        store.delete(MODEL)
    assert sizes == [0]


@pytest.mark.parametrize("root", ["MyDrive/nbtrain", "My Drive/deep/down/nbtrain", "plain/nbtrain"])
def test_an_unmounted_drive_is_an_error_and_never_an_empty_place(root: str, tmp_path: Path) -> None:
    store = DriveStore(tmp_path / root)
    for act in (
        store.list,
        lambda: store.read(MODEL),
        lambda: store.write(MODEL, b"x"),
        lambda: store.delete(MODEL),
    ):
        with pytest.raises(StoreError, match=r"drive\.mount"):
            act()
    assert list(tmp_path.iterdir()) == [], "a write without a mount would end on the wrong disk"


def test_folders_inside_a_mounted_drive_are_made(tmp_path: Path) -> None:
    (tmp_path / "My Drive").mkdir()
    store = DriveStore(tmp_path / "My Drive/deep/down/nbtrain")
    store.write(MODEL, b"x")
    assert store.list() == [MODEL]


class Mounted(NamedTuple):
    top: Path  # the mount, as /content/drive/MyDrive
    cloud: Path  # what has been uploaded
    server: subprocess.Popen[str]

    def say(self, word: str) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(f"{word}\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Mounted]:
    """A real mount of type fuse.drive, served by a process of its own."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened here")
    paths = [tmp_path / name for name in ("cache", "MyDrive", "cloud")]
    for path in paths:
        path.mkdir()
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("drivefs.py")), *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None and server.stderr is not None
    try:
        if not server.stdout.readline():
            pytest.skip(f"no FUSE mount here: {server.stderr.read().strip()[-200:]}")
        yield Mounted(paths[1], paths[2], server)
    finally:
        server.kill()
        server.wait()
        subprocess.run(["umount", "-l", str(paths[1])], check=False, capture_output=True)
        for pipe in (server.stdin, server.stdout, server.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def test_a_store_on_a_real_mount_keeps_the_contract(drive: Mounted) -> None:
    store = DriveStore(drive.top / "nbtrain")
    assert store.list() == []
    big = bytes(range(256)) * 4000
    store.write(MODEL, big)
    store.write(RECEIPT, b"{}")
    assert store.read(MODEL) == big
    assert store.list() == sorted([MODEL, RECEIPT])
    with pytest.raises(StoreError, match="exists already"):
        store.write(RECEIPT, b"[]")
    store.delete(RECEIPT)
    store.delete(MODEL)
    assert store.list() == [] and list((drive.top / "nbtrain").iterdir()) == []
    assert drive.say("trash") == 0


def test_a_store_that_renames_is_caught_by_this_mount(drive: Mounted) -> None:
    with pytest.raises(StoreError, match="not implemented"):
        FolderStore(drive.top / "nbtrain").write(MODEL, b"x")


def test_what_was_written_to_a_mount_is_in_the_cloud_only_later(drive: Mounted) -> None:
    store = DriveStore(drive.top / "nbtrain")
    store.write(MODEL, b"x" * 1000)
    assert store.read(MODEL) == b"x" * 1000
    assert list(drive.cloud.rglob("*")) == []
    assert store.degree == "copied"
    assert drive.say("upload") == [f"nbtrain/{MODEL}"]
    assert (drive.cloud / "nbtrain" / MODEL).read_bytes() == b"x" * 1000


def test_when_the_server_of_the_mount_dies_the_error_says_how_to_mount_again(
    drive: Mounted,
) -> None:
    store = DriveStore(drive.top / "nbtrain")
    store.write(MODEL, b"x")
    drive.say("upload")
    store.write(RECEIPT, b"{}")
    drive.server.kill()
    drive.server.wait()
    for act in (
        store.list,
        lambda: store.read(MODEL),
        lambda: store.write("cifar/000005-ab12cd/x", b"x"),
        lambda: store.delete(MODEL),
    ):
        with pytest.raises(StoreError) as caught:
            act()
        assert isinstance(caught.value.__cause__, OSError)
        assert 'drive.mount("/content/drive", force_remount=True)' in str(caught.value)
    uploaded = [path.name for path in drive.cloud.rglob("*") if path.is_file()]
    assert uploaded == ["model.safetensors"]


# Kaggle


def checkpoint_in(
    home: Path, session: object = "cifar", id: object = "000004-ab12cd", model: bytes = b"weights"
) -> Path:
    """Lay out a checkpoint as an earlier run left it."""
    home.mkdir(parents=True)
    (home / "model.safetensors").write_bytes(model)
    manifest = {
        "format": "nbtrain/1",
        "session": session,
        "id": id,
        "files": {"model.safetensors": {"bytes": len(model), "sha256": "0" * 64}},
    }
    (home / MANIFEST).write_text(json.dumps(manifest))
    return home


@pytest.fixture
def kaggle(tmp_path: Path) -> KaggleStore:
    return KaggleStore(tmp_path / "working/nbtrain", [tmp_path / "input"])


@pytest.mark.parametrize(
    "where",
    [
        "my-run/nbtrain/cifar/000004-ab12cd",
        "notebooks/anna/my-run/nbtrain/cifar/000004-ab12cd",
        "datasets/anna/my-run/nbtrain/cifar/000004-ab12cd",
        "my-run",
        "my-run/unpacked somewhere/else (1)",
    ],
)
def test_a_checkpoint_is_found_by_its_manifest_wherever_it_lies(
    where: str, kaggle: KaggleStore, tmp_path: Path
) -> None:
    checkpoint_in(tmp_path / "input" / where)
    assert kaggle.list() == kaggle.list("cifar") == sorted([MODEL, RECEIPT])
    assert kaggle.list("other") == kaggle.list("cifar/000005-ab12cd") == []
    assert kaggle.read(MODEL) == b"weights"
    assert kaggle.degree == "local" and not kaggle.is_remote


def test_neither_times_nor_the_order_of_copies_matter(kaggle: KaggleStore, tmp_path: Path) -> None:
    for number, where in ((5, "b/x"), (3, "a/z"), (4, "c/y")):
        home = checkpoint_in(
            tmp_path / "input" / where, id=f"00000{number}-ab12cd", model=b"x" * number
        )
        for path in home.iterdir():
            os.utime(path, (0, 0))
    ids = [f"00000{number}-ab12cd" for number in (3, 4, 5)]
    assert kaggle.list() == sorted(
        f"cifar/{id}/{file}" for id in ids for file in (MANIFEST, "model.safetensors")
    )
    for id, size in zip(ids, (3, 4, 5), strict=True):
        assert kaggle.read(f"cifar/{id}/model.safetensors") == b"x" * size


@pytest.mark.parametrize("damaged", ["a", "b"])
@pytest.mark.parametrize("how", ["short", "absent"])
def test_a_whole_copy_wins_over_a_damaged_one(
    damaged: str, how: str, kaggle: KaggleStore, tmp_path: Path
) -> None:
    for where in ("a", "b"):
        checkpoint_in(tmp_path / "input" / where)
    model = tmp_path / "input" / damaged / "model.safetensors"
    if how == "short":
        model.write_bytes(b"wei")
    else:
        model.unlink()
    assert kaggle.read(MODEL) == b"weights"
    assert kaggle.list() == sorted([MODEL, RECEIPT])


def test_of_several_whole_copies_the_first_by_path_is_served(
    kaggle: KaggleStore, tmp_path: Path
) -> None:
    for where in ("c", "a", "b"):
        checkpoint_in(tmp_path / "input" / where, model=where.encode())
    assert kaggle.read(MODEL) == b"a"


def test_a_checkpoint_with_only_damaged_copies_is_shown_so_that_it_can_be_named(
    kaggle: KaggleStore, tmp_path: Path
) -> None:
    for where in ("a", "b"):
        (checkpoint_in(tmp_path / "input" / where) / "model.safetensors").unlink()
    assert kaggle.list() == [RECEIPT]
    with pytest.raises(StoreError):
        kaggle.read(MODEL)


def test_the_output_wins_while_it_is_whole_and_is_never_mixed_with_an_input(
    kaggle: KaggleStore, tmp_path: Path
) -> None:
    attached = checkpoint_in(tmp_path / "input/a", model=b"in the input")
    (attached / "only-there").write_bytes(b"x")
    home = checkpoint_in(kaggle.root / "cifar/000004-ab12cd", model=b"in the output")
    (home / "extra").write_bytes(b"x")
    assert kaggle.read(MODEL) == b"in the output"
    assert kaggle.list() == sorted([MODEL, RECEIPT, "cifar/000004-ab12cd/extra"])
    (home / "model.safetensors").write_bytes(b"torn")
    assert kaggle.read(MODEL) == b"in the input"
    assert kaggle.list() == sorted([MODEL, RECEIPT, "cifar/000004-ab12cd/only-there"])
    with pytest.raises(StoreError):
        kaggle.read("cifar/000004-ab12cd/extra")


def test_inputs_are_never_changed(kaggle: KaggleStore, tmp_path: Path) -> None:
    home = checkpoint_in(tmp_path / "input/a")
    kaggle.delete(MODEL)
    kaggle.delete(RECEIPT)
    kaggle.write("cifar/000005-ab12cd/x", b"new")
    assert sorted(path.name for path in home.iterdir()) == [MANIFEST, "model.safetensors"]
    assert kaggle.list() == sorted([MODEL, RECEIPT, "cifar/000005-ab12cd/x"])
    assert (kaggle.root / "cifar/000005-ab12cd/x").read_bytes() == b"new"


def test_the_search_ends_at_a_depth_of_eight(kaggle: KaggleStore, tmp_path: Path) -> None:
    checkpoint_in(tmp_path / "input/1/2/3/4/5/6/7/8", id="000008-ab12cd")
    checkpoint_in(tmp_path / "input/one/2/3/4/5/6/7/8/9", id="000009-ab12cd")
    assert {name.split("/")[1] for name in kaggle.list()} == {"000008-ab12cd"}


def test_folders_of_many_files_are_not_searched(kaggle: KaggleStore, tmp_path: Path) -> None:
    checkpoint_in(tmp_path / "input/images/run/x", id="000001-ab12cd")
    checkpoint_in(tmp_path / "input/fewer/run/x", id="000002-ab12cd")
    for number in range(999):
        (tmp_path / f"input/images/{number}.png").touch()
        (tmp_path / f"input/fewer/{number}.png").touch()
    assert len(os.listdir(tmp_path / "input/images")) == 1000
    (tmp_path / "input/images/last.png").touch()
    assert {name.split("/")[1] for name in kaggle.list()} == {"000002-ab12cd"}


def test_links_in_the_inputs_are_skipped(kaggle: KaggleStore, tmp_path: Path) -> None:
    elsewhere = checkpoint_in(tmp_path / "elsewhere/run")
    (tmp_path / "input").mkdir()
    (tmp_path / "input/link").symlink_to(elsewhere)
    (tmp_path / "input/loop").symlink_to(tmp_path / "input")
    home = checkpoint_in(tmp_path / "input/a", id="000005-ab12cd")
    (home / "secret").symlink_to("/etc/passwd")
    assert kaggle.list() == [
        f"cifar/000005-ab12cd/{MANIFEST}",
        "cifar/000005-ab12cd/model.safetensors",
    ]
    with pytest.raises(StoreError):
        kaggle.read("cifar/000005-ab12cd/secret")


@pytest.mark.parametrize(
    ("session", "id"),
    [
        *(("../../x", "000004-ab12cd"), ("cifar", ".."), ("/etc", "x"), ("cifar/x", "000004-ab12cd")),
        *((None, "x"), (["cifar"], "x"), ("cifar", 4), ("", "")),
    ],
)
def test_a_hostile_manifest_names_nothing(
    session: object, id: object, kaggle: KaggleStore, tmp_path: Path
) -> None:
    checkpoint_in(tmp_path / "input/evil", session, id)
    with pytest.warns(NbtrainWarning, match="evil"):
        assert kaggle.list() == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[1, 2]",
        b'"nbtrain/1"',
        b"[" * 100_000,
        b'{"format": "webextension", "session": "cifar", "id": "000004-ab12cd", "files": {}}',
        b'{"format": 1, "session": "cifar", "id": "000004-ab12cd", "files": {}}',
        b'{"session": "cifar", "id": "000004-ab12cd", "files": {}}',
    ],
)
def test_a_manifest_that_is_not_ours_is_passed_over(
    content: bytes, kaggle: KaggleStore, tmp_path: Path
) -> None:
    checkpoint_in(tmp_path / "input/a")
    other = tmp_path / "input/0 comes first"
    other.mkdir()
    (other / MANIFEST).write_bytes(content)
    assert kaggle.list() == sorted([MODEL, RECEIPT])


@pytest.mark.parametrize(
    "files",
    [
        {"../../secret": {"bytes": 6}},
        {"model.safetensors": {"bytes": "7"}},
        {"model.safetensors": 7},
        {"model.safetensors": {}},
        ["model.safetensors"],
        None,
    ],
)
def test_a_manifest_with_odd_files_is_no_whole_copy(
    files: object, kaggle: KaggleStore, tmp_path: Path
) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "secret").write_text("secret")
    odd = checkpoint_in(tmp_path / "input/a", model=b"odd")
    odd_manifest = json.loads((odd / MANIFEST).read_text()) | {"files": files}
    (odd / MANIFEST).write_text(json.dumps(odd_manifest))
    assert kaggle.read(MODEL) == b"odd"
    checkpoint_in(tmp_path / "input/b")
    assert KaggleStore(kaggle.root, kaggle.inputs).read(MODEL) == b"weights"


def test_an_output_becomes_the_next_runs_input(tmp_path: Path) -> None:
    first = KaggleStore(tmp_path / "first", [tmp_path / "input"])
    home = checkpoint_in(tmp_path / "made")
    for path in home.iterdir():
        first.write(f"cifar/000004-ab12cd/{path.name}", path.read_bytes())
    shutil.copytree(first.root, tmp_path / "input/notebooks/anna/first/nbtrain")
    second = KaggleStore(tmp_path / "second", [tmp_path / "input"])
    assert second.list() == first.list() and second.read(MODEL) == b"weights"


# fsspec


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """An object store: it has keys and no folders, and is asked for none."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("s3://", "memory://")))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError("an object store has no folders to make")

    def rmdir(self, path: str) -> None:
        raise AssertionError("an object store has no folders to remove")

    def isdir(self, path: str) -> bool:
        raise AssertionError("an object store has no folders to ask for")


def test_an_object_store_is_durable_and_other_protocols_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(_registry, "s3", Bucket)
    bucket = FsspecStore(f"s3://bucket{tmp_path}")
    bucket.write(MODEL, b"x")
    assert bucket.list() == [MODEL]
    bucket.delete(MODEL)
    assert bucket.list() == []
    assert (bucket.degree, bucket.is_remote) == ("durable", True)
    assert FsspecStore("memory://x").degree == "unknown"


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        known_implementations,
        "s3",
        {"class": "no_such_package.S3", "err": "Install s3fs to access S3"},
    )
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(StoreError, match="%pip install s3fs"):
        FsspecStore("s3://bucket/nbtrain")


def test_an_unknown_protocol_is_a_bad_argument() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        FsspecStore("nosuch://bucket")


def test_whatever_a_protocol_raises_becomes_a_store_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = FsspecStore(f"memory://{tmp_path}")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the service is tired")

    for method in ("find", "cat_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(store._fs, method, fail)
    for act in (
        store.list,
        lambda: store.read(MODEL),
        lambda: store.write(MODEL, b"x"),
        lambda: store.delete(MODEL),
    ):
        with pytest.raises(StoreError, match="the service is tired") as caught:
            act()
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_place_never_shows_a_password() -> None:
    store = FsspecStore("memory://anna:secret@host/runs?token=hidden")
    assert "secret" not in store.place + repr(store) and "hidden" not in store.place + repr(store)
    assert "host/runs" in store.place


def test_two_stores_in_memory_share_nothing() -> None:
    one, other = MemoryStore("same"), MemoryStore("same")
    one.write(MODEL, b"x")
    assert other.list() == []


# find_store


class Here(NamedTuple):
    name: str
    output: Path
    inputs: tuple[Path, ...] = ()
    drive_mounted: bool = False


LOCAL = Here("local", Path("/home/anna/nbtrain-sessions"))
KAGGLE = Here("kaggle", Path("/kaggle/working/nbtrain"), (Path("/kaggle/input"),))
COLAB = Here("colab", Path("/content/drive/MyDrive/nbtrain"), drive_mounted=True)
UNMOUNTED = COLAB._replace(drive_mounted=False)


def test_each_host_has_its_best_place() -> None:
    local, kaggle, colab = (find_store(None, host) for host in (LOCAL, KAGGLE, COLAB))
    assert type(local) is FolderStore and local.root == LOCAL.output
    assert local.degree == "durable"
    assert type(kaggle) is KaggleStore and kaggle.root == KAGGLE.output
    assert kaggle.inputs == KAGGLE.inputs
    assert type(colab) is DriveStore and colab.root == COLAB.output


def test_a_url_is_fsspec_a_store_is_itself(tmp_path: Path) -> None:
    assert isinstance(find_store("memory://x", COLAB), FsspecStore)
    assert isinstance(find_store(f"file://{tmp_path}", LOCAL), FsspecStore)
    store = MemoryStore()
    assert find_store(store, KAGGLE) is store


def test_a_folder_is_taken_as_what_it_lies_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("runs", Path("runs"), tmp_path / "runs"):
        store = find_store(given, LOCAL)
        assert type(store) is FolderStore and store.root == tmp_path / "runs"
    for given in ("/content/drive/MyDrive/x", "/content/drive/Shareddrives/team/x"):
        assert type(find_store(given, COLAB)) is DriveStore
    store = find_store("/kaggle/working/mine", KAGGLE)
    assert type(store) is KaggleStore and store.root == Path("/kaggle/working/mine")
    assert store.inputs == KAGGLE.inputs


def test_a_link_to_drive_is_drive(tmp_path: Path) -> None:
    (tmp_path / "MyDrive").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "MyDrive")
    assert type(find_store(tmp_path / "link/x", COLAB)) is DriveStore


def test_the_disk_of_a_rented_machine_is_not_called_durable() -> None:
    for host, given in ((COLAB, "/content/runs"), (KAGGLE, "/tmp/runs")):
        store = find_store(given, host)
        assert type(store) is FolderStore and store.degree == "local"
    assert find_store("/kaggle/working/../temp/runs", KAGGLE).degree == "local"
    assert type(find_store("/kaggle/working/../temp/runs", KAGGLE)) is FolderStore


@pytest.mark.parametrize("given", ["", 3, b"x", [], object(), {}])
def test_anything_else_is_a_bad_argument(given: Any) -> None:
    with pytest.raises(ValueError, match="store is a folder"):
        find_store(given, LOCAL)


@pytest.mark.parametrize("given", [None, "/content/drive/MyDrive/x"])
def test_without_a_browser_an_unmounted_drive_is_an_error_with_the_line_to_run(
    given: str | None,
) -> None:
    with pytest.raises(StoreError) as caught:
        find_store(given, UNMOUNTED)
    assert 'from google.colab import drive; drive.mount("/content/drive")' in str(caught.value)


class Asked(NamedTuple):
    mounts: list[str]
    fails: list[Exception]


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """A Colab with somebody in front of it."""
    asked = Asked([], [])

    def mount(path: str) -> None:
        asked.mounts.append(path)
        if asked.fails:
            raise asked.fails[0]

    modules = {name: types.ModuleType(name) for name in ("google", "google.colab")}
    drive = types.ModuleType("google.colab.drive")
    drive.mount = mount  # type: ignore[attr-defined]
    for name, module in {**modules, "google.colab.drive": drive}.items():
        module.__path__ = []
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    shell = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    (tmp_path / "hostname").touch()
    monkeypatch.setattr(find, "_COLAB_HOSTNAME", tmp_path / "hostname")
    return asked


@pytest.mark.parametrize("given", [None, "/content/drive/MyDrive/x"])
def test_in_a_browser_drive_is_asked_for(given: str | None, browser: Asked) -> None:
    assert type(find_store(given, UNMOUNTED)) is DriveStore
    assert browser.mounts == ["/content/drive"]


def test_a_mounted_drive_is_not_asked_for_again(browser: Asked) -> None:
    find_store(None, COLAB)
    find_store("/content/runs", UNMOUNTED)
    assert browser.mounts == []


def test_a_refused_mount_is_told(browser: Asked) -> None:
    browser.fails.append(ValueError("mount failed"))
    with pytest.raises(StoreError, match=r"mount failed.*(?s:.*)drive\.mount"):
        find_store(None, UNMOUNTED)


def test_nobody_is_asked_from_a_thread(browser: Asked) -> None:
    failures: list[Exception] = []

    def work() -> None:
        try:
            find_store(None, UNMOUNTED)
        except StoreError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(failures) == 1 and browser.mounts == []


@pytest.mark.parametrize("missing", ["kernel", "hostname", "package"])
def test_nobody_is_asked_where_nobody_can_answer(
    missing: str, browser: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "kernel":
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    elif missing == "hostname":
        (tmp_path / "hostname").unlink()
    else:
        monkeypatch.delitem(sys.modules, "google.colab")
    with pytest.raises(StoreError, match="only you can allow it"):
        find_store(None, UNMOUNTED)
    assert browser.mounts == []
