"""The room's invariant: facts only, none in the user's favour where it is uncertain."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nbtrain import host

HOUR_S = 3600.0
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
COLAB = {"COLAB_RELEASE_TAG": "release-colab_20260819"}


def mount_drive(root: Path, name: str = "MyDrive") -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/mounts").write_text("drive /content/drive fuse.drive rw,nosuid 0 0\n")
    (root / "content/drive" / name).mkdir(parents=True)
    return root / "content/drive" / name


# Which host


def test_kaggle_is_known_by_its_run_type(tmp_path: Path) -> None:
    found = host.detect(KAGGLE, tmp_path)
    assert (found.name, found.is_batch) == ("kaggle", False)
    assert (found.limit_s, found.guard_s) == (12 * HOUR_S, 600)
    assert found.output == tmp_path / "kaggle/working/nbtrain"
    assert found.inputs == (tmp_path / "kaggle/input",)
    assert not found.scratch.is_relative_to(tmp_path / "kaggle")


def test_save_and_run_all_is_batch(tmp_path: Path) -> None:
    assert host.detect({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, tmp_path).is_batch


@pytest.mark.parametrize("name", ["TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "ISTPUVM"])
def test_a_kaggle_tpu_has_nine_hours(name: str, tmp_path: Path) -> None:
    assert host.detect({**KAGGLE, name: "0"}, tmp_path).limit_s == 9 * HOUR_S
    assert host.detect({**KAGGLE, name: ""}, tmp_path).limit_s == 12 * HOUR_S


def test_kaggle_wins_over_the_colab_that_its_image_is_built_from(tmp_path: Path) -> None:
    (tmp_path / "var/colab").mkdir(parents=True)
    (tmp_path / "var/colab/hostname").touch()
    mount_drive(tmp_path)
    found = host.detect({**COLAB, **KAGGLE}, tmp_path)
    assert found.name == "kaggle" and not found.drive_mounted


def test_colab_is_known_by_its_release_or_by_its_hostname_file(tmp_path: Path) -> None:
    assert host.detect(COLAB, tmp_path).name == "colab"
    assert host.detect({}, tmp_path).name == "local"
    (tmp_path / "var/colab").mkdir(parents=True)
    (tmp_path / "var/colab/hostname").touch()
    found = host.detect({}, tmp_path)
    assert (found.name, found.limit_s, found.guard_s) == ("colab", 12 * HOUR_S, 900)


@pytest.mark.parametrize("name", ["MyDrive", "My Drive"])
def test_a_mounted_drive_is_where_colab_sessions_survive(name: str, tmp_path: Path) -> None:
    top = mount_drive(tmp_path, name)
    found = host.detect(COLAB, tmp_path)
    assert found.drive_mounted and found.output == top / "nbtrain"
    assert not found.scratch.is_relative_to(tmp_path / "content/drive")
    assert found.scratch.is_relative_to(tmp_path / "content")


def test_an_unmounted_drive_is_said_to_be_unmounted(tmp_path: Path) -> None:
    found = host.detect(COLAB, tmp_path)
    assert not found.drive_mounted
    assert found.output == tmp_path / "content/drive/MyDrive/nbtrain"


def test_a_folder_where_the_drive_should_be_is_no_drive(tmp_path: Path) -> None:
    mount_drive(tmp_path)
    (tmp_path / "proc/mounts").write_text("overlay / overlay rw 0 0\n")
    assert not host.detect(COLAB, tmp_path).drive_mounted


def test_anything_else_is_local_and_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = host.detect({}, tmp_path)
    assert (found.name, found.limit_s, found.guard_s) == ("local", None, 0)
    assert found.output == tmp_path / "nbtrain-sessions"
    assert found.inputs == () and not found.drive_mounted
    assert found.scratch.is_absolute() and found.scratch != found.output


def test_the_environment_is_the_real_one_unless_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert host.detect(root=tmp_path).name == "kaggle"


class Secretive(Mapping[str, str]):
    """An environment that cannot be copied, and remembers what was asked of it."""

    def __init__(self, **names: str) -> None:
        self.names, self.asked = names, set[str]()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return self.names[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        raise AssertionError("the whole environment was read")

    def __len__(self) -> int:
        raise AssertionError("the whole environment was read")


def test_detecting_changes_nothing_and_reads_no_secret(tmp_path: Path) -> None:
    for names in (KAGGLE, COLAB, {}):
        environ = Secretive(KAGGLE_USER_SECRETS_TOKEN="jwt", **names)
        assert "jwt" not in repr(host.detect(environ, tmp_path))
        assert environ.asked and not {name for name in environ.asked if "TOKEN" in name}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", ["papermill", "jupyter-nbconvert", "jupyter-execute", "python"])
def test_a_kernel_started_by_a_batch_tool_is_batch(tool: str, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.py"
    folder = Path(host.__file__).parent
    kernel.write_text(
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import host\nprint(host.detect({}, host.Path('/nowhere')).is_batch)\n"
    )
    script = tmp_path / tool
    script.write_text(
        f"import subprocess, sys; subprocess.run([sys.executable, {str(kernel)!r}], check=True)"
    )
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(tool != "python")


# Its clock


Clock = Callable[[float | Exception, float], None]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Set when PID 1 and this process started, as seconds ago."""

    def set_starts(first: float | Exception, own: float) -> None:
        class Process:
            def __init__(self, pid: int | None = None) -> None:
                self.pid = pid

            def create_time(self) -> float:
                ago_s = first if self.pid == 1 else own
                if isinstance(ago_s, Exception):
                    raise ago_s
                return NOW - ago_s

            def parent(self) -> None:
                return None

        monkeypatch.setattr(psutil, "Process", Process)
        monkeypatch.setattr(time, "time", lambda: NOW)

    return set_starts


NOW = 1_800_000_000.0


@pytest.mark.parametrize("environ", [KAGGLE, COLAB])
def test_on_a_rented_machine_the_clock_starts_with_pid_1(
    environ: dict[str, str], starts: Clock, tmp_path: Path
) -> None:
    starts(5000, 60)
    found = host.detect(environ, tmp_path)
    assert (found.started_at, found.clock) == (NOW - 5000, "start of PID 1")


def test_the_clock_never_starts_later_than_this_process(starts: Clock, tmp_path: Path) -> None:
    starts(60, 5000)
    assert host.detect(KAGGLE, tmp_path).started_at == NOW - 5000


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), psutil.NoSuchProcess(1)])
def test_where_pid_1_is_silent_the_process_counts_and_the_words_say_so(
    error: Exception, starts: Clock, tmp_path: Path
) -> None:
    starts(error, 60)
    found = host.detect(COLAB, tmp_path)
    assert found.started_at == NOW - 60
    assert "kernel" in found.clock and "PID 1 does not say" in found.clock


def test_a_pid_1_older_than_the_limit_is_not_the_machines_start(starts: Clock, tmp_path: Path) -> None:
    starts(12 * HOUR_S - 1, 60)
    assert host.detect(KAGGLE, tmp_path).started_at == NOW - 12 * HOUR_S + 1
    starts(12 * HOUR_S + 1, 60)
    found = host.detect(KAGGLE, tmp_path)
    assert found.started_at == NOW - 60 and "older than the limit" in found.clock


def test_a_local_clock_starts_with_the_kernel(starts: Clock, tmp_path: Path) -> None:
    starts(30 * 24 * HOUR_S, 60)
    found = host.detect({}, tmp_path)
    assert (found.started_at, found.clock) == (NOW - 60, "start of this kernel")


def test_the_real_clock_is_not_in_the_future(tmp_path: Path) -> None:
    for environ in (KAGGLE, COLAB, {}):
        # One tick of the kernel's clock, by which process starts are rounded.
        assert host.detect(environ, tmp_path).started_at <= time.time() + 0.01
        assert host.detect(environ, tmp_path).started_at <= psutil.Process().create_time()


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no CLOCK_BOOTTIME")
def test_the_boot_clock_counts_from_boot() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = host.boot_clock()
    assert before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_without_a_boot_clock_the_monotonic_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    before = time.monotonic()
    now = host.boot_clock()
    assert before <= now <= time.monotonic()


@pytest.mark.parametrize(("allows", "is_batch"), [(False, True), (True, False)])
def test_a_kernel_that_may_not_ask_for_input_has_nobody_before_it(
    monkeypatch: pytest.MonkeyPatch, allows: bool, is_batch: bool
) -> None:
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=allows))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert host.is_notebook()
    assert host.detect({}).is_batch == is_batch


def test_a_plain_process_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not host.is_notebook()
