"""The gradient of a window is that of the mean over all its samples, however they were cut up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nbtrain.accumulation import Window, plan
from nbtrain.errors import TaskError

SIZES = (32, 32, 32, 7)


def problem(num_samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(num_samples, 5).double(), torch.randint(3, (num_samples,))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def exact(
    model: nn.Module, x: Tensor, y: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of the whole window at once."""
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    loss = losses.mean() if weight is None else (losses * weight).sum() / weight.sum()
    model.zero_grad()
    loss.backward()
    found = gradient(model).clone()
    model.zero_grad()
    return loss.detach(), found


def test_a_ragged_windows_gradient_is_the_mean_over_all_its_samples() -> None:
    model, x, y = problem(103)
    loss, expected = exact(model, x, y)
    window = Window(103, len(SIZES))
    for some_x, some_y in zip(x.split(SIZES), y.split(SIZES), strict=True):
        window.add(nn.functional.cross_entropy(model(some_x), some_y), len(some_y))
    found = window.finish(model.parameters())
    assert window.is_full
    assert (gradient(model) - expected).abs().max() < 1e-12
    assert abs(found - loss) < 1e-12


def test_the_mean_of_the_means_would_be_another_gradient() -> None:
    model, x, y = problem(103)
    _, expected = exact(model, x, y)
    for some_x, some_y in zip(x.split(SIZES), y.split(SIZES), strict=True):
        (nn.functional.cross_entropy(model(some_x), some_y) / len(SIZES)).backward()
    assert (gradient(model) - expected).abs().max() > 1e-4


def test_one_micro_step_gives_the_very_bits_of_plain_backward() -> None:
    model, x, y = problem(7)
    model, x = model.float(), x.float()
    plain = nn.functional.cross_entropy(model(x), y)
    plain.backward()
    expected = gradient(model).clone()
    model.zero_grad()
    window = Window(7, 1)
    window.add(nn.functional.cross_entropy(model(x), y), 7)
    assert torch.equal(window.finish(model.parameters()), plain.detach())
    assert torch.equal(gradient(model), expected)


def test_losses_that_are_means_over_tokens_get_the_windows_tokens_as_denominator() -> None:
    model, x, y = problem(12)
    num_tokens = torch.arange(1, 13)
    loss, expected = exact(model, x, y, num_tokens)
    window = Window(12, 3)
    for at in torch.arange(12).split(4):
        losses = nn.functional.cross_entropy(model(x[at]), y[at], reduction="none")
        n = int(num_tokens[at].sum())
        window.add((losses * num_tokens[at]).sum() / n, n)
    assert abs(window.finish(model.parameters()) - loss) < 1e-12
    assert (gradient(model) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("first", [False, True])
def test_a_micro_batch_of_which_nothing_is_counted_adds_nothing(first: bool) -> None:
    """As where all tokens of a micro-batch are masked: its window has others."""
    model, x, y = problem(8)
    (nn.functional.cross_entropy(model(x[:4]), y[:4], reduction="sum") / 4).backward()
    expected = gradient(model).clone()
    model.zero_grad()
    window = Window(8, 2)
    masked = model(x[4:])[:0].sum()
    parts = [(nn.functional.cross_entropy(model(x[:4]), y[:4], reduction="sum") / 4, 4), (masked, 0)]
    for loss, n in reversed(parts) if first else parts:
        window.add(loss, n)
        window.log({"seen": n, "empty" if n == 0 else "full": 1.0}, n)
    loss = window.finish(model.parameters())
    assert torch.equal(loss, parts[0][0].detach())
    assert torch.equal(gradient(model), expected)
    assert window.named == {"seen": (16, 4), "full": (4.0, 4)}


def test_a_window_of_which_nothing_is_counted_is_refused() -> None:
    model, x, _ = problem(4)
    window = Window(4, 2)
    window.add(model(x[:2])[:0].sum(), 0)
    with pytest.raises(TaskError, match=r"counted 0 in all 4 samples of a window, .* raise accumulate"):
        window.add(model(x[2:])[:0].sum(), 0)


def test_the_reported_loss_holds_no_graph() -> None:
    model, x, y = problem(4)
    window = Window(4, 1)
    window.add(nn.functional.cross_entropy(model(x), y), 4)
    assert not window.finish(model.parameters()).requires_grad


def test_clipping_bounds_the_norm_of_the_windows_gradient_and_keeps_its_direction() -> None:
    model, x, y = problem(8)
    _, expected = exact(model, x, y)
    norm = expected.norm()
    for clip_norm, wanted in ((norm / 2, expected / 2), (norm * 2, expected)):
        model.zero_grad()
        window = Window(8, 2)
        for at in torch.arange(8).split(4):
            window.add(nn.functional.cross_entropy(model(x[at]), y[at]), 4)
        window.finish(model.parameters(), float(clip_norm))
        # clip_grad_norm_ divides by the norm and a millionth
        assert (gradient(model) - wanted).abs().max() < 1e-5 * norm


def test_clipping_comes_after_the_true_denominator_is_known() -> None:
    model, x, y = problem(8)
    _, expected = exact(model, x, y)
    window = Window(8, 1)
    window.add(nn.functional.cross_entropy(model(x), y), 800)  # before its correction far too large
    window.finish(model.parameters(), float(expected.norm()) * 2)
    assert (gradient(model) - expected).abs().max() < 1e-12


def test_a_frozen_parameter_is_left_without_gradient() -> None:
    model, x, y = problem(4)
    next(model.parameters()).requires_grad_(False)
    window = Window(4, 1)
    window.add(nn.functional.cross_entropy(model(x), y), 2)
    window.finish(model.parameters(), 1.0)
    assert next(model.parameters()).grad is None


@pytest.mark.parametrize(
    ("left", "drop_last", "expected"),
    [
        (103, False, (24, 3)),
        (24, False, (24, 3)),
        (23, False, (23, 3)),
        (17, False, (17, 3)),
        (16, False, (16, 2)),
        (7, False, (7, 1)),
        (1, False, (1, 1)),
        (0, False, None),
        (103, True, (24, 3)),
        (23, True, (16, 2)),
        (8, True, (8, 1)),
        (7, True, None),
        (0, True, None),
    ],
)
def test_a_window_ends_with_its_epoch(
    left: int, drop_last: bool, expected: tuple[int, int] | None
) -> None:
    window = plan(left, batch_size=8, accumulate=3, drop_last=drop_last)
    assert (window and (window.num_samples, window.num_micro_steps)) == expected


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_windows_of_an_epoch_hold_each_of_its_samples_once(drop_last: bool) -> None:
    for left in range(60):
        seen = 0
        while window := plan(left - seen, batch_size=5, accumulate=3, drop_last=drop_last):
            seen += window.num_samples
        assert seen == (left - left % 5 if drop_last else left)
