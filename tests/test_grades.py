"""A resume says how good it is, and why: every difference that can change a bit is named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits, bits, build, cut_and_die, die, finish, in_fresh_process, session
from torch import nn

import nbtrain
from nbtrain import grades
from nbtrain.face import markup
from nbtrain.grades import APPROXIMATE, EXACT, SAME_ORDER, compare
from nbtrain.magics import telling
from nbtrain.opening import Opened

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
T4: dict[str, Any] = {
    "device": "cuda",
    "recipe": "3f2a91c04d1e",
    "default_dtype": "float32",
    "python": "3.12.11",
    **dict.fromkeys(grades.LIBRARIES, "1.0.0"),
    "torch": "2.8.0+cu126",
    "cuda": "12.6",
    "cudnn": 91002,
    "gpu": "Tesla T4",
    "cpu": "AVX2",
    "threads": 2,
    "micro_batch": 32,
    "num_workers": 2,
    "precision": "fp32",
    "channels_last": False,
    "compiled": False,
    "deterministic": "no",
    "matmul": "ieee",
    "conv": "tf32",
    "rnn": "tf32",
    "sdpa": "flash+math+efficient+cudnn",
    "onednn": True,
    "cudnn_enabled": True,
    "cudnn_benchmark": False,
    "cudnn_deterministic": False,
    "cublas_workspace": "",
}
CHANGES: dict[str, tuple[Any, str, str]] = {
    "device": ("cpu", APPROXIMATE, "device: cuda -> cpu"),
    "recipe": ("", APPROXIMATE, "code of build: 3f2a91c04d1e -> none"),
    "default_dtype": ("float64", APPROXIMATE, "default dtype: float32 -> float64"),
    "python": ("3.13.0", APPROXIMATE, "python: 3.12.11 -> 3.13.0"),
    **{name: ("1.0.1", APPROXIMATE, f"{name}: 1.0.0 -> 1.0.1") for name in grades.LIBRARIES},
    "torch": ("2.8.1+cu126", SAME_ORDER, "torch: 2.8.0+cu126 -> 2.8.1+cu126"),
    "cuda": ("12.8", SAME_ORDER, "CUDA: 12.6 -> 12.8"),
    "cudnn": (92000, SAME_ORDER, "cuDNN: 91002 -> 92000"),
    "gpu": ("Tesla P100", SAME_ORDER, "GPU: Tesla T4 -> Tesla P100"),
    "cpu": ("AVX512", SAME_ORDER, "CPU capability: AVX2 -> AVX512"),
    "threads": (4, SAME_ORDER, "CPU threads: 2 -> 4"),
    "micro_batch": (16, SAME_ORDER, "micro-batch: 32 -> 16"),
    "precision": ("fp16", SAME_ORDER, "precision: fp32 -> fp16"),
    "channels_last": (True, SAME_ORDER, "channels last: no -> yes"),
    "compiled": (True, SAME_ORDER, "compiled: no -> yes"),
    "deterministic": ("yes", SAME_ORDER, "deterministic algorithms: no -> yes"),
    "matmul": ("tf32", SAME_ORDER, "float32 matmul: ieee -> tf32"),
    "conv": ("ieee", SAME_ORDER, "float32 convolution: tf32 -> ieee"),
    "rnn": ("ieee", SAME_ORDER, "float32 RNN: tf32 -> ieee"),
    "sdpa": ("math", SAME_ORDER, "attention backends: flash+math+efficient+cudnn -> math"),
    "onednn": (False, SAME_ORDER, "oneDNN: yes -> no"),
    "cudnn_enabled": (False, SAME_ORDER, "cuDNN in use: yes -> no"),
    "cudnn_benchmark": (True, SAME_ORDER, "cuDNN benchmark: no -> yes"),
    "cudnn_deterministic": (True, SAME_ORDER, "deterministic cuDNN: no -> yes"),
    "cublas_workspace": (":16:8", SAME_ORDER, "CUBLAS_WORKSPACE_CONFIG: none -> :16:8"),
}


def read(model: nn.Module | None = None, device: torch.device = CPU) -> dict[str, Any]:
    """Read this kernel's fingerprint."""
    some = nn.Linear(2, 2) if model is None else model
    return grades.fingerprint(device, some, micro_batch=3, num_workers=0, recipe="")


# ------------------------------------------------------------------------------ two fingerprints


@pytest.mark.parametrize("name", CHANGES)
def test_each_difference_has_its_word_and_is_told(name: str) -> None:
    value, word, told = CHANGES[name]
    assert compare(T4, T4 | {name: value}) == grades.Grade(word, (told,))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_is_read_is_what_is_compared(device: torch.device) -> None:
    """But for the number of workers, which is only recorded."""
    assert read(device=device).keys() - {"num_workers"} == CHANGES.keys()
    assert T4.keys() - {"num_workers"} == CHANGES.keys() == grades.NUMBERS.keys() | grades.SUMS.keys()


def test_equal_fingerprints_are_exact_also_through_json() -> None:
    for found in (T4, read(), read(device=CUDA)):
        kept = json.loads(json.dumps(found, allow_nan=False))
        assert kept == found
        assert str(compare(kept, found)) == "exact"


def test_the_number_of_workers_never_counts() -> None:
    assert compare(T4, T4 | {"num_workers": 0}).word == EXACT


@pytest.mark.parametrize(
    ("version", "word"),
    [
        ("2.8.0+cu128", SAME_ORDER),
        ("2.8.1", SAME_ORDER),
        ("2.9.0+cu126", APPROXIMATE),
        ("2.10.0", APPROXIMATE),
        ("3.8.0", APPROXIMATE),
    ],
)
def test_another_minor_version_of_torch_may_draw_other_numbers(version: str, word: str) -> None:
    assert compare(T4, T4 | {"torch": version}).word == word


def test_a_library_that_one_side_never_imported_made_nothing_there() -> None:
    assert compare(T4, T4 | {"timm": None}).word == compare(T4 | {"timm": None}, T4).word == EXACT


def test_what_an_older_nbtrain_did_not_record_is_not_taken_for_equal() -> None:
    then = {name: value for name, value in T4.items() if name != "threads"}
    assert str(compare(then, T4)) == "same order: CPU threads not recorded -> 2"
    assert compare(then, T4 | {"threads": None}).word == EXACT
    grade = compare(None, T4)
    assert str(grade) == "approximate: nothing was recorded of the kernel before"


def test_on_another_kind_of_device_its_switches_tell_nothing_more() -> None:
    grade = compare(T4, T4 | {"device": "cpu", "conv": "ieee", "threads": 8, "python": "3.13.0"})
    assert grade.differences == ("device: cuda -> cpu", "python: 3.12.11 -> 3.13.0")


def test_many_differences_are_one_line_the_heaviest_first() -> None:
    others = {"threads": 4, "torch": "2.9.0", "cpu": "AVX512", "timm": "1.1", "cudnn": 1}
    grade = compare(T4, T4 | others)
    assert grade.word == APPROXIMATE and len(grade.differences) == 5
    assert str(grade) == (
        "approximate: timm 1.0.0 -> 1.1, torch 2.8.0+cu126 -> 2.9.0, cuDNN 91002 -> 1, and 2 more"
    )


# ------------------------------------------------------------------------------ this kernel


@pytest.fixture
def switches() -> Iterator[None]:
    """Put every switch of torch that is turned here back."""
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    threads, onednn, benchmark = torch.get_num_threads(), mkldnn.enabled, cudnn.benchmark
    before = (mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch._C._set_mkldnn_enabled(onednn)
    cudnn.benchmark, cudnn.deterministic = benchmark, False
    mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


TURNS: dict[str, tuple[torch.device, str, Callable[[], Any]]] = {
    "threads": (CPU, "threads", lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "dtype": (CPU, "default_dtype", lambda: torch.set_default_dtype(torch.float64)),
    "deterministic": (CPU, "deterministic", lambda: torch.use_deterministic_algorithms(True)),
    "warned of": (
        CPU,
        "deterministic",
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "attention": (CPU, "sdpa", lambda: torch.backends.cuda.enable_flash_sdp(False)),
    "attention on a GPU": (CUDA, "sdpa", lambda: torch.backends.cuda.enable_flash_sdp(False)),
    "onednn": (CPU, "onednn", lambda: torch._C._set_mkldnn_enabled(False)),
    "matmul": (CPU, "matmul", lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")),
    "TF32": (CUDA, "matmul", lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")),
    "benchmark": (CUDA, "cudnn_benchmark", lambda: setattr(torch.backends.cudnn, "benchmark", True)),
    "cudnn": (
        CUDA,
        "cudnn_deterministic",
        lambda: setattr(torch.backends.cudnn, "deterministic", True),
    ),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_switch_that_is_turned_is_seen(turn: str, switches: None) -> None:
    device, name, act = TURNS[turn]
    before = read(device=device)
    act()
    after = read(device=device)
    assert {n for n in before if before[n] != after[n]} == {name}


def test_what_has_no_say_on_a_cpu_is_not_read_there(switches: None) -> None:
    before = read()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert read() == before


def test_the_older_switch_of_precision_is_seen_too(switches: None) -> None:
    torch.set_float32_matmul_precision("high")
    assert read()["matmul"] == read(device=CUDA)["matmul"] == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert read()["matmul"] == read(device=CUDA)["matmul"] == "ieee"


def test_a_compiled_model_is_seen_however_it_was_compiled() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not read(inner)["compiled"]
    assert read(torch.compile(inner))["compiled"]
    assert read(nn.Sequential(torch.compile(nn.Linear(2, 2))))["compiled"]
    inner[1].compile()
    assert read(inner)["compiled"]


READING = """
import sys, time, torch
from nbtrain import grades
model = torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(500)])
before, took_s = set(sys.modules), []
for _ in range(9):
    began = time.perf_counter()
    grades.fingerprint(torch.device("cpu"), model, micro_batch=1, num_workers=0, recipe="")
    took_s.append(time.perf_counter() - began)
assert set(sys.modules) == before, set(sys.modules) - before
grades.fingerprint(torch.device("cuda"), model, micro_batch=1, num_workers=0, recipe="")
assert not torch.cuda.is_initialized() and "torch._dynamo" not in sys.modules
print(min(took_s))
"""


def test_reading_imports_nothing_warns_of_nothing_and_costs_nothing() -> None:
    command = [sys.executable, "-W", "error", "-c", READING]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stderr == "", found.stderr
    assert float(found.stdout) < 0.005


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_model_is_read() -> None:
    torch.ones(1, device=CUDA)
    assert read(device=CUDA)["gpu"] == torch.cuda.get_device_name()


# ------------------------------------------------------------------------------ real resumes


def other_build() -> nbtrain.Task:
    task = build()
    task.metrics = {"always": lambda output, target: output.sum() * 0}
    return task


def go_on(folder: Path, result: Path, threads: int = 1, dies: bool = False, **changes: Any) -> None:
    """Resume with so many threads, train to the end unless it dies first, and write it all down."""
    torch.set_num_threads(threads)
    run = session(folder, **changes)
    told = {"status": run.status(), "hello": run.lines[0], "panel": markup.status(run.status())}
    told["magic"] = telling.status(run.status())
    if dies:
        next(iter(run))
        run.save()
        die()
    run.run()
    told |= {"bits": bits(run), "stages": run._live.stages}
    torch.save(told, result)


def cut(folder: Path, **changes: Any) -> Path:
    assert in_fresh_process(cut_and_die, folder, 7, **changes) == -signal.SIGKILL
    return folder


def gone_on(folder: Path, **changes: Any) -> dict[str, Any]:
    result = folder.with_suffix(".told")
    assert in_fresh_process(go_on, folder, result, **changes) == 0
    told: dict[str, Any] = torch.load(result, weights_only=False)
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the bits of the run that is never cut."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_fresh_process(finish, folder / "run", folder / "bits.pt") == 0
    found: dict[str, torch.Tensor] = torch.load(folder / "bits.pt")
    return found


def test_a_kernel_that_is_the_same_is_exact_and_so_are_the_bits(
    tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    told = gone_on(cut(tmp_path / "run"))
    assert (told["status"]["grade"], told["status"]["differences"]) == ("exact", [])
    assert told["status"]["resumed"] == "resumed at step 2 (exact)"
    assert "resumed at epoch 0.78, step 2, stage 2 (exact), from " in told["hello"]
    assert_same_bits(told["bits"], whole)


def test_other_workers_are_exact_too(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    told = gone_on(cut(tmp_path / "run"), num_workers=2)
    assert told["status"]["grade"] == "exact"
    assert_same_bits(told["bits"], whole)


def test_another_number_of_threads_is_the_same_order_and_named_everywhere(tmp_path: Path) -> None:
    told = gone_on(cut(tmp_path / "run"), threads=2)
    assert told["status"]["grade"] == "same order"
    assert told["status"]["differences"] == ["CPU threads: 1 -> 2"]
    where = "step 2, stage 2 (same order: CPU threads 1 -> 2), from "
    assert where in told["hello"] and "\n" not in told["hello"]
    said = "stage 2, resumed at step 2 (same order: CPU threads 1 -&gt; 2)"
    assert said in told["panel"]
    assert said.replace("&gt;", ">") in told["magic"]


def test_the_list_of_stages_keeps_each_grade(tmp_path: Path) -> None:
    folder = cut(tmp_path / "run")
    died = in_fresh_process(go_on, folder, tmp_path / "never", threads=2, dies=True)
    assert died == -signal.SIGKILL
    stages = gone_on(folder, threads=2)["stages"]
    assert [stage["grade"] for stage in stages] == ["new", "same order", "exact"]
    assert [stage["differences"] for stage in stages] == [[], ["CPU threads: 1 -> 2"], []]


def test_another_recipe_is_approximate(tmp_path: Path) -> None:
    told = gone_on(cut(tmp_path / "run"), build=other_build)
    assert told["status"]["grade"] == "approximate"
    assert told["status"]["differences"][0].startswith("code of build: ")
    same = gone_on(cut(tmp_path / "other", build=other_build), build=other_build)
    assert same["status"]["grade"] == "exact"


def test_one_line_in_a_fresh_kernel_is_exact(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    folder, result = cut(tmp_path / "run"), tmp_path / "told"
    assert in_fresh_process(go_on_in_one_line, folder, result) == 0
    told = torch.load(result)
    assert told["grade"] == "exact"
    assert_same_bits(told["bits"], whole)


def go_on_in_one_line(folder: Path, result: Path) -> None:
    run = nbtrain.resume("tiny", store=folder, trust_code=True)
    torch.save({"grade": run.status()["grade"], "bits": bits(run.run())}, result)


def begun(folder: Path, **changes: Any) -> nbtrain.Session:
    """Open a session, train two steps, save."""
    run = session(folder, **changes)
    for batch in run:
        run.update(run.task.run(batch)[0])
        if run.step == 2:
            break
    return run


def test_cells_that_are_run_again_are_graded_too(tmp_path: Path) -> None:
    first = begun(tmp_path)
    assert (first.status()["grade"], first.status()["resumed"]) == ("new", "new")
    again = session(tmp_path)
    assert again.stage == 1 and again.status()["resumed"] == "resumed at step 2 (exact)"
    again.run()
    assert [stage["grade"] for stage in again._live.stages] == ["new"]


def test_what_changes_between_two_runs_of_a_kernel_is_graded_too(
    tmp_path: Path, switches: None
) -> None:
    run = begun(tmp_path)
    run.set(batch_size=5)
    torch.set_num_threads(torch.get_num_threads() + 1)
    run.run()
    assert run.status()["grade"] == "same order"
    assert run.status()["resumed"].startswith("resumed at step 2 (same order: CPU threads ")
    assert [stage["grade"] for stage in run._live.stages] == ["same order"]
    assert any("goes on at" in line and "CPU threads" in line for line in run.lines)


def test_another_micro_batch_in_the_cell_is_the_same_order(tmp_path: Path) -> None:
    begun(tmp_path)
    run = session(tmp_path, batch_size=5)
    assert str(run._live.grade) == "same order: micro-batch 3 -> 5"
    run.run()
    again = session(tmp_path, batch_size=5)
    assert again.status()["grade"] == "exact"
    stages = again._live.stages
    assert [stage["grade"] for stage in stages] == ["same order"], "the lowest of one kernel's"


def test_a_micro_batch_that_was_set_live_is_the_runs_own(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.set(batch_size=5)
    run.save()
    assert session(tmp_path).status()["grade"] == "exact"
    assert session(tmp_path, batch_size=5).status()["grade"] == "exact"


def test_the_kernel_is_read_when_a_checkpoint_is_written(tmp_path: Path, switches: None) -> None:
    run = session(tmp_path)
    run.save()
    torch.set_num_threads(2)
    run.save()
    assert session(tmp_path).status()["grade"] == "exact"
    torch.set_num_threads(1)
    assert session(tmp_path).status()["differences"] == ["CPU threads: 2 -> 1"]


def test_a_checkpoint_of_before_there_were_grades_is_approximate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Opened.identity

    def without(opened: Opened, *args: Any) -> dict[str, Any]:
        return {k: v for k, v in identity(opened, *args).items() if k != "fingerprint"}

    with monkeypatch.context() as older:
        older.setattr(Opened, "identity", without)
        begun(tmp_path)
    run = session(tmp_path)
    assert run.status()["resumed"] == (
        "resumed at step 2 (approximate: nothing was recorded of the kernel before)"
    )
    run.run()
    assert session(tmp_path).status()["grade"] == "exact"


# ------------------------------------------------------------------------------ deterministic=True


def putting() -> nbtrain.Task:
    """A task with an operation that has no deterministic form, on a CPU either."""

    def put(*_: Any) -> None:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    task = build()
    task.model.register_forward_hook(put)
    return task


def test_deterministic_refuses_what_is_not(tmp_path: Path, switches: None) -> None:
    session(tmp_path / "any", build=putting).run()
    run = session(tmp_path / "refused", build=putting, deterministic=True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        run.run()


def test_deterministic_is_stored_and_repeated(tmp_path: Path, switches: None) -> None:
    begun(tmp_path, deterministic=True)
    assert torch.backends.cudnn.deterministic and torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    run = nbtrain.resume("tiny", store=tmp_path, trust_code=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert run.status()["grade"] == "exact"
    torch.use_deterministic_algorithms(False)
    run = nbtrain.resume("tiny", store=tmp_path, trust_code=True, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert run.status()["differences"] == ["deterministic algorithms: yes -> no"]
