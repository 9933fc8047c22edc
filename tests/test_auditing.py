"""The audit finds each kind of hidden randomness, passes a clean task, and touches nothing."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

import nbtrain
from nbtrain.auditing import Audit, audit
from nbtrain.errors import TaskError

SHARED = np.random.default_rng(0)
MADE_OUTSIDE = nn.Linear(6, 3)


class Samples(Dataset[Any]):
    """Keyed noise, and what `extra` adds to it."""

    def __init__(self, extra: Callable[[int], float] = float, length: int = runs.NUM_SAMPLES) -> None:
        self.extra, self.length = extra, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return 0.1 * torch.randn(6) + self.extra(index), index % 3


class Added(nn.Module):
    """Adds to its input what a function gives."""

    def __init__(self, extra: Callable[[], float]) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.extra()


def task(train: Any = None, *layers: nn.Module) -> nbtrain.Task:
    model = nn.Sequential(nn.Linear(6, 3), *layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Samples() if train is None else train)


def audited(build: Callable[[], nbtrain.Task], **changes: Any) -> Audit:
    """Audit in batches of 3, without workers as it is."""
    return audit(build, **{"batch_size": 3, "num_workers": 0, "device": "cpu"} | changes)


def entropy() -> float:
    """Draw from the system by a way that no watching sees."""
    with open("/dev/urandom", "rb") as file:
        return float(struct.unpack("<H", file.read(2))[0]) / 65536


# ---- clean


def test_a_clean_task_passes_with_augmentation_dropout_and_workers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = audit(runs.build, batch_size=3, accumulate=3, num_workers=2, device="cpu")
    assert found.ok and found.cause == "" and found.step is None
    assert list(found.losses) == ["run 1", "run 2", "run 3", "0 workers", "1 worker", "2 threads"]
    assert len({digest for label, digest in found.weights.items() if "thread" not in label}) == 1
    printed = capsys.readouterr().out
    assert str(found) in printed
    assert "reproducible: 3 runs and workers 0, 1, 2 gave the same bits for 4 steps." in printed
    assert "<- differs" not in printed


def test_the_losses_are_the_very_ones_of_a_session(tmp_path: Path) -> None:
    """Five windows, over the end of an epoch and its ragged tail."""
    found = audit(runs.build, 5, batch_size=3, accumulate=3, device="cpu")
    run = runs.session(tmp_path, warmup_epochs=0, decay="constant")
    assert run.run().history["loss"][:5] == found.losses["run 1"]


def test_a_sample_that_draws_from_sample_rng_is_clean() -> None:
    drawn = Samples(lambda index: float(nbtrain.sample_rng().normal() + nbtrain.sample_rng().normal()))
    assert audited(lambda: task(drawn)).ok


def test_a_loss_is_written_with_all_its_bits() -> None:
    def build() -> nbtrain.Task:
        found = task(Samples())
        found.model.double()
        found.collate = lambda samples: (
            torch.stack([x for x, _ in samples]).double(),
            torch.tensor([y for _, y in samples]),
        )
        return found

    for found in (audited(build, steps=2), audited(task, steps=2)):
        rows = str(found).splitlines()[1:3]
        shown = [float(row.split()[1]) for row in rows]
        if found.digits == 9:
            shown = torch.tensor(shown).tolist()
        assert shown == found.losses["run 1"]
    assert audited(build, steps=1).digits == 17


# ---- a: the first weights


def test_first_weights_that_have_no_key_are_named_with_their_line() -> None:
    def build() -> nbtrain.Task:
        found = task()
        bias = np.random.default_rng().normal(size=3)
        found.model[0].bias.data = torch.from_numpy(bias).float()  # type: ignore[index]
        return found

    found = audited(build)
    assert not found.ok and found.step == 1
    assert "The first weights differ: 0.bias." in found.cause
    assert "`bias = np.random.default_rng().normal(size=3)` (line" in found.cause


@pytest.mark.parametrize("draw", ["os.urandom(2)[0]", "time.time() % 1", "random.Random().random()"])
def test_the_first_weights_lines_may_ask_the_system_in_any_way(draw: str) -> None:
    names = {"os": os, "time": time, "random": random, "task": task, "nn": nn}
    code = f"def build():\n    t = task()\n    nn.init.constant_(t.model[0].bias, {draw})\n    return t"
    exec(compile(code, "<cell>", "exec"), names)
    assert "(line 3, in build)" in audited(names["build"]).cause  # type: ignore[arg-type]


def test_a_generator_outside_of_build_is_named() -> None:
    def build() -> nbtrain.Task:
        found = task()
        nn.init.constant_(found.model[0].bias, SHARED.normal())  # type: ignore[index, arg-type]
        return found

    found = audited(build)
    assert "the global SHARED, a numpy Generator" in found.cause
    assert "inside build" in found.cause


def test_a_model_made_outside_of_build_is_told_and_not_trained() -> None:
    before = MADE_OUTSIDE.weight.detach().clone()

    def build() -> nbtrain.Task:
        optimizer = torch.optim.SGD(MADE_OUTSIDE.parameters(), lr=0.1)
        return nbtrain.Task(model=MADE_OUTSIDE, optimizer=optimizer, train=Samples())

    found = audited(build)
    assert not found.ok and not found.losses
    assert "made outside of it" in str(found)
    assert torch.equal(before, MADE_OUTSIDE.weight)


# ---- b: the data set's own generator


class Transform:
    """Noise from a generator of its own."""

    def __init__(self, rng: Any, draw: Callable[[Any], float]) -> None:
        self.rng, self.draw = rng, draw

    def __call__(self, index: int) -> float:
        return self.draw(self.rng)


@pytest.mark.parametrize(
    ("make", "draw", "kind"),
    [
        (lambda: np.random.default_rng(0), lambda rng: float(rng.normal()), "numpy Generator"),
        (lambda: np.random.RandomState(0), lambda rng: float(rng.normal()), "numpy RandomState"),
        (lambda: random.Random(0), lambda rng: rng.random(), "python Random"),
        (torch.Generator, lambda rng: float(torch.rand(1, generator=rng)), "torch Generator"),
        (lambda: np.random.default_rng(), lambda rng: float(rng.normal()), "numpy Generator"),
    ],
)
def test_the_data_sets_own_generator_is_named_by_its_path(
    make: Callable[[], Any], draw: Callable[[Any], float], kind: str
) -> None:
    def build() -> nbtrain.Task:
        return task(Subset(Samples(Transform(make(), draw)), range(20)))

    found = audited(build)
    assert not found.ok
    assert found.step is not None, "runs without workers and with two cannot be the same"
    assert "A sample depends on what was read before it" in found.cause
    assert (
        f"\n  train.dataset.extra.rng, a {kind}, in `return self.draw(self.rng)` (line" in found.cause
    )
    assert "nbtrain.sample_rng()" in found.cause


def holders() -> dict[str, tuple[str, Callable[[], Any]]]:
    def closed() -> Any:
        rng = np.random.default_rng(0)
        return lambda index: float(rng.normal())

    class Shared:
        rng = np.random.default_rng(0)

        def __call__(self, index: int) -> float:
            return float(self.rng.normal())

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([Added(functools.partial(draw, np.random.default_rng(0)))])

        def forward(self, index: int) -> Any:
            return self.steps[0](0.0)

    def draw(rng: np.random.Generator) -> float:
        return float(rng.normal())

    return {
        "closure": ("rng, of the function around <lambda>, a numpy Generator", closed),
        "global": ("the global SHARED, a numpy", lambda: lambda index: float(SHARED.normal())),
        "class": ("train.extra.rng, a numpy Generator", Shared),
        "module": ("train.extra.steps.0.extra[0], a numpy Generator", Chain),
    }


@pytest.mark.parametrize("holder", ["closure", "global", "class", "module"])
def test_a_generator_is_found_wherever_a_data_set_keeps_it(holder: str) -> None:
    words, make = holders()[holder]
    assert words in audited(lambda: task(Samples(make())), steps=1).cause


def test_a_generator_without_a_seed_in_getitem_is_named_with_its_line() -> None:
    def noise(index: int) -> float:
        return float(np.random.default_rng().normal())

    found = audited(lambda: task(Samples(noise)))
    assert not found.ok and found.step == 1
    assert "`return float(np.random.default_rng().normal())` (line" in found.cause
    assert "noise)" in found.cause


def test_a_stateful_sample_is_found_where_the_trained_steps_do_not_show_it() -> None:
    """One step, in one batch: whoever reads it, it is the first that is read."""
    rng_of = lambda: Transform(np.random.default_rng(0), lambda rng: float(rng.normal()))  # noqa: E731
    found = audited(lambda: task(Samples(rng_of())), steps=1)
    assert found.step is None and not found.ok
    assert "gave the same bits for 1 step, but a resumed run would not" in found.verdict
    assert "train.extra.rng" in found.cause


def test_a_generator_that_is_kept_but_not_drawn_from_is_no_fault() -> None:
    assert audited(lambda: task(Samples(Transform(np.random.default_rng(0), lambda rng: 0.5)))).ok


def test_what_moves_but_is_not_the_cause_is_not_named() -> None:
    class Counting(Transform):
        reads = 0

        def __call__(self, index: int) -> float:
            self.reads += 1
            return super().__call__(index)

    def build() -> nbtrain.Task:
        return task(Samples(Counting(np.random.default_rng(0), lambda rng: float(rng.normal()))))

    cause = audited(build, steps=1).cause
    assert "train.extra.rng" in cause
    assert "reads" not in cause


def test_a_sampler_with_a_generator_of_its_own_is_named() -> None:
    class Order(torch.utils.data.Sampler[int]):
        def __init__(self) -> None:
            self.rng = np.random.default_rng()

        def __len__(self) -> int:
            return 9

        def __iter__(self) -> Any:
            return iter(self.rng.permutation(9).tolist())

    found = audited(lambda: task(DataLoader(Samples(length=9), batch_size=3, sampler=Order())))
    assert not found.ok
    assert "The order differs: Order" in found.cause
    assert "train.sampler.rng, a numpy Generator" in found.cause


# ---- c: the worker, a counter, a cache


def test_a_sample_that_depends_on_the_worker_is_named_with_its_line() -> None:
    def by_worker(index: int) -> float:
        info = get_worker_info()
        return 0.0 if info is None else 1.0 + info.id

    found = audited(lambda: task(Samples(by_worker)))
    assert not found.ok and found.step == 1
    assert "between 3 runs as they are and 1 worker, 2 workers" in found.verdict
    assert "The samples depend on the worker that reads them" in found.cause
    assert "`info = get_worker_info()` (line" in found.cause


def test_a_worker_init_that_seeds_the_data_set_is_named() -> None:
    def seed(number: int) -> None:
        info: Any = get_worker_info()
        info.dataset.dataset.offset = float(number)

    class Offset(Samples):
        offset = 5.0

        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + self.offset, y

    def build() -> nbtrain.Task:
        return task(DataLoader(Offset(), batch_size=3, shuffle=True, worker_init_fn=seed))

    assert "worker_init_fn" in audited(build).cause


def test_a_counter_in_the_data_set_is_named_with_its_values() -> None:
    class Counting(Samples):
        count = 0

        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            self.count += 1
            return x + self.count, y

    found = audited(lambda: task(Counting()))
    assert "A sample depends on what was read before it" in found.cause
    assert "train.count (0 before, 3 after)" in found.cause
    assert "sample_rng" not in found.cause


def test_a_cache_of_augmented_samples_is_named() -> None:
    class Caching(Samples):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, Any] = {}

        def __getitem__(self, index: int) -> Any:
            if index not in self.cache:
                self.cache[index] = super().__getitem__(index)
            return self.cache[index]

    found = audited(lambda: task(Caching()))
    assert not found.ok
    assert "train.cache (of 0 items before, 3 after)" in found.cause


# ---- d: the model, and operations


def test_a_modules_own_generator_is_named() -> None:
    def build() -> nbtrain.Task:
        rng = np.random.default_rng()
        return task(None, Added(Drawing(rng)))

    class Drawing:
        def __init__(self, rng: np.random.Generator) -> None:
            self.rng = rng

        def __call__(self) -> torch.Tensor:
            return torch.from_numpy(self.rng.normal(size=3)).float()

    found = audited(build)
    assert not found.ok and found.step == 1
    assert "The same window, done twice" in found.cause
    assert "model.1.extra.rng, a numpy Generator" in found.cause


def test_a_seeded_one_is_found_although_all_runs_agree() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rng = torch.Generator().manual_seed(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(x.shape, generator=self.rng)

    found = audited(lambda: task(None, Noise()))
    assert found.step is None and not found.ok
    assert "model.1.rng, a torch Generator" in found.cause


def test_a_forward_that_asks_the_system_is_named_with_its_line() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + os.urandom(1)[0])

    found = audited(lambda: task(None, Noise()))
    assert "`return x * (1 + os.urandom(1)[0])` (line" in found.cause


class Late(nn.Module):
    """Draws from nowhere, from the second step on, unless `is_quiet` says no."""

    def __init__(self, is_quiet: Callable[[], bool] = lambda: False, puts: bool = False) -> None:
        super().__init__()
        self.is_quiet, self.puts = is_quiet, puts
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1  # type: ignore[operator]
        if self.puts:
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
        late = self.count > 1 and not self.is_quiet()  # type: ignore[operator]
        return x * (1 + entropy()) if late else x


def test_an_operation_is_named_as_torch_names_it() -> None:
    found = audited(lambda: task(None, Late(puts=True)))
    assert not found.ok and found.step == 2
    assert "an operation gives other bits each time: put_, of which torch has no" in found.cause


@pytest.mark.parametrize(
    ("is_quiet", "line"),
    [
        (torch.are_deterministic_algorithms_enabled, "torch.use_deterministic_algorithms(True)"),
        (
            lambda: torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
            "torch.backends.cudnn.deterministic = True",
        ),
    ],
)
def test_what_a_deterministic_switch_cures_names_the_switch(
    is_quiet: Callable[[], bool], line: str
) -> None:
    found = audited(lambda: task(None, Late(is_quiet)))
    assert found.step == 2
    assert f"Write into build: {line}, with" in found.cause


def test_what_torch_cannot_name_is_said_to_be_unknown() -> None:
    assert "torch names none" in audited(lambda: task(None, Late())).cause


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_nondeterministic_operation_on_the_gpu_is_named() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            many = torch.randn(2_000_000, device=x.device) * 1e3
            into = torch.zeros(3, device=x.device)
            index = torch.arange(2_000_000, device=x.device) % 3
            return x + into.index_add(0, index, many) * 1e-3

    found = audited(lambda: task(None, Sum()), device="cuda")
    assert not found.ok
    assert "torch.use_deterministic_algorithms(True)" in found.cause or "index_add" in found.cause


# ---- e: threads


def test_other_bits_with_other_threads_are_a_note_and_no_failure() -> None:
    class Threads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.get_num_threads()

    now = torch.get_num_threads()
    found = audited(lambda: task(None, Threads()))
    assert found.ok
    assert "another number of CPU threads" in found.notes[0]
    assert torch.get_num_threads() == now
    assert audited(task).notes == []


# ---- what is left behind, and what comes out


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nbtrain.Task:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision("high")
        return runs.build()

    def flags() -> list[Any]:
        cudnn = torch.backends.cudnn
        return [
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            (cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision()),
        ]

    monkeypatch.chdir(tmp_path)
    random.seed(12)  # states that no audit before has left
    np.random.seed(34)
    torch.manual_seed(56)
    before, numpy = flags(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    states = [random.getstate(), torch.get_rng_state(), numpy]
    threads, newest = threading.enumerate(), nbtrain.opening.newest()
    found = audited(build, num_workers=2)
    assert found.losses
    assert flags() == before
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]
    for thread in set(threading.enumerate()) - set(threads):
        thread.join(30)  # that of a worker's queue, on its way out
        assert not thread.is_alive()
    assert not multiprocessing.active_children()
    assert nbtrain.opening.newest() is newest
    assert not list(tmp_path.iterdir())


def test_gradients_are_on_for_the_audit_alone() -> None:
    with torch.no_grad():
        assert audited(task).ok
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps=0 must be a whole number from 1 up"),
        ({"steps": "4"}, "steps='4' must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"accumulate": 1.5}, "accumulate=1.5 must be"),
        ({"seed": None}, "seed=None must be a whole number."),
        ({"num_workers": -1}, "num_workers=-1 must be"),
    ],
)
def test_a_bad_argument_is_refused_before_build_is_called(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        audited(lambda: pytest.fail("called"), **changes)


def test_errors_come_out_as_in_a_session() -> None:
    with pytest.raises(TaskError, match=r"build returned a builtins\.int"):
        audited(lambda: 3)  # type: ignore[arg-type, return-value]

    with pytest.raises(nbtrain.DataError, match=r"ZeroDivisionError: .*\n  at index"):
        audited(lambda: task(Samples(lambda index: 1 / 0)))
    with pytest.raises(nbtrain.DataError, match="with drop_last leaves nothing of 2 samples"):
        audited(lambda: task(DataLoader(Samples(length=2), batch_size=5, drop_last=True)), batch_size=5)


def test_a_lack_of_memory_says_what_to_try() -> None:
    def short(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def greedy() -> nbtrain.Task:
        task = runs.build()
        task.loss = short
        return task

    with pytest.raises(torch.OutOfMemoryError) as told:
        nbtrain.audit(greedy, steps=1, batch_size=3)
    (note,) = told.value.__notes__
    assert "smaller batch_size=" in note


def test_a_number_of_workers_that_nobody_asked_for_may_fail() -> None:
    def here(index: int) -> float:
        assert get_worker_info() is None, "no workers, please"
        return 0.0

    found = audited(lambda: task(Samples(here)))
    assert found.ok
    assert list(found.losses) == ["run 1", "run 2", "run 3", "2 threads"]
    assert (
        "with 1 worker the data could not be read" in found.notes[0]
        and "no workers, please" in found.notes[0]
    )


def test_a_loss_that_is_not_finite_is_compared_like_any_other() -> None:
    found = audited(lambda: task(Samples(lambda index: float("nan"))))
    assert found.ok and "nan" in str(found)


# ---- of a session


def test_a_session_is_audited_with_its_settings_and_stays_as_it_is(tmp_path: Path) -> None:
    run = runs.session(tmp_path, num_workers=1)
    before = runs.bits(run)
    found = run.audit(2)
    assert found.ok and "workers 0, 1, 2" in found.verdict
    runs.assert_same_bits(before, runs.bits(run))
    assert found.losses["run 1"] == audit(runs.build, 2, batch_size=3, accumulate=3).losses["run 1"]


def test_a_session_that_trains_or_has_no_build_is_refused(tmp_path: Path) -> None:
    run = runs.session(tmp_path)
    for _ in run:
        with pytest.raises(nbtrain.SessionError, match=r"'tiny' is training in this kernel.*Pause"):
            run.audit()
        break
    made = task()
    own = nbtrain.Session(
        "own", model=made.model, optimizer=made.optimizer, train=made.train, store=tmp_path, bar=False
    )
    with pytest.raises(nbtrain.SessionError, match="without build"):
        own.audit()


def test_what_a_build_returns_is_no_build() -> None:
    with pytest.raises(ValueError, match=r"Give the function: build, not build\(\)"):
        nbtrain.audit(runs.build())  # type: ignore[arg-type]
