"""Precision and layout: entered for the forward pass alone, exact under resume, free when off."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_exact_wherever_cut, assert_same_bits, bits, build, session
from torch import Tensor, nn

import nbtrain
from nbtrain import checkpoint, forward
from nbtrain.errors import NbtrainWarning, SessionError
from nbtrain.forward import Forward
from nbtrain.stores import FolderStore

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOO_LARGE = 1000.0  # of a gradient, so that the scale that fp16 begins with is too large


def convolved() -> nbtrain.Task:
    """A task with images and a convolution."""
    task = build()
    inner = nn.Sequential(nn.Unflatten(1, (3, 1, 2)), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    task.model = nn.Sequential(*inner, nn.Flatten(), nn.Linear(16, 3))
    task.optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.05)
    return task


class Large(torch.autograd.Function):
    """Gives what it is given; its gradient overflows early."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.where(grad.abs() > TOO_LARGE, torch.inf, grad)


class Bounded(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return Large.apply(self.inner(x))


def bounded() -> nbtrain.Task:
    """A task whose first steps are left out, until the scale has fallen."""
    task = build()
    task.model = Bounded(task.model)
    return task


def by_hand(run: nbtrain.Session) -> dict[str, Tensor]:
    """Train in a loop of one's own, as the README writes it; return the bits."""
    for batch in run:
        with run.autocast():
            loss, n, _ = run.task.run(batch)
        run.update(loss, n=n)
    return bits(run)


WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "clip_norm": 0.5, "build": bounded},
    "channels last": {"channels_last": True, "build": convolved},
    "compiled": {"compile": {"backend": "eager"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_cut_in_a_window_and_in_an_epoch_ends_in_the_same_bits(tmp_path: Path, way: str) -> None:
    assert_exact_wherever_cut(tmp_path, (4, 13), **WAYS[way])


def test_the_scaler_leaves_out_steps_that_overflow_and_these_count_as_windows(tmp_path: Path) -> None:
    run = session(tmp_path, build=bounded, precision="fp16")
    before = [p.clone() for p in run.task.model.parameters()]
    seen = []
    for batch in run:
        with run.autocast():
            loss, n, _ = run.task.run(batch)
        run.update(loss, n=n)
        same = all(torch.equal(a, b) for a, b in zip(before, run.task.model.parameters(), strict=True))
        seen.append((run.step, same))
    assert seen[2] == (1, True), "left out, and counted"
    assert seen[-1][1] is False, "the scale has fallen until it fits"
    assert run._live.scaler is not None and run._live.scaler.get_scale() < 65536
    (manifest, *_) = checkpoint.find([FolderStore(tmp_path)], "tiny")
    assert checkpoint.state(manifest)["scaler"]["scale"] == run._live.scaler.get_scale()


def norm(optimizer: torch.optim.Optimizer) -> float:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return float(torch.stack([p.grad.norm() for p in parameters]).norm())


def test_what_is_clipped_is_the_gradient_without_its_scale(tmp_path: Path) -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        run = session(tmp_path / precision, precision=precision, clip_norm=1e-3, warmup_epochs=0)
        seen: list[float] = []
        run.task.optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.append(norm(optimizer))  # noqa: B023
        )
        run.run()
        norms.append(seen[0])
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_each_precision_computes_in_its_own_and_keeps_float32_weights(tmp_path: Path) -> None:
    for precision, dtype in (
        ("fp32", torch.float32),
        ("mixed", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        run = session(tmp_path / precision, precision=precision)
        seen = set()
        run.task.model.register_forward_hook(lambda model, args, out: seen.add(out.dtype))  # noqa: B023
        run.run()
        assert seen == {dtype}, "in training and in validation"
        assert all(p.dtype == torch.float32 for p in run.task.model.parameters())
        told = "bf16" if precision == "mixed" else precision
        assert run.status()["precision"] == told
        assert run._opened.fingerprint(run._live)["precision"] == told
        assert not torch.is_autocast_enabled("cpu")


def test_a_loop_that_forgets_the_precision_is_told_so(tmp_path: Path) -> None:
    run = session(tmp_path, precision="bf16")
    batches = iter(run)
    loss, n, _ = run.task.run(next(batches))
    with pytest.raises(SessionError, match=r"not computed in bf16. Write: with session.autocast\(\)"):
        run.update(loss, n=n)
    batches.close()
    for count, batch in enumerate(run):
        with run.autocast() if count == 0 else nullcontext():
            loss, n, _ = run.task.run(batch)
        if count == 1:
            with pytest.raises(SessionError, match="not computed in bf16"):
                run.update(loss, n=n)
            break
        run.update(loss, n=n)


def test_an_update_inside_of_autocast_gives_the_bits_of_one_after_it(tmp_path: Path) -> None:
    after = by_hand(session(tmp_path / "after", precision="bf16"))
    run = session(tmp_path / "inside", precision="bf16")
    for batch in run:
        with run.autocast():
            loss, n, _ = run.task.run(batch)
            run.update(loss, n=n)
    assert_same_bits(bits(run), after)


def test_fp32_is_the_plain_run_and_enters_nothing(tmp_path: Path) -> None:
    made = Forward(CPU)
    assert isinstance(made.autocast(), nullcontext) and made.new_scaler() is None
    image = torch.rand(2, 3, 4, 5)
    assert made.moved((image, 1))[0] is image
    assert_same_bits(by_hand(session(tmp_path / "own")), bits(session(tmp_path / "run").run()))


def test_channels_last_are_weights_and_images_wherever_they_are() -> None:
    task = convolved()
    made = Forward(CPU, channels_last=True)
    made.prepare(task)
    assert task.model[1].weight.is_contiguous(memory_format=torch.channels_last)
    image = torch.rand(2, 3, 4, 5)
    batch = {"x": [image, image[0]], "n": 3}
    moved = made.moved(batch)
    assert moved["x"][0].is_contiguous(memory_format=torch.channels_last) and moved["n"] == 3
    assert torch.equal(moved["x"][0], image) and moved["x"][1] is batch["x"][1]


def test_compiled_is_in_place_and_no_name_changes(tmp_path: Path) -> None:
    run = session(tmp_path / "compiled", compile={"backend": "eager"}).run()
    assert run._opened.fingerprint(run._live)["compiled"]
    plain = session(tmp_path / "plain").run()
    assert run.task.model.state_dict().keys() == plain.task.model.state_dict().keys()
    assert run.best().state_dict().keys() == plain.best().state_dict().keys()
    assert_same_bits(bits(run), bits(plain))


def test_each_shape_is_compiled_for_itself_unless_it_is_said_otherwise() -> None:
    seen = []
    for given in (True, {"mode": "default"}, {"dynamic": True}, False):
        task = build()
        task.model.compile = lambda **arguments: seen.append(arguments)
        Forward(CPU, compile=given).prepare(task)
    assert seen == [{"dynamic": False}, {"dynamic": False, "mode": "default"}, {"dynamic": True}]


@pytest.mark.parametrize(
    ("capability", "mixed", "warns"), [((7, 5), "fp16", True), ((8, 0), "bf16", False)]
)
def test_mixed_takes_what_the_gpu_is_fast_at(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], mixed: str, warns: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert Forward.of({"precision": "mixed"}, CUDA).precision == mixed
    assert Forward.of({"precision": "mixed"}, CPU).precision == "bf16"
    told = pytest.warns(NbtrainWarning, match="Tesla T4 has no bf16") if warns else nullcontext()
    with told:
        assert Forward.of({"precision": "bf16"}, CUDA).precision == "bf16"


def switches() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_tf32_is_a_switch_of_the_gpu_alone() -> None:
    before = switches()
    try:
        forward.use_tf32(True, CPU)
        forward.use_tf32(None, CUDA)
        assert switches() == before
        forward.use_tf32(True, CUDA)
        assert switches() == ("high", True)
        forward.use_tf32(False, CUDA)
        assert switches() == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_settings_come_back_with_a_resume(tmp_path: Path) -> None:
    speed: dict[str, Any] = {"precision": "bf16", "channels_last": True, "tf32": False}
    speed["compile"] = {"backend": "eager"}
    session(tmp_path, **speed).save()
    again = nbtrain.resume("tiny", build, store=tmp_path)
    assert {name: again._opened.arguments[name] for name in speed} == speed
    other = session(tmp_path, precision="fp32")
    assert other.status()["grade"] == "same order"
    assert "precision: bf16 -> fp32" in other.status()["differences"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "half"}, "precision='half' is not known. Use one of: fp32"),
    "channels_last": ({"channels_last": 1}, "channels_last=1 must be True or False"),
    "tf32": ({"tf32": "yes"}, "tf32='yes' must be True, False, or None"),
    "compile": ({"compile": "max"}, "compile='max' must be True, False, or a dict"),
    "compile's": ({"compile": {"backend": print}}, "in plain values"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_values_are_refused(tmp_path: Path, what: str) -> None:
    given, words = REFUSED[what]
    with pytest.raises(ValueError, match=words.split("(")[0]):
        session(tmp_path, **given)


def herd(folder: Path, **changes: Any) -> nbtrain.Population:
    given: dict[str, Any] = {"members": 2, "interval": 1, "epochs": 1, "space": {"lr": [0.01, 0.02]}}
    own = {"store": folder, "batch_size": 3, "num_workers": 0, "bar": False, "device": "cpu"}
    return nbtrain.Population("herd", build, **(given | own | changes))


def test_members_compute_as_a_session_would(tmp_path: Path) -> None:
    population = herd(tmp_path, precision="fp16")
    population.run()
    found = population._rounds.storing.state(population.best_row)
    assert found.state["scaler"]["scale"] > 0
    again = nbtrain.resume("herd", build, store=tmp_path)
    assert again._maker.forward.precision == "fp16"
    with pytest.raises(ValueError, match="keep= is an argument of Session alone"):
        herd(tmp_path / "other", keep=3)
    with pytest.raises(ValueError, match=r"no argument precison=. Did you mean precision="):
        herd(tmp_path / "other", precison="fp16")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", r"device='gpu' is none that torch knows\. Give \"cuda\""),
        (3.5, "device=3.5 is none"),
        ("cuda:99", r"device='cuda:99' is not here: torch sees \w+ GPU.*or leave device= out"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_build_is_called(
    tmp_path: Path, device: Any, words: str
) -> None:
    def build() -> nbtrain.Task:
        raise AssertionError

    with pytest.raises(ValueError, match=words):
        session(tmp_path, build=build, device=device)
    with pytest.raises(ValueError, match=words):
        nbtrain.audit(build, device=device)
    assert not any(tmp_path.iterdir())
