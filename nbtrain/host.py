"""Which notebook this is: its limits, its places, and when its clock began. Facts only.

The invariant: nothing here is a guess in the user's favour. Where the host gives no number there is
None; where a start is uncertain, the earlier one is taken, and `clock` says how it is known.

::

              sessions survive in        searched too     this machine's own disk
    kaggle    /kaggle/working/nbtrain    /kaggle/input    /tmp/nbtrain
    colab     <Drive>/nbtrain                             /content/nbtrain-scratch
    local     ./nbtrain-sessions                          the user's cache folder
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil


@dataclass(frozen=True)
class Host:
    """The facts of one notebook."""

    name: str  # "kaggle", "colab" or "local"
    is_batch: bool  # nobody is watching: Kaggle's Save & Run All, papermill or nbconvert
    limit_s: float | None  # the host's own limit, None where unknown
    guard_s: float  # kept back from that limit for what the host does after the last cell
    started_at: float  # time.time() of the machine's or container's start
    clock: str  # words: how started_at is known, e.g. "start of PID 1"
    output: Path  # where sessions survive: the root of a store, without the session
    inputs: tuple[Path, ...]  # read-only places to search
    scratch: Path  # this machine's own disk, for local-first commits
    drive_mounted: bool = False  # Colab only


def detect(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> Host:
    """Find out which notebook this is; look, and change nothing.

    Args:
        environ: Instead of os.environ; a few names are looked at and none is kept.
        root: Instead of "/", so that a fake machine can be laid out in a folder.
    """
    environ = os.environ if environ is None else environ
    # Kaggle first: its image is built from Colab's, and carries much of what tells Colab.
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return _kaggle(environ, root)
    if "COLAB_RELEASE_TAG" in environ or (root / "var/colab/hostname").exists():
        return _colab(root)
    return _local()


def kernel() -> Any | None:
    """Return the kernel of a notebook that this process is, or None."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) if ipython is not None else None


def is_notebook() -> bool:
    """Tell whether this is the kernel of a notebook, with a front end that shows things."""
    return kernel() is not None


def boot_clock() -> float:
    """Return monotonic seconds that go on while the machine sleeps, where it can count them."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


_HOUR_S = 3600.0

# kaggle.com/docs/notebooks: "12 hours execution time for CPU and GPU notebook sessions and 9 hours
# for TPU notebook sessions". The guard is for nbconvert and for collecting up to 20 GB of output.
_KAGGLE_LIMIT_S = 12 * _HOUR_S
_KAGGLE_TPU_LIMIT_S = 9 * _HOUR_S
_KAGGLE_GUARD_S = 600.0
_TPU_NAMES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "ISTPUVM", "TPU_NAME")

# The Colab FAQ: "notebooks can run for at most 12 hours, depending on availability and your usage
# patterns": a ceiling and no promise. The guard is for Drive, which uploads after the write.
_COLAB_LIMIT_S = 12 * _HOUR_S
_COLAB_GUARD_S = 900.0

_BATCH_TOOLS = ("papermill", "nbconvert", "jupyter-nbconvert", "jupyter-execute")


def _kaggle(environ: Mapping[str, str], root: Path) -> Host:
    is_tpu = any(environ.get(name) for name in _TPU_NAMES)
    limit_s = _KAGGLE_TPU_LIMIT_S if is_tpu else _KAGGLE_LIMIT_S
    started_at, clock = _machine_start(limit_s)
    return Host(
        name="kaggle",
        is_batch=environ["KAGGLE_KERNEL_RUN_TYPE"] == "Batch" or _is_run_by_a_tool(),
        limit_s=limit_s,
        guard_s=_KAGGLE_GUARD_S,
        started_at=started_at,
        clock=clock,
        output=root / "kaggle/working/nbtrain",
        inputs=(root / "kaggle/input",),
        scratch=root / "tmp/nbtrain",
    )


def _colab(root: Path) -> Host:
    started_at, clock = _machine_start(_COLAB_LIMIT_S)
    drive = _find_drive(root)
    return Host(
        name="colab",
        is_batch=_is_run_by_a_tool(),
        limit_s=_COLAB_LIMIT_S,
        guard_s=_COLAB_GUARD_S,
        started_at=started_at,
        clock=clock,
        output=(drive or root / "content/drive/MyDrive") / "nbtrain",
        inputs=(),
        scratch=root / "content/nbtrain-scratch",
        drive_mounted=drive is not None,
    )


def _local() -> Host:
    # Nobody takes a local machine away, and its PID 1 may be weeks old.
    return Host(
        name="local",
        is_batch=_is_run_by_a_tool(),
        limit_s=None,
        guard_s=0.0,
        started_at=psutil.Process().create_time(),
        clock="start of this kernel",
        output=Path.cwd() / "nbtrain-sessions",
        inputs=(),
        scratch=platformdirs.user_cache_path("nbtrain"),
    )


def _machine_start(limit_s: float) -> tuple[float, str]:
    """Return when the container started, and how that is known."""
    own = psutil.Process().create_time()
    try:
        first = psutil.Process(1).create_time()
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return own, "start of this kernel (PID 1 does not say when it started)"
    if time.time() - first > limit_s:
        # Otherwise a machine that outlives the limit, as paid ones do, could never train again.
        return own, "start of this kernel (PID 1 is older than the limit allows)"
    return min(first, own), "start of PID 1"


def _find_drive(root: Path) -> Path | None:
    """Return the top folder of a mounted Drive, None if there is none."""
    mounts = root / "proc/mounts"
    if mounts.exists() and "fuse.drive" not in mounts.read_text():
        # A folder of that name without a mount is the trap that loses runs: somebody made it.
        return None
    for name in ("MyDrive", "My Drive"):
        # isdir is False also where the mount has died; Path.is_dir would raise.
        if os.path.isdir(drive := root / "content/drive" / name):
            return drive
    return None


def _is_run_by_a_tool() -> bool:
    """Tell whether nobody sits before this kernel: a front end for people lets a cell ask for input."""
    here = kernel()
    if here is not None and getattr(here, "_allow_stdin", True) is False:
        return True
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return False
    return any(Path(word).name.removesuffix(".exe") in _BATCH_TOOLS for word in words[:4])
