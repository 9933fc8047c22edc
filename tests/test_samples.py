"""Samplers, collating and augmentation of every kind: cut, and gone on with other workers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Noisy, assert_same_bits, cut_and_die, finish, in_fresh_process, session
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

import nbtrain
from nbtrain.errors import DataError

# Torch's advice; what more workers than cores give must be the same nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

WEIGHTS = (torch.arange(23.0) + 1).tolist()


def task(train: Any, **fields: Any) -> nbtrain.Task:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return nbtrain.Task(model=model, optimizer=optimizer, train=train, valid=Noisy(), **fields)


def loaded(**how: Any) -> nbtrain.Task:
    return task(DataLoader(Noisy(), **how))


# ---- samplers


def weighted() -> nbtrain.Task:
    own = torch.Generator().manual_seed(5)
    return loaded(batch_size=3, sampler=WeightedRandomSampler(WEIGHTS, 20, generator=own))


def without_replacement() -> nbtrain.Task:
    return loaded(batch_size=3, sampler=WeightedRandomSampler(WEIGHTS, 20, replacement=False))


def with_replacement() -> nbtrain.Task:
    return loaded(batch_size=3, sampler=RandomSampler(Noisy(), replacement=True, num_samples=17))


def subset() -> nbtrain.Task:
    return loaded(batch_size=3, sampler=SubsetRandomSampler(range(0, 23, 2)))


class Own(Sampler[int]):
    """Draws from numpy, and another number of samples each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(23)[: 15 + 3 * self.epoch].tolist())


def own() -> nbtrain.Task:
    return loaded(batch_size=3, sampler=Own())


class Buckets(BatchSampler):
    """Batches of two to six samples."""

    def __init__(self) -> None:
        super().__init__(RandomSampler(range(23)), 4, False)

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        yield from (indices[a:b] for a, b in ((0, 2), (2, 8), (8, 11), (11, 15), (15, 19), (19, 23)))


def buckets() -> nbtrain.Task:
    return loaded(batch_sampler=Buckets())


# ---- collating


def mixed(samples: list[Any]) -> Any:
    """Mix each batch with itself, by a share that is drawn while collating."""
    x, y = default_collate(samples)
    share = torch.rand(())
    return share * x + (1 - share) * x.flip(0), y


def collated() -> nbtrain.Task:
    return task(Noisy(), collate=mixed)


class Several(Dataset[Any]):
    def __len__(self) -> int:
        return 23

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [Noisy()[index] for index in indices]


def several() -> nbtrain.Task:
    return task(Several())


# ---- augmentation


class Pictures(Dataset[Any]):
    """Small pictures, augmented by whatever is given."""

    def __init__(self, augment: Callable[[Any], Any]) -> None:
        self.augment = augment

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = torch.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8) * (index + 1) / 23
        return self.augment(picture), index % 3


def as_it_is(picture: torch.Tensor) -> torch.Tensor:
    return picture


def seeing(augment: Callable[[Any], Any], **fields: Any) -> nbtrain.Task:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return nbtrain.Task(
        model=model, optimizer=optimizer, train=Pictures(augment), valid=Pictures(as_it_is), **fields
    )


def torchvision_v1() -> nbtrain.Task:
    from torchvision import transforms

    return seeing(
        transforms.Compose(
            [
                transforms.RandomResizedCrop(8, antialias=True),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
                transforms.RandomErasing(),
            ]
        )
    )


def torchvision_v2() -> nbtrain.Task:
    from torchvision.transforms import v2

    return seeing(
        v2.Compose(
            [v2.RandomResizedCrop(8), v2.RandAugment(), v2.RandomHorizontalFlip(), v2.GaussianNoise()]
        )
        if hasattr(v2, "GaussianNoise")
        else v2.RandomResizedCrop(8)
    )


class Keyed:
    """Albumentations keeps a generator of its own, which takes its seed from the sample's here."""

    def __init__(self) -> None:
        import albumentations

        self.transform = albumentations.Compose(
            [
                albumentations.RandomCrop(6, 6),
                albumentations.Resize(8, 8),
                albumentations.GaussNoise(p=1),
            ]
        )

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        self.transform.set_random_seed(int(nbtrain.sample_rng().integers(2**31)))
        found = self.transform(image=picture.permute(1, 2, 0).numpy())["image"]
        return torch.from_numpy(found).permute(2, 0, 1).contiguous()


def albumented() -> nbtrain.Task:
    return seeing(Keyed())


def on_the_device(model: nn.Module, batch: Any) -> torch.Tensor:
    """Augment where the model is, under the key of the micro-step."""
    import kornia.augmentation as augmentation

    x, y = batch
    augment = augmentation.AugmentationSequential(
        augmentation.RandomHorizontalFlip(), augmentation.ColorJitter(0.2, 0.2, 0.2, 0.1, p=0.8)
    )
    return nn.functional.cross_entropy(model(augment(x) if model.training else x), y)


def kornia() -> nbtrain.Task:
    return seeing(as_it_is, step=on_the_device)


NEEDS = {torchvision_v1: "torchvision", torchvision_v2: "torchvision", albumented: "albumentations"}
NEEDS[kornia] = "kornia"
BUILDS = [weighted, without_replacement, with_replacement, subset, own, buckets, collated, several]
BUILDS += NEEDS


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_it_is_cut_and_goes_on_to_the_same_bits_with_any_workers(tmp_path: Path, build: Any) -> None:
    if importlib.util.find_spec(NEEDS.get(build, "torch")) is None:
        pytest.skip(f"needs {NEEDS[build]}")
    changes: dict[str, Any] = {"build": build, "batch_size": None if build is buckets else 3}
    whole = tmp_path / "whole.pt"
    assert in_fresh_process(finish, tmp_path / "whole", whole, **changes) == 0
    expected = torch.load(whole)
    for micro_step, before, after in ((2, 0, 2), (5, 2, 0)):
        folder, result = tmp_path / f"cut-{micro_step}", tmp_path / f"{micro_step}.pt"
        died = in_fresh_process(cut_and_die, folder, micro_step, num_workers=before, **changes)
        assert died < 0
        assert in_fresh_process(finish, folder, result, num_workers=after, **changes) == 0
        assert_same_bits(torch.load(result), expected)


def test_a_batch_samplers_windows_are_its_batches(tmp_path: Path) -> None:
    run = session(tmp_path, build=buckets, batch_size=None, accumulate=4)
    sizes: list[list[int]] = [[]]
    for batch in run:
        sizes[-1].append(len(batch[1]))
        before = run.step
        run.update(run.task.run(batch)[0])
        if run.step > before:
            sizes.append([])
    assert sizes == [[2, 6, 3, 4], [4, 4]] * 2 + [[]]


def dropping_last() -> nbtrain.Task:
    return loaded(batch_size=3, shuffle=True, drop_last=True)


@pytest.mark.parametrize("trains", [False, True])
def test_a_batch_that_drop_last_would_leave_nothing_of_is_not_set(tmp_path: Path, trains: bool) -> None:
    run = session(tmp_path, build=dropping_last)
    refused = pytest.raises(ValueError, match=r"batch_size=24 with drop_last leaves nothing of 23 samp")
    for batch in run if trains else ():
        if run.step == 1:
            with refused:
                run.set(batch_size=24, budget="1h")
        run.update(run.task.run(batch)[0])
    with refused:
        run.set(batch_size=24, budget="1h")
    assert run.journal.entries == [] and run.budget.limit_s != 3600
    assert run.run().epoch == 2
    run.set(batch_size=23)


def test_a_batch_samplers_sizes_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"batch_size=3.*batch sampler, which makes.*Leave batch_size out"
    ):
        session(tmp_path, build=buckets)
    run = session(tmp_path, build=buckets, batch_size=None)
    with pytest.raises(ValueError, match="batch_size is the batch sampler's"):
        run.set(batch_size=2)
    assert run.journal.entries == []
