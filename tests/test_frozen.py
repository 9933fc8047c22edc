"""What stands still is kept once; and whatever happens to a file, the run goes on to the same bits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    Noisy,
    assert_exact_wherever_cut,
    assert_same_bits,
    bits,
    session,
)
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset

import nbtrain
from nbtrain import CheckpointError, StoreError, checkpoint, frozen
from nbtrain.checkpoint import MODEL, Manifest, Snapshot
from nbtrain.frozen import Frozen, Still
from nbtrain.stores import FolderStore, KaggleStore, MemoryStore, Store


def backbone() -> nbtrain.Task:
    """A frozen backbone that is far larger than the head on it."""
    model = nn.Sequential(nn.Linear(6, 5000), nn.BatchNorm1d(5000), nn.ReLU(), nn.Linear(5000, 3))
    model[0].requires_grad_(False)
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=0.05)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy())


class Taught(nn.Module):
    """A student, and a teacher that follows it: frozen, and yet it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 3), nn.Linear(6, 3)
        self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.data = 0.9 * slow.data + 0.1 * fast.data  # as many a recipe has it
        return self.student(x) + self.teacher(x)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "tiny").iterdir() if p.is_file())


def test_a_run_with_a_frozen_backbone_resumes_to_the_same_bits(tmp_path: Path) -> None:
    assert_exact_wherever_cut(tmp_path, [1, 7, 8, 12], build=backbone)
    first, copy = files(tmp_path / "cut-7")
    assert frozen.NAME.fullmatch(copy) and frozen.COPY.fullmatch(first), "one for all processes"


def test_frozen_weights_are_written_once_for_all_checkpoints(tmp_path: Path) -> None:
    run = session(tmp_path, build=backbone, save_every=1e-9).run()
    found = checkpoint.find([FolderStore(tmp_path)], "tiny")
    assert len(found) > 2 and len({m.shared for m in found}) == 1
    size = sum(p.numel() * 4 for p in run.task.model[0].parameters())
    everything = sum(v.numel() * v.element_size() for v in run.task.model.state_dict().values())
    inside = (tmp_path / found[0].path(MODEL)).stat().st_size
    print(f"{inside} bytes of the model in each checkpoint, {size} once, twice over")
    assert inside < everything - size + 2000
    shared = load_file(tmp_path / found[0].path(str(found[0].shared)))
    assert sorted(shared) == ["0.bias", "0.weight"]
    model = backbone().model
    model.load_state_dict(load_file(tmp_path / found[0].path(MODEL)) | shared, strict=True)
    assert all(map(torch.equal, model.state_dict().values(), run.task.model.state_dict().values()))


def taught() -> nbtrain.Task:
    model = Taught()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=0.05)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy())


def test_a_teacher_that_moves_is_saved_with_each_checkpoint(tmp_path: Path) -> None:
    run = session(tmp_path / "run", build=taught, accumulate=1, save_every=1e-9)
    for batch in run:
        run.update(run.task.run(batch)[0])
        run.save()
        newest = checkpoint.load(checkpoint.find([FolderStore(tmp_path / "run")], "tiny")[0])
        for name, value in run.task.model.state_dict().items():
            assert torch.equal(newest.model[name], value), name
    assert not checkpoint.find([FolderStore(tmp_path / "run")], "tiny")[0].shared
    assert files(tmp_path / "run") == [], "and what was taken for still is gone"


def test_what_is_still_is_seen_by_its_bits() -> None:
    model = nn.Linear(2, 1).requires_grad_(False)
    seen, zero = Frozen(), torch.zeros(1, 2)

    def split(weight: torch.Tensor) -> list[str]:
        copies = {"weight": weight, "bias": torch.tensor([float("nan")])}
        still = seen.split(model, copies)
        return sorted(still.tensors) if still is not None else []

    assert split(zero) == split(zero.clone()) == ["bias", "weight"], "a NaN is what it was"
    assert split(-zero) == split(-zero) == split(zero) == ["bias"], "once moved it is not trusted"
    model.requires_grad_(True)
    assert split(zero) == []


# ---- whatever happens


def still(value: float) -> Still:
    return Still({"frozen": torch.full((4,), value)})


def snapshot(number: int, kept: Still | None) -> Snapshot:
    model = {"weight": torch.full((3,), float(number))}
    return Snapshot(number, model, {}, {"number": number}, "", {"step": number}, kept)


def good(store: Store) -> list[int]:
    """Return the numbers of the checkpoints that load whole, newest first."""
    found = [checkpoint.load(manifest) for manifest in checkpoint.find([store], "s")]
    assert all(loaded.model["frozen"].tolist() == [1.0] * 4 for loaded in found)
    return [loaded.number for loaded in found]


def commits(store: Store, kept: Still, *numbers: int) -> list[Manifest]:
    return [checkpoint.commit(store, "s", snapshot(number, kept)) for number in numbers]


class Dying(MemoryStore):
    """Loses power at the n-th write or delete."""

    left = 10**6

    def _spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def write(self, name: str, data: Any) -> None:
        self._spend()
        super().write(name, data)

    def delete(self, name: str) -> None:
        self._spend()
        super().delete(name)


def test_wherever_it_is_cut_off_every_manifest_has_what_it_refers_to() -> None:
    for left in range(40):
        store = Dying()
        made = commits(store, still(1.0), 1, 2, 3)
        store.left = left
        try:
            made += commits(store, still(1.0), 4)
            checkpoint.retain(store, "s", made, 2)
            made += [checkpoint.commit(store, "s", snapshot(5, None))]
            made += [checkpoint.commit(store, "s", snapshot(6, None))]
            checkpoint.retain(store, "s", made, 2)
            break
        except KeyboardInterrupt:
            store.left = 10**6
        found = [checkpoint.load(manifest) for manifest in checkpoint.find([store], "s")]
        assert len(found) >= 2
        assert all(("frozen" in loaded.model) is (loaded.number < 5) for loaded in found)
    assert left > 20 and not [n for n in store.list("s") if "frozen" in n], (
        "the last one takes it along"
    )


def test_it_is_kept_as_long_as_one_checkpoint_refers_to_it() -> None:
    store = MemoryStore()
    made = commits(store, still(1.0), 1, 2, 3)
    for number in (4, 5):
        made.append(checkpoint.commit(store, "s", snapshot(number, still(2.0))))
        made = checkpoint.retain(store, "s", made, 3)
        shared = {m.shared for m in checkpoint.find([store], "s")}
        there = {n.split("/")[1] for n in store.list("s") if n.count("/") == 1}
        assert {name for name in there if frozen.NAME.fullmatch(name)} == shared and len(shared) == 2
    made.append(checkpoint.commit(store, "s", snapshot(6, still(2.0))))
    checkpoint.retain(store, "s", made, 3)
    assert len([n for n in store.list("s") if n.count("/") == 1]) == 2


def test_nothing_is_swept_where_a_manifest_cannot_be_read() -> None:
    store = MemoryStore()
    made = commits(store, still(1.0), 1, 2, 3)
    made += [checkpoint.commit(store, "s", snapshot(number, None)) for number in (4, 5)]
    broken = "s/000009-aaaaaa/manifest.json"
    store.write(broken, b"{")
    checkpoint.retain(store, "s", made, 2)  # what was told on opening is not told at each save
    assert len([n for n in store.list("s") if "frozen" in n]) == 2


def test_a_copy_in_another_place_loads_alone_and_gets_it_once() -> None:
    near, far = MemoryStore("near"), Dying("far")
    made = commits(near, still(1.0), 1, 2)
    sure: set[tuple[str, str]] = set()
    checkpoint.copy(made[0], far, sure)
    far.left = 5  # four files and the manifest
    checkpoint.copy(made[1], far, sure)
    for name in near.list():
        near.delete(name)
    assert good(far) == [2, 1]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_one_damaged_file_is_not_the_end_and_the_next_process_mends_it(
    which: int, damage: bytes | None
) -> None:
    store = MemoryStore()
    made = commits(store, still(1.0), 1, 2)
    place = frozen.places("s", str(made[0].shared))[which]
    whole = store.read(place)
    store.delete(place)
    if damage is not None:
        store.write(place, damage)
    assert good(store) == [2, 1]
    commits(store, still(1.0), 3)
    assert store.read(place) == whole
    assert load_tensors(whole)["frozen"].tolist() == [1.0] * 4


def test_where_both_are_damaged_it_says_which() -> None:
    store = MemoryStore()
    (made,) = commits(store, still(1.0), 1)
    for place in frozen.places("s", str(made.shared)):
        store.delete(place)
        store.write(place, b"x")
    with pytest.raises(CheckpointError, match=r"s/frozen-\w+\.safetensors has changed.*-copy"):
        checkpoint.load(made)


def test_a_store_that_refuses_it_has_no_new_checkpoint() -> None:
    class Full(MemoryStore):
        def write(self, name: str, data: Any) -> None:
            if "frozen" in name:
                raise StoreError("full")
            super().write(name, data)

    store = Full()
    checkpoint.commit(store, "s", snapshot(1, None))
    with pytest.raises(StoreError, match="full"):
        checkpoint.commit(store, "s", snapshot(2, still(1.0)))
    assert [m.number for m in checkpoint.find([store], "s")] == [1]


def test_a_checkpoint_without_anything_frozen_is_as_it_always_was(tmp_path: Path) -> None:
    run = session(tmp_path).run()
    assert files(tmp_path) == [] and bits(run)
    newest = checkpoint.find([FolderStore(tmp_path)], "tiny")[0]
    assert b'"nbtrain/1"' in FolderStore(tmp_path).read(newest.path("manifest.json"))


def tied_and_averaged() -> nbtrain.Task:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[0].requires_grad_(False)
    model[2].weight = model[1].weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return nbtrain.Task(model=model, optimizer=optimizer, train=Noisy(), valid=Noisy(), ema=ema)


def test_the_weights_are_there_without_nbtrain_as_the_readme_says(tmp_path: Path) -> None:
    run = session(tmp_path / "store", build=tied_and_averaged).run()
    folder = max((tmp_path / "store" / "tiny").glob("*/manifest.json")).parent
    shared = [n for n in json.loads((folder / "manifest.json").read_text())["files"] if "frozen" in n]
    found = load_file(folder / "model.safetensors") | load_file(folder.parent / shared[0])
    state = run.task.model.state_dict()
    assert state.keys() - found.keys() == {"2.weight"}, "which is 1.weight"
    assert all(torch.equal(state[name], value) for name, value in found.items())
    parts = load_file(folder / "parts.safetensors")
    assert run.task.ema is not None
    for name, value in run.task.ema.module.state_dict().items():
        assert torch.equal(parts[f"ema/module.{name}"], value)
    best = run.best()
    torch.save(best.state_dict(), tmp_path / "best.pt")
    save_model(best, str(tmp_path / "best.safetensors"))
    for name, value in torch.load(tmp_path / "best.pt", map_location="cpu").items():
        assert torch.equal(value, best.state_dict()[name])
    assert not load_file(tmp_path / "best.safetensors").keys() - best.state_dict().keys()


k = 0  # as a loop in a cell has it


def test_one_session_a_fold_resumes_as_its_own_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        monkeypatch.setattr(sys.modules[__name__], "k", number)

        def build_fold(fold: int = k) -> nbtrain.Task:
            task = backbone()
            task.valid = Subset(task.train, range(fold, len(task.train), 2))
            return task

        nbtrain.Session(
            f"fold-{k}", build_fold, store=tmp_path, epochs=1, batch_size=8, bar=False, num_workers=0
        ).run()
    for number in range(2):
        again = nbtrain.resume(f"fold-{number}", store=tmp_path, trust_code=True)
        assert list(again.task.valid.indices)[:2] == [number, number + 2]


def test_the_output_of_a_kaggle_version_before_has_it_too(tmp_path: Path) -> None:
    run = session(tmp_path / "whole", build=backbone).run()
    expected = bits(run)
    first, second = tmp_path / "1/working/nbtrain", tmp_path / "2/working/nbtrain"
    run = session(KaggleStore(first), build=backbone)
    for batch in run:
        loss, n, _ = run.task.run(batch)
        run.update(loss, n=n)
        if run.step == 4:
            break
    for folder in ("a", "b"):
        shutil.copytree(first.parent, tmp_path / "input" / folder)
    for path in (tmp_path / "input/a").rglob("frozen-*"):
        path.unlink()  # this one was brought over by halves
    kept = sorted((tmp_path / "input/b").rglob("frozen-*"))
    kept[1].unlink()  # and this one has one of its two
    run = session(KaggleStore(second, [tmp_path / "input"]), build=backbone).run()
    assert_same_bits(bits(run), expected)
    # What is written here is read where nothing else is attached.
    assert session(KaggleStore(tmp_path / "3", [second]), build=backbone).step == run.step
