"""What is needed to go on is never removed; what is damaged is trained again to the same bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from herds import assert_same_bits, bits, population

import nbtrain
from nbtrain import checkpoint
from nbtrain.budget import Budget
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import CheckpointError, StoreError
from nbtrain.population.shelf import Shelf, newest_whole, parts
from nbtrain.stores import FolderStore
from nbtrain.stores.memory import MemoryStore

SIZE = 1000


def snapshot(number: int, key: Any, needs: list[Any], *, partial: bool = False) -> Snapshot:
    facts = {"step": number, "stage": 1, "progress": 0.0, "at": float(number), "valid_loss": None}
    facts |= {"round": key and key[0], "member": key and key[1], "partial": partial}
    facts["needs"] = [list(need) for need in needs]
    tensors = {"x": torch.full((SIZE if key else 1,), float(number))}
    return Snapshot(number, tensors, {}, {}, "", facts)


def shelf(*stores: Any) -> Shelf:
    found = checkpoint.find(stores, "herd")
    return Shelf(
        "herd", list(stores), Budget(None, 0.0, lambda: 0.0), found, found[0] if found else None
    )


def put(on: Shelf, key: Any, needs: list[Any], *, partial: bool = False) -> None:
    on.request(snapshot(on.next_number(), key, needs, partial=partial))
    on.wait()


def keys(store: Any) -> list[Any]:
    """Return what each checkpoint in a store holds, newest first; a part as ("part", key)."""
    facts = [m.facts for m in checkpoint.find([store], "herd")]
    found = [(f["round"], f["member"]) for f in facts]
    return [("part", k) if f["partial"] else k for f, k in zip(facts, found, strict=True)]


def damage(store: Any, manifest: checkpoint.Manifest) -> None:
    name = manifest.path("model.safetensors")
    store.delete(name)
    store.write(name, b"damaged")


def rounds(on: Shelf, num_members: int, num_rounds: int) -> None:
    """Save round after round in which nobody copies."""
    done: list[Any] = []
    for round in range(num_rounds):
        for member in range(num_members):
            done = [(r, m) for r, m in done if m != member] + [(round, member)]
            put(on, (round, member), done)


def test_what_is_needed_stays_and_the_rest_goes_before_there_is_twice_the_population() -> None:
    store = MemoryStore()
    on = shelf(store)
    rounds(on, 4, 5)
    held = keys(store)
    assert {(4, m) for m in range(4)} <= set(held)
    assert len(held) <= 6 and held == sorted(held, reverse=True)


def test_a_state_that_is_needed_stays_however_many_newer_ones_there_are() -> None:
    store = MemoryStore()
    on = shelf(store)
    rounds(on, 4, 1)
    for round in range(1, 9):  # two have ended, as in a halving
        put(on, (round, 0), [(0, 2), (0, 3), (round, 0), (round - 1, 1)])
        put(on, (round, 1), [(0, 2), (0, 3), (round, 0), (round, 1)])
    assert {(0, 2), (0, 3), (8, 0), (8, 1)} <= set(keys(store)) and len(keys(store)) <= 6


def test_a_part_goes_with_the_next_one_or_the_end_of_its_slice() -> None:
    store = MemoryStore()
    on = shelf(store)
    rounds(on, 4, 1)
    needs = [(0, m) for m in range(4)]
    put(on, (1, 0), needs, partial=True)
    put(on, (1, 0), needs, partial=True)
    assert [k for k in keys(store) if k[0] == "part"] == [("part", (1, 0))]
    put(on, (1, 0), [(1, 0), *needs[1:]])
    assert not [k for k in keys(store) if k[0] == "part"]


def test_of_several_slices_the_newest_part_of_each_is_kept_until_its_end() -> None:
    near, far = MemoryStore(), MemoryStore()
    far.is_remote = True
    on = shelf(near, far)
    rounds(on, 3, 1)
    needs = [(0, m) for m in range(3)]
    for member in (0, 1, 0):
        put(on, (1, member), needs, partial=True)
    for store in (near, far):
        assert [k for k in keys(store) if k[0] == "part"] == [("part", (1, 0)), ("part", (1, 1))]
        assert len(keys(store)) <= 6
    found = checkpoint.find([near], "herd")
    read = parts(found, found[0], {(1, 0), (1, 1), (1, 2)})
    assert {key: part.number for key, part in read.items()} == {(1, 0): 6, (1, 1): 5}
    assert parts(found, found[0], {(1, 1)}).keys() == {(1, 1)}
    damage(near, found[1])
    with pytest.warns(nbtrain.NbtrainWarning, match="The part of member 1's slice is damaged"):
        assert parts(found, found[0], {(1, 0), (1, 1)}).keys() == {(1, 0)}
    put(on, (1, 1), [(0, 0), (0, 2), (1, 1)])
    assert [k for k in keys(near) if k[0] == "part"] == [("part", (1, 0))]
    # A slice of the next round: whatever was cut before is over, also if it failed.
    put(on, (2, 1), [(1, 1), (2, 1)])
    assert not [k for k in keys(near) if k[0] == "part"]


def test_the_newest_whole_set_is_gone_on_from() -> None:
    store = MemoryStore()
    on = shelf(store)
    rounds(on, 4, 2)
    found = checkpoint.find([store], "herd")
    manifest, _, states = newest_whole(found)
    assert manifest is found[0] and states.keys() == {(1, m) for m in range(4)}
    damage(store, found[1])
    with pytest.warns(nbtrain.NbtrainWarning, match=f"{found[1].id}.* is damaged") as told:
        manifest, _, states = newest_whole(found)
    assert manifest is found[2] and len(told) == 1
    assert states.keys() == {(1, 0), (1, 1), (0, 2), (0, 3)}


def test_where_no_set_is_whole_nothing_is_removed_and_the_damage_is_named() -> None:
    store = MemoryStore()
    rounds(shelf(store), 2, 1)
    found = checkpoint.find([store], "herd")
    for manifest in found:
        damage(store, manifest)
    with pytest.raises(CheckpointError, match="No checkpoint is whole") as told:
        newest_whole(found)
    assert all(m.id in str(told.value) for m in found) and len(keys(store)) == 2


def test_a_far_store_gets_a_set_that_can_be_gone_on_from_alone() -> None:
    near, far = MemoryStore(), MemoryStore()
    far.is_remote = True
    on = shelf(near, far)
    rounds(on, 4, 3)
    manifest, _, states = newest_whole(checkpoint.find([far], "herd"))
    assert _key(manifest) == (2, 3) and states.keys() == {(2, m) for m in range(4)}
    # Another machine has nothing near; what it adds leans on what is far.
    near = MemoryStore()
    on = shelf(near, far)
    put(on, (3, 0), [(3, 0), (2, 1), (2, 2), (2, 3)])
    assert keys(near) == [(3, 0)]
    assert newest_whole(checkpoint.find([far], "herd"))[2].keys() == {(3, 0), (2, 1), (2, 2), (2, 3)}
    assert len(keys(far)) <= 6
    assert on.load((2, 2)).model["x"][0] == 11.0


def _key(manifest: checkpoint.Manifest) -> Any:
    return manifest.facts["round"], manifest.facts["member"]


def test_a_state_that_could_not_be_saved_is_saved_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    on = shelf(store)
    rounds(on, 3, 1)
    write = MemoryStore.write

    def full(self: MemoryStore, name: str, data: bytes) -> None:
        raise StoreError("The disk is full.")

    monkeypatch.setattr(MemoryStore, "write", full)
    put(on, (1, 0), [(1, 0), (0, 1), (0, 2)])
    assert isinstance(on.failure(), StoreError) and on.is_failing
    monkeypatch.setattr(MemoryStore, "write", write)
    put(on, (1, 1), [(1, 0), (1, 1), (0, 2)])
    assert not on.is_failing
    manifest, _, states = newest_whole(checkpoint.find([store], "herd"))
    assert _key(manifest) == (1, 1) and states.keys() == {(1, 0), (1, 1), (0, 2)}


def test_nothing_is_removed_while_a_needed_state_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    on = shelf(store)
    rounds(on, 3, 1)
    for _ in range(3):  # each leans on a state that never came
        put(on, (1, 1), [(1, 0), (1, 1), (0, 2)])
    assert newest_whole(checkpoint.find([store], "herd"))[2].keys() == {(0, m) for m in range(3)}


def test_debris_of_a_commit_that_was_cut_off_goes_and_an_order_file_stays(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    rounds(shelf(store), 2, 1)
    cut = tmp_path / "herd" / "000003-abcdef"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"half")
    order = tmp_path / "herd" / "PAUSE"
    order.touch()
    on = shelf(store)
    put(on, (1, 0), [(1, 0), (0, 1)])
    assert not cut.exists() and order.exists()
    assert on.rival() is None


def test_another_process_is_noticed_and_nothing_of_it_is_removed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    one, other = shelf(store), shelf(store)
    rounds(one, 2, 1)
    rounds(other, 2, 1)
    assert "Another process" in (other.rival() or "")
    assert len(checkpoint.find([store], "herd")) == 4


@pytest.mark.parametrize("back", [1, 2])
def test_damaged_states_are_trained_again_to_the_same_bits(tmp_path: Path, back: int) -> None:
    arguments: dict[str, Any] = {"members": 5, "epochs": 2}
    whole = population(tmp_path / "whole", **arguments).run()
    population(tmp_path / "cut", **arguments).run()
    found = checkpoint.find([FolderStore(tmp_path / "cut")], "herd")
    for manifest in found[:back]:
        path = tmp_path / "cut" / manifest.path("model.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = population(tmp_path / "cut", **arguments).run()
    assert [str(w.message).split()[1] for w in told] == [m.id for m in found[:back]]
    assert again.state == "done"
    left = {m.id for m in checkpoint.find([FolderStore(tmp_path / "cut")], "herd")}
    assert not left & {m.id for m in found[:back]}, "what was damaged is gone once it is there again"
    assert_same_bits(bits(again), bits(whole))
