"""A checkpoint exists if and only if its manifest does, and what is damaged is named, not used.

Whatever happens to a file, the newest checkpoint that is whole is loaded, nothing is removed because
it is damaged, and where none is whole there is an error and never a fresh start.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits, bits, build, session
from safetensors.torch import load_file, load_model
from torch import nn

import nbtrain
from nbtrain import CheckpointError, NbtrainWarning, StoreError, checkpoint
from nbtrain.budget import Budget
from nbtrain.checkpoint import MODEL, PARTS, RECIPE, STATE, Manifest, Snapshot
from nbtrain.saving import Saver
from nbtrain.stores import MANIFEST, FolderStore, MemoryStore, Store

PAYLOAD = (MODEL, PARTS, STATE, RECIPE)
HTML = b"<!DOCTYPE html><html><body>Sign in to continue to Google Drive</body></html>"


def snapshot(
    number: int, *, step: int | None = None, valid_loss: float | None = None, stage: int = 0
) -> Snapshot:
    """Make a snapshot in which every file says the number."""
    return Snapshot(
        number=number,
        model={"weight": torch.full((3,), float(number))},
        tensors={"optimizer/0": torch.full((3,), float(number))},
        state={"number": number},
        recipe=f"NUMBER = {number}\n",
        facts={"step": number if step is None else step, "valid_loss": valid_loss, "stage": stage},
    )


def commits(store: Store, *numbers: int, **facts: Any) -> list[Manifest]:
    """Commit checkpoints, and return their manifests, newest first."""
    made = [checkpoint.commit(store, "s", snapshot(number, **facts)) for number in numbers]
    return made[::-1]


def files(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def numbers(manifests: list[Manifest]) -> list[int]:
    return [manifest.number for manifest in manifests]


def good(store: Store, name: str = "s") -> list[int]:
    """Return the numbers of the checkpoints that load, newest first."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NbtrainWarning)
        for manifest in checkpoint.find([store], name):
            with contextlib.suppress(CheckpointError):
                found.append(checkpoint.load(manifest).number)
    return found


def told(action: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what an action gives, and the warnings of it."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = action()
    assert all(issubclass(w.category, NbtrainWarning) for w in heard)
    return result, [str(w.message) for w in heard]


def train_an_epoch(folder: Path, **changes: Any) -> nbtrain.Session:
    """Train one epoch of two, and stop."""
    run = session(folder, **changes)
    for batch in run:
        if run.epoch == 1:
            break
        loss, _, _ = run.task.run(batch)
        run.update(loss)
    return run


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a session of one epoch; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("one_epoch") / "store"
    train_an_epoch(folder)
    return folder


# ---------------------------------------------------------------------------------------- damage

DAMAGES: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "truncated": lambda data, other: data[: len(data) // 2],
    "short of its last byte": lambda data, other: data[:-1],
    "longer by a byte": lambda data, other: data + b"x",
    "emptied": lambda data, other: b"",
    "one bit flipped": lambda data, other: flipped(data, len(data) // 2),
    "the last bit flipped": lambda data, other: flipped(data, len(data) - 1),
    "an HTML page": lambda data, other: HTML,
    "another checkpoint's": lambda data, other: other,
    "deleted": lambda data, other: None,
}


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def do_damage(path: Path, damage: str, other: bytes) -> None:
    damaged = DAMAGES[damage](path.read_bytes(), other)
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*PAYLOAD, MANIFEST])
def test_where_a_file_is_damaged_it_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, file: str, damage: str
) -> None:
    store = FolderStore(tmp_path)
    newest, before, _ = commits(store, 1, 2, 3)
    do_damage(tmp_path / newest.path(file), damage, (tmp_path / before.path(file)).read_bytes())
    here = files(tmp_path)
    (manifest, loaded), heard = told(lambda: checkpoint.load_newest(checkpoint.find([store], "s")))
    assert manifest == before
    assert (loaded.number, loaded.state, loaded.recipe) == (2, {"number": 2}, "NUMBER = 2\n")
    assert torch.equal(loaded.model["weight"], torch.full((3,), 2.0))
    assert torch.equal(loaded.tensors["optimizer/0"], torch.full((3,), 2.0))
    if (file, damage) == (MANIFEST, "deleted"):
        assert not heard  # without a manifest there is no checkpoint, as after a cut commit
    else:
        assert len(heard) == 1
        assert newest.path(file) in heard[0] and "set aside" in heard[0]
    assert files(tmp_path) == here


def test_a_manifest_with_any_bit_flipped_is_set_aside_by_name() -> None:
    store = MemoryStore()
    newest, _ = commits(store, 1, 2)
    name = newest.path(MANIFEST)
    whole = store.read(name)
    for at in range(len(whole)):
        store.delete(name)
        store.write(name, flipped(whole, at))
        found, heard = told(lambda: checkpoint.find([store], "s"))
        assert numbers(found) == [1], whole[at - 9 : at + 9]
        assert len(heard) == 1 and name in heard[0] and "set aside" in heard[0]


@pytest.mark.parametrize("file", [*PAYLOAD, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "emptied", "deleted"])
def test_where_all_are_damaged_there_is_an_error_and_never_a_fresh_start(
    one_epoch: Path, tmp_path: Path, file: str, damage: str
) -> None:
    folder = shutil.copytree(one_epoch, tmp_path / "store")
    for path in sorted(folder.rglob(file)):
        do_damage(path, damage, b"")
    here = files(folder)
    with pytest.raises(CheckpointError, match=r"(?s) is whole.*Nothing was removed"):
        told(lambda: session(folder))
    with pytest.raises(CheckpointError, match=r"Nothing was removed|No checkpoint can be read"):
        told(lambda: nbtrain.resume("tiny", store=folder, trust_code=True))
    assert files(folder) == here


def test_a_session_whose_very_first_commit_was_cut_off_begins_anew(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("tiny/000001-aaaaaa/manifest.json", b'{"facts": {"st')
    run, heard = told(lambda: session(tmp_path))
    assert run.step == 0
    assert len(heard) == 1 and "tiny/000001-aaaaaa/manifest.json" in heard[0]
    assert files(tmp_path) == {"tiny/000001-aaaaaa/manifest.json": b'{"facts": {"st'}


def test_a_session_goes_on_from_the_one_before_to_the_same_bits(tmp_path: Path) -> None:
    whole = session(tmp_path / "whole").run()
    train_an_epoch(tmp_path / "cut")
    newest = checkpoint.find([FolderStore(tmp_path / "cut")], "tiny")[0]
    do_damage(tmp_path / "cut" / newest.path(MODEL), "one bit flipped", b"")
    run, heard = told(lambda: session(tmp_path / "cut"))
    assert run.step == 3
    assert len(heard) == 1 and newest.path(MODEL) in heard[0]
    run.run()
    assert_same_bits(bits(run), bits(whole))


def test_a_copy_that_is_whole_is_used_where_the_near_one_is_damaged() -> None:
    near, far = MemoryStore("near"), MemoryStore("far")
    newest, _ = commits(near, 1, 2)
    checkpoint.copy(newest, far)
    near.delete(newest.path(MODEL))
    (manifest, loaded), heard = told(lambda: checkpoint.load_newest(checkpoint.find([near, far], "s")))
    assert manifest.store is far and loaded.number == 2
    assert len(heard) == 1 and near.place in heard[0]


def test_a_damaged_checkpoint_is_never_copied() -> None:
    near, far = MemoryStore("near"), MemoryStore("far")
    (manifest,) = commits(near, 1)
    near.delete(manifest.path(MODEL))
    near.write(manifest.path(MODEL), HTML)
    with pytest.raises(CheckpointError, match=manifest.path(MODEL)):
        checkpoint.copy(manifest, far)
    assert far.list() == []


def test_a_copy_is_the_checkpoint_to_the_byte_and_can_be_made_twice() -> None:
    near, far = MemoryStore("near"), MemoryStore("far")
    (manifest,) = commits(near, 1)
    for _ in range(2):
        assert checkpoint.copy(manifest, far) == manifest
    assert {name: near.read(name) for name in near.list()} == {n: far.read(n) for n in far.list()}


# ------------------------------------------------------------------------- newer, foreign, hostile


def test_a_newer_format_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_an_epoch(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    run.save()
    monkeypatch.undo()
    here = files(tmp_path)
    with pytest.raises(CheckpointError, match="newer nbtrain") as caught:
        session(tmp_path)
    assert "\n  in checkpoint: format 3\n  in session:    format 2\n" in str(caught.value)
    assert "pip install -U nbtrain" in str(caught.value)
    assert files(tmp_path) == here


def forge(store: Store, name: str, **changes: Any) -> None:
    """Write a manifest that is intact as far as its own hash tells."""
    body = {
        "format": "nbtrain/1",
        "session": "s",
        "id": name.split("/")[1],
        "facts": {"step": 9, "valid_loss": None},
        "files": {file: {"bytes": 0, "sha256": sha256(b"").hexdigest()} for file in PAYLOAD},
    } | changes
    text = json.dumps(body, ensure_ascii=False).encode()
    body["sha256"] = sha256(text).hexdigest()
    store.write(name, json.dumps(body).encode())


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "an id that leads elsewhere": ("000009-aaaaaa", {"id": "../../x"}),
    "another id": ("000009-aaaaaa", {"id": "000009-bbbbbb"}),
    "a session that leads elsewhere": ("000009-aaaaaa", {"session": "../s"}),
    "another session": ("000009-aaaaaa", {"session": "other"}),
    "a folder that is no id": ("latest", {}),
    "an id that is a number": ("000009-aaaaaa", {"id": 9}),
    "files that lead elsewhere": ("000009-aaaaaa", {"files": {"../../../etc/passwd": {"bytes": 1}}}),
    "files that are a list": ("000009-aaaaaa", {"files": []}),
    "files that are a number": ("000009-aaaaaa", {"files": 5}),
    "no format": ("000009-aaaaaa", {"format": None}),
    "a format without a number": ("000009-aaaaaa", {"format": "nbtrain/new"}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_set_aside_by_name(kind: str) -> None:
    folder, changes = HOSTILE[kind]
    store = MemoryStore()
    commits(store, 1)
    forge(store, f"s/{folder}/manifest.json", **changes)
    found, heard = told(lambda: checkpoint.find([store], "s"))
    assert numbers(found) == [1]
    assert len(heard) == 1 and f"s/{folder}/manifest.json" in heard[0]


def test_the_forgery_of_these_tests_is_taken_for_real_where_nothing_is_wrong_with_it() -> None:
    store = MemoryStore()
    commits(store, 1)
    forge(store, "s/000009-aaaaaa/manifest.json")
    assert numbers(checkpoint.find([store], "s")) == [9, 1]


def test_a_huge_number_is_set_aside_and_the_session_goes_on_above_it(tmp_path: Path) -> None:
    train_an_epoch(tmp_path)
    huge = 10**80
    forge(FolderStore(tmp_path), f"tiny/{huge}-aaaaaa/manifest.json", session="tiny")
    run, _ = told(lambda: session(tmp_path))
    assert run.step == 3
    run.run()
    assert run.is_done
    reopened, _ = told(lambda: session(tmp_path))
    assert reopened.step == run.step


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_json_that_is_not_strict_is_refused_on_reading(word: str) -> None:
    store = MemoryStore()
    (manifest,) = commits(store, 1)
    text = f'{{"loss": {word}}}'.encode()
    entry = {"bytes": len(text), "sha256": sha256(text).hexdigest()}
    store.delete(manifest.path(STATE))
    store.write(manifest.path(STATE), text)
    forged = Manifest("s", manifest.id, manifest.facts, {**manifest.files, STATE: entry}, store)
    for reader in (checkpoint.load, checkpoint.state):
        with pytest.raises(CheckpointError, match=f"{word} is not strict JSON"):
            reader(forged)


@pytest.mark.parametrize("where", ["state", "facts"])
def test_json_that_would_not_be_strict_is_refused_before_anything_is_written(where: str) -> None:
    store = MemoryStore()
    spoilt = snapshot(1)
    getattr(spoilt, where)["loss"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.commit(store, "s", spoilt)
    assert store.list() == []


# ---------------------------------------------------------------------------- commit and retention


def test_the_manifest_is_written_last_and_removed_first() -> None:
    class Told(MemoryStore):
        done: list[tuple[str, str]] = []  # noqa: RUF012

        def write(self, name: str, data: Any) -> None:
            self.done.append(("write", name))
            super().write(name, data)

        def delete(self, name: str) -> None:
            self.done.append(("delete", name))
            super().delete(name)

    store = Told()
    made = commits(store, 1, 2, 3)
    written = [name for what, name in store.done if what == "write"]
    for manifest in made:
        mine = [name for name in written if f"/{manifest.id}/" in name]
        assert sorted(mine[:4]) == sorted(map(manifest.path, PAYLOAD)) and len(mine) == 5
        assert mine[4] == manifest.path(MANIFEST)
    checkpoint.retain(store, "s", made, 2)
    deleted = [name for what, name in store.done if what == "delete"]
    assert deleted[0] == made[2].path(MANIFEST)
    assert sorted(deleted[1:]) == sorted(map(made[2].path, PAYLOAD))


def test_a_commit_that_is_refused_anywhere_is_no_checkpoint_and_the_ones_before_are_whole() -> None:
    class Full(MemoryStore):
        left = 10**6

        def write(self, name: str, data: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise StoreError("full")
            super().write(name, data)

    for left in range(5):
        store = Full()
        commits(store, 1)
        store.left = left
        with pytest.raises(StoreError, match="full"):
            commits(store, 2)
        assert numbers(checkpoint.find([store], "s")) == good(store) == [1]


def test_the_best_is_none_of_a_way_that_was_not_gone_on_with() -> None:
    ways = {1: {3: 0.8, 4: 0.7, 5: 0.1, 6: 0.2, 7: 0.3}, 2: {5: 0.6, 6: 0.5}}  # by stage and number
    made = [
        commits(MemoryStore(), number, valid_loss=loss, stage=stage)[0]
        for stage, losses in ways.items()
        for number, loss in losses.items()
    ]
    for given in (made, made[::-1]):
        best = checkpoint.best_of(given)
        assert best is not None and (best.facts["stage"], best.number) == (2, 6)


def test_retention_keeps_the_newest_and_the_best() -> None:
    store = MemoryStore()
    losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: None, 5: 0.1, 6: 0.7}
    made = [commits(store, n, valid_loss=loss)[0] for n, loss in losses.items()]
    best = checkpoint.best_of(made)
    assert best is not None and best.number == 2  # the earliest of equals
    kept = checkpoint.retain(store, "s", made, 2, best)
    assert numbers(kept) == good(store) == [6, 5, 2]
    assert {name.split("/")[1] for name in store.list()} == {m.id for m in kept}


def test_retention_goes_by_the_order_of_commits_and_not_by_steps() -> None:
    store = MemoryStore()
    made = [commits(store, n, step=step)[0] for n, step in enumerate((900, 800, 20, 10), 1)]
    assert numbers(checkpoint.retain(store, "s", made, 2)) == good(store) == [4, 3]


def test_retention_does_not_count_what_nobody_has_verified() -> None:
    store = MemoryStore()
    sixth, fifth, fourth, *_ = commits(store, 1, 2, 3, 4, 5, 6)
    store.delete(fifth.path(MODEL))
    checkpoint.retain(store, "s", [sixth], 2)
    assert good(store) == [6, 4, 3, 2, 1]  # one good one is no reason to remove another
    checkpoint.retain(store, "s", [sixth, fourth], 2)
    assert good(store) == [6, 4]
    assert numbers(checkpoint.find([store], "s")) == [6, 5, 4]


def test_retention_leaves_everything_else_alone() -> None:
    store = MemoryStore()
    others = ["s/notes.txt", "s/latest/model.safetensors", "other/000001-aaaaaa/manifest.json"]
    for name in others:
        store.write(name, b"mine")
    made = commits(store, 1, 2, 3)
    checkpoint.retain(store, "s", made, 2)
    assert [name for name in store.list() if store.read(name) == b"mine"] == sorted(others)


def test_what_a_cut_commit_left_goes_once_it_is_older_than_what_is_kept() -> None:
    store = MemoryStore()
    store.write("s/000002-aaaaaa/model.safetensors", b"cut off")
    made = commits(store, 1, 2)
    checkpoint.retain(store, "s", made, 2)
    assert "s/000002-aaaaaa/model.safetensors" in store.list()
    made = commits(store, 3) + made
    checkpoint.retain(store, "s", made, 2)
    assert "s/000002-aaaaaa/model.safetensors" in store.list()  # it may be another notebook's
    made = commits(store, 4) + made
    checkpoint.retain(store, "s", made, 2)
    assert {name.split("/")[1] for name in store.list()} == {m.id for m in made[:2]}


@pytest.mark.parametrize("damaged", [[4], [3], [4, 3], [3, 2], [1], [4, 3, 2]])
def test_after_damage_there_are_never_fewer_good_ones_than_before_or_two(damaged: list[int]) -> None:
    store = MemoryStore()
    losses = {1: 0.9, 2: 0.3, 3: 0.1, 4: 0.2}
    made = {n: commits(store, n, valid_loss=loss)[0] for n, loss in losses.items()}
    for number in damaged:
        store.delete(made[number].path(MODEL))
    found = checkpoint.find([store], "s")
    (newest, _), _ = told(lambda: checkpoint.load_newest(found))
    saver = Saver("s", [store], 2, Budget(None, 0.0, lambda: 0.0), found, newest)
    least = min(2, len(good(store)))
    for _ in range(4):
        saver.request(snapshot(saver.next_number(), valid_loss=1.0))
        saver.wait()
        assert saver.failure() is None
        now = good(store)
        assert len(now) >= least
        assert now[0] == saver._numbers > 4  # the newest commit is the one to go on from
        least = 2


def test_damage_in_the_far_place_that_nobody_has_read_costs_no_good_one_there() -> None:
    near, far = MemoryStore("near"), MemoryStore("far")
    losses = {1: 0.9, 2: 0.3, 3: 0.1, 4: 0.2}
    made = {n: commits(near, n, valid_loss=loss)[0] for n, loss in losses.items()}
    for manifest in made.values():
        checkpoint.copy(manifest, far)
    for number in (4, 3):
        far.delete(made[number].path(MODEL))
    found = checkpoint.find([near, far], "s")
    newest, _ = checkpoint.load_newest(found)
    assert newest.store is near
    saver = Saver("s", [near, far], 2, Budget(None, 0.0, lambda: 0.0), found, newest)
    for expected in ([5, 2, 1], [6, 5]):
        saver.request(snapshot(saver.next_number(), valid_loss=1.0))
        assert saver.wait() and saver.failure() is None
        assert good(far) == expected


# ------------------------------------------------------------------------------- find, and the form


def test_find_merges_two_stores_newest_first_and_near_first() -> None:
    near, far = MemoryStore("near"), MemoryStore("far")
    made = commits(near, 1, 2, 3)
    for manifest in made[1:]:
        checkpoint.copy(manifest, far)
    commits(far, 4)
    near.delete(made[2].path(MANIFEST))
    found = checkpoint.find([near, far], "s")
    assert [(m.number, m.store) for m in found] == [(4, far), (3, near), (2, near), (2, far), (1, far)]


def test_sessions_are_those_that_have_a_manifest_in_one_of_the_stores() -> None:
    one, other = MemoryStore("one"), MemoryStore("other")
    checkpoint.commit(one, "b", snapshot(1))
    checkpoint.commit(other, "a", snapshot(1))
    other.write("c/000001-aaaaaa/model.safetensors", b"cut off")
    assert checkpoint.sessions([one, other]) == ["a", "b"]
    assert checkpoint.find([one, other], "c") == []


class Tied(nn.Module):
    """Two names for one tensor, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x)))


def tied() -> nbtrain.Task:
    task = build()
    task.model = Tied()
    task.optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.05)
    return task


@pytest.mark.parametrize("make", [build, tied])
def test_the_model_loads_with_safetensors_alone(
    tmp_path: Path, make: Callable[[], nbtrain.Task]
) -> None:
    run = train_an_epoch(tmp_path, build=make)
    newest = checkpoint.find([FolderStore(tmp_path)], "tiny")[0]
    model = make().model
    load_model(model, tmp_path / newest.path(MODEL), strict=True)
    trained = run.task.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    whole = session(tmp_path / "whole", build=tied).run()
    train_an_epoch(tmp_path / "cut", build=tied)
    newest = checkpoint.find([FolderStore(tmp_path / "cut")], "tiny")[0]
    held = load_file(tmp_path / "cut" / newest.path(MODEL))
    assert "first.weight" in held and "second.weight" not in held
    run = session(tmp_path / "cut", build=tied)
    assert run.step > 0 and run.task.model.second.weight is run.task.model.first.weight
    run.run()
    assert_same_bits(bits(run), bits(whole))
    assert torch.equal(run.best().second.weight, run.best().first.weight)


def untied() -> nbtrain.Task:
    task = tied()
    task.model.second.weight = nn.Parameter(task.model.first.weight.detach().clone())
    task.optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.05)
    return task


def test_weights_that_are_no_longer_tied_are_refused(tmp_path: Path) -> None:
    train_an_epoch(tmp_path, build=tied)
    with pytest.raises(CheckpointError, match=r"(?s)ties other.*'second.weight': 'first.weight'.*\{\}"):
        session(tmp_path, build=untied)


def test_the_manifest_is_plain_json_that_names_every_file_with_its_size_and_hash(
    tmp_path: Path,
) -> None:
    run = train_an_epoch(tmp_path)
    newest = checkpoint.find([FolderStore(tmp_path)], "tiny")[0]
    folder = (tmp_path / newest.path(MANIFEST)).parent
    body = json.loads((folder / MANIFEST).read_text())
    assert (body["format"], body["session"], body["id"]) == ("nbtrain/1", "tiny", folder.name)
    assert body["facts"]["step"] == run.step
    assert sorted([*body["files"], MANIFEST]) == sorted(path.name for path in folder.iterdir())
    for name, entry in body["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": sha256(data).hexdigest()}


def test_no_line_of_nbtrain_can_unpickle_anything() -> None:
    forbidden = re.compile(
        r"(torch|np|numpy|pandas|joblib)\.(load|save|read_pickle|to_pickle)|dill|shelve|marshal"
        r"|pickle(\..*)?|cPickle|cloudpickle|joblib"
    )
    for path in sorted(Path(nbtrain.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            assert not list(filter(forbidden.fullmatch, names)), f"{path.name}: {names}"
