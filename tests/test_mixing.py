"""Label smoothing, mixup and cutmix by timm and torchvision, in the step or as collate: exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
from runs import BATCH, assert_exact_wherever_cut, assert_same_bits, finished, session
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

import nbtrain

NUM_CLASSES = 3


class Images(Dataset[Any]):
    """Images with augmentation by torchvision's own functions."""

    def __init__(self) -> None:
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.arange(3 * 6 * 6, dtype=torch.uint8).reshape(3, 6, 6) + index
        return self.transform(image), index % NUM_CLASSES


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, NUM_CLASSES)
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def mixed_in_the_step() -> nbtrain.Task:
    """timm's, which draws from numpy's own generator."""
    model, optimizer = net()
    mixup = timm.data.Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=NUM_CLASSES
    )

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        if model.training and len(x) % 2 == 0:  # timm mixes pairs
            x, y = mixup(x, y)
        return nn.functional.cross_entropy(model(x), y)

    return nbtrain.Task(model=model, optimizer=optimizer, train=Images(), valid=Images(), step=step)


def mixed_as_collate() -> nbtrain.Task:
    """torchvision's, which draws from torch's; only the training's DataLoader has it."""
    model, optimizer = net()
    mixing = v2.RandomChoice([v2.MixUp(num_classes=NUM_CLASSES), v2.CutMix(num_classes=NUM_CLASSES)])

    def collate(samples: list[Any]) -> Any:
        return mixing(*default_collate(samples))

    train = DataLoader(Images(), batch_size=BATCH, shuffle=True, collate_fn=collate)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return nbtrain.Task(model=model, optimizer=optimizer, train=train, valid=Images(), loss=loss)


BUILDS = {"timm in the step": mixed_in_the_step, "torchvision as collate": mixed_as_collate}


@pytest.mark.parametrize("name", BUILDS)
def test_a_mixed_run_cut_anywhere_ends_in_the_same_bits(tmp_path: Path, name: str) -> None:
    changes = {"build": BUILDS[name], "batch_size": 4}
    expected = finished(tmp_path / "whole", **changes)
    for micro_step, workers in ((1, 0), (4, 2), (10, 1)):
        found = assert_exact_wherever_cut(
            tmp_path / f"{workers} workers", [micro_step], num_workers=workers, **changes
        )
        assert_same_bits(found, expected)


@pytest.mark.parametrize("name", BUILDS)
def test_it_is_mixed_and_each_time_otherwise(tmp_path: Path, name: str) -> None:
    run = session(tmp_path, build=BUILDS[name], batch_size=4)
    seen = []
    run.task.model.register_forward_pre_hook(lambda model, args: seen.append(args[0].clone()))
    run.run()
    plain = torch.stack(
        [Images()[i][0] for i in range(22)] + [v2.functional.hflip(Images()[i][0]) for i in range(22)]
    )
    training = [x for x in seen[:6] if len(x) == 4]
    mixed = [not any(torch.equal(image, other) for other in plain) for x in training for image in x]
    assert any(mixed), "else this shows nothing"
