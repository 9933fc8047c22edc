"""A stream goes on where it was: by its state, or by reading again what was seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import NUM_SAMPLES, assert_same_bits, bits, cut_and_die, finish, in_fresh_process, session
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import nbtrain
from nbtrain import checkpoint
from nbtrain.data import Loader, Order, source
from nbtrain.errors import DataError
from nbtrain.stores import FolderStore


def sample(index: int) -> tuple[torch.Tensor, int]:
    return torch.full((6,), index / NUM_SAMPLES) + 0.1 * torch.randn(6), index % 3


class Shards(IterableDataset[Any]):
    """Read in order through a shuffle buffer with a generator of its own, as webdataset does."""

    def __init__(self) -> None:
        self.reading, self.buffer = 0, []
        self.generator = torch.Generator().manual_seed(7)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __iter__(self) -> Iterator[Any]:
        while self.reading < NUM_SAMPLES or self.buffer:
            while len(self.buffer) < 5 and self.reading < NUM_SAMPLES:
                self.buffer.append(self.reading)
                self.reading += 1
            at = int(torch.randint(len(self.buffer), (), generator=self.generator))
            yield sample(self.buffer.pop(at))
        self.reading = 0


class Stateful(Shards):
    def state_dict(self) -> dict[str, Any]:
        state = self.generator.get_state()
        return {"reading": self.reading, "buffer": list(self.buffer), "generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reading, self.buffer = state["reading"], state["buffer"]
        self.generator.set_state(state["generator"])


class Shuffled(IterableDataset[Any]):
    """Without a state; shuffled at the start of each epoch by torch's global generator."""

    epoch = -1

    def __len__(self) -> int:
        return NUM_SAMPLES

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        yield from (sample(i) for i in torch.randperm(NUM_SAMPLES).roll(self.epoch).tolist())


def task(train: Any, **fields: Any) -> nbtrain.Task:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return nbtrain.Task(model=model, optimizer=optimizer, train=train, valid=Shuffled(), **fields)


def stateful() -> nbtrain.Task:
    return task(Stateful())


def dropping() -> nbtrain.Task:
    return task(DataLoader(Stateful(), batch_size=3, drop_last=True))


def skipping() -> nbtrain.Task:
    return task(Shuffled(), skip_seen=True)


def test_each_validation_reads_a_stream_from_where_it_was_built(tmp_path: Path) -> None:
    whole = session(tmp_path / "whole", build=validated, validate_every="2 steps").run()
    cut = session(tmp_path / "cut", build=validated, validate_every="2 steps")
    for batch in cut:
        cut.update(cut.task.run(batch)[0])
        if cut.step == 3:
            break
    cut = session(tmp_path / "cut", build=validated, validate_every="2 steps").run()
    assert cut.history["valid_loss"] == whole.history["valid_loss"]


def validated() -> nbtrain.Task:
    made = task(Stateful())
    made.valid = Stateful()
    return made


@pytest.mark.parametrize("build", [stateful, dropping, skipping])
def test_a_run_on_a_stream_ends_in_the_same_bits_wherever_it_is_cut(tmp_path: Path, build: Any) -> None:
    whole = tmp_path / "whole.pt"
    assert in_fresh_process(finish, tmp_path / "whole", whole, build=build) == 0
    expected = torch.load(whole)
    for micro_step in (0, 1, 5, 7, 8, 11):
        folder, result = tmp_path / f"cut-{micro_step}", tmp_path / f"{micro_step}.pt"
        assert in_fresh_process(cut_and_die, folder, micro_step, build=build) < 0
        assert in_fresh_process(finish, folder, result, build=build) == 0
        assert_same_bits(torch.load(result), expected)


def test_a_checkpoint_asked_for_inside_a_window_has_the_streams_state_at_its_start(
    tmp_path: Path,
) -> None:
    run = session(tmp_path, build=stateful)
    for count, batch in enumerate(run):
        if count == 4:
            run.save()
            break
        run.update(run.task.run(batch)[0])
    newest = checkpoint.find([FolderStore(tmp_path)], "tiny")[0]
    held = checkpoint.state(newest)["trees"]["parts"]["train data"]
    assert (held["epoch"], held["position"]) == (0, 9)


def test_memory_that_is_short_is_no_matter_for_a_stream(tmp_path: Path) -> None:
    runs = []
    for name, after in (("short", 1), ("known", 100)):
        run = session(tmp_path / name, build=stateful, batch_size=6)
        step = Short(after)
        run.task.step = step
        if name == "known":
            run._live.rooms = {"cpu": 3}
        runs.append(run.run())
    assert_same_bits(bits(runs[0]), bits(runs[1]))


class Short:
    def __init__(self, after: int) -> None:
        self.left, self.sizes = after, []  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        self.left -= 1
        if len(y) > 3 and self.left < 0 and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return nn.functional.cross_entropy(model(x), y)


def test_skipping_says_what_it_cost(tmp_path: Path) -> None:
    run = session(tmp_path, build=skipping)
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 2:
            break
    run = session(tmp_path, build=skipping).run()
    said = [line for line in run.lines if "skipped" in line]
    assert len(said) == 1
    assert said[0].startswith("train: read again and skipped 18 samples of epoch 0 in ")


def test_a_stream_without_a_state_is_refused_with_what_skipping_would_cost(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no state_dict.*map-style.*skip_seen=True.*ms a sample"):
        session(tmp_path, build=lacking)


def lacking() -> nbtrain.Task:
    return task(Shards())


@pytest.mark.parametrize("how", [{"num_workers": 2}, {"build": "loader"}])
def test_workers_are_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    changes = how if "num_workers" in how else {"build": with_workers, "num_workers": None}
    with pytest.raises(DataError, match=r"num_workers=2, but the data are a stream.*num_workers=0"):
        session(tmp_path, **{"build": stateful, **changes})


def with_workers() -> nbtrain.Task:
    return task(DataLoader(Stateful(), num_workers=2))


class Lying(Shuffled):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("length", "message"),
    [(NUM_SAMPLES + 1, "ended after 23 of 24 samples"), (NUM_SAMPLES - 1, "of length 22 gave more")],
)
def test_a_length_that_is_not_true_is_told(length: int, message: str) -> None:
    found = source(Lying(length), "train", shuffle=True, collate=None, skip_seen=True)
    loader = Loader(found, (0, "train"), Order(found, 0), 5, 0)
    loader.start(0, 0, 5, None)
    with pytest.raises(DataError, match=message):
        [next(loader) for _ in range(8)]


def test_the_streams_part_has_its_name_for_itself(tmp_path: Path) -> None:
    def named() -> nbtrain.Task:
        return task(Stateful(), parts={"train data": nn.Linear(1, 1)})

    with pytest.raises(DataError, match=r"'train data' is the stream's own part"):
        session(tmp_path, build=named)


def test_a_stream_is_audited() -> None:
    assert "reproducible" in str(nbtrain.audit(stateful, batch_size=3, device="cpu", steps=2))


def test_a_rehearsed_stream_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    from nbtrain import probe

    whole = session(tmp_path / "whole", build=stateful).run()
    run = session(tmp_path / "cut", build=stateful)
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 1:
            break
    first = probe.seen(run._opened, run._live, trains=True)
    run._loop.keeping.load()
    again = probe.seen(run._opened, run._live, trains=True)
    run._loop.keeping.load()
    assert first["samples"] == again["samples"] and first["trained"] == again["trained"]
    run.run()
    assert_same_bits(bits(run), bits(whole))
