"""The notebooks run as they are read, restarts included; and a kernel that is shut down saves."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from runs import session
from sklearn.datasets import load_digits

import nbtrain
from nbtrain import checkpoint
from nbtrain.stores import FolderStore

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
KAGGLE = Path("/kaggle")
RESUME = "resume("
SIZES = "MEMBERS, EPOCHS, EVERY, SEEDS = 10, 16, 4, 3"

# These come from Jupyter's own packages, at import and at shutdown.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPENED = """
import sys
sys.path.insert(0, {tests!r})
import runs
run = runs.session({folder!r}, epochs=None, decay="constant", num_workers=1, bar={bar})
"""

TRAINING = {
    "own loop": """
for batch in run:
    loss, _, _ = run.task.run(batch)
    run.update(loss)
    if run.step == 3:
        print("training", flush=True)
""",
    "run": """
import threading, time
def tell():
    while run.step < 3:
        time.sleep(0.01)
    print("training", flush=True)
threading.Thread(target=tell).start()
run.run()
""",
    "start": """
import time
run.start()
while run.step < 3:
    time.sleep(0.01)
print("training", flush=True)
""",
}


def cells_of(name: str) -> list[nbformat.NotebookNode]:
    return list(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells)


def execute(cells: list[nbformat.NotebookNode], folder: Path) -> list[nbformat.NotebookNode]:
    """Run cells in a fresh kernel, in a folder, and return them with their outputs."""
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    return list(asyncio.run(client.async_execute()).cells)


def halves(name: str) -> tuple[list[nbformat.NotebookNode], list[nbformat.NotebookNode]]:
    """Return a notebook's cells before and from its one line in a fresh kernel."""
    cells = cells_of(name)
    one_line = next(i for i, c in enumerate(cells) if c.cell_type == "code" and RESUME in c.source)
    return cells[:one_line], cells[one_line:]


def shown(cell: nbformat.NotebookNode) -> dict[str, Any]:
    return {mime: data for out in cell.outputs for mime, data in out.get("data", {}).items()}


def test_the_quickstart_goes_on_after_its_restart_without_its_code(tmp_path: Path) -> None:
    first, second = halves("quickstart")
    before, after = execute(first, tmp_path), execute(second, tmp_path)
    assert "ended by stop" in str(before[-3].outputs)
    assert "quickstart: a fresh kernel will resume this: checked at step" in str(before[-2].outputs)
    assert {"image/png", "text/html"} <= shown(after[0]).keys()
    assert "application/vnd.jupyter.widget-view+json" not in shown(after[0]), "nobody could click it"
    assert "done at epoch 2.00, step 90, stage 2" in str(after[0].outputs)
    assert "valid_loss" in str(after[1].outputs)
    cut = nbtrain.resume("quickstart", store=tmp_path / "nbtrain-sessions", trust_code=True, bar=False)
    whole = tmp_path / "whole"
    whole.mkdir()
    uncut = [cell for cell in first if cell.cell_type == "code"]
    assert "session.rehearse()" in uncut.pop().source
    assert "session.stop()" in uncut[-1].source
    uncut[-1].source = uncut[-1].source.replace("session.stop()", "pass")
    execute(uncut, whole)
    newest, _ = checkpoint.load_newest(
        checkpoint.find([FolderStore(whole / "nbtrain-sessions")], "quickstart")
    )
    same = checkpoint.find([FolderStore(tmp_path / "nbtrain-sessions")], "quickstart")[0]
    assert cut.is_done and newest.facts["step"] == same.facts["step"] == 90
    file = "model.safetensors"
    assert newest.files[file]["sha256"] == same.files[file]["sha256"]


# The machine that runs the tests may be so old that Kaggle would take it away.
YOUNG = "import psutil, time\npsutil.Process.create_time = lambda self, now=time.time(): now"


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lay out Kaggle's folders where Kaggle has them."""
    if KAGGLE.exists():
        pytest.skip("there is a /kaggle already, and it is not for a test to change")
    try:
        (KAGGLE / "working").mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"/kaggle cannot be made here: {error}")
    (KAGGLE / "input").mkdir()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    yield KAGGLE
    shutil.rmtree(KAGGLE)


def test_on_kaggle_the_next_version_goes_on_from_the_output_of_the_one_before(kaggle: Path) -> None:
    working, attached = kaggle / "working", kaggle / "input" / "my-notebook"
    first, second = halves("kaggle_resume")
    young = nbformat.v4.new_code_cell(YOUNG)
    before = execute([young, *first], working)
    assert "ended by stop" in str(before[-2].outputs)
    assert "application/vnd.jupyter.widget-view+json" not in shown(before[-2])
    assert {"image/png", "text/html"} <= shown(before[-2]).keys()
    stopped = checkpoint.find([FolderStore(working / "nbtrain")], "kaggle-digits")[0].facts["step"]
    assert 0 < stopped < 90
    # Attached, an output is read-only and elsewhere; the next version's own is empty.
    shutil.move(working, attached)
    for folder, _, files in os.walk(attached):
        for file in files:
            os.chmod(Path(folder) / file, 0o444)
    working.mkdir()
    _, *after = execute([young, *second], working)
    assert f"step {stopped}, stage 2 (exact), from Kaggle" in str(after[0].outputs)
    assert "done at epoch 2.00, step 90, stage 2" in str(after[0].outputs)
    assert "kaggle-digits" in str(after[1].outputs)
    assert checkpoint.find([FolderStore(working / "nbtrain")], "kaggle-digits")[0].facts["step"] == 90


def test_the_own_loop_trains_and_validates_by_itself(tmp_path: Path) -> None:
    cells = execute(cells_of("own_loop"), tmp_path)
    loop = next(cell for cell in cells if "session.epochs()" in cell.source)
    assert "done at epoch 2.00" in str(loop.outputs)
    assert "image/png" in shown(cells[-1])
    assert "accuracy" in str(cells[-2].outputs)


def write_digits(folder: Path) -> None:
    """Put 10,000 images where torchvision keeps MNIST's, so that nothing is downloaded."""
    digits = load_digits()
    chosen = np.arange(10_000) % len(digits.target)
    images = torch.tensor(digits.images[chosen] * 255 / 16, dtype=torch.float32)
    images = torch.nn.functional.interpolate(images[:, None], 28, mode="bilinear").byte()
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    heads = {"images-idx3": (2051, 10_000, 28, 28), "labels-idx1": (2049, 10_000)}
    bodies = images.numpy().tobytes(), digits.target[chosen].astype("uint8").tobytes()
    for (name, head), body in zip(heads.items(), bodies, strict=True):
        (raw / f"t10k-{name}-ubyte").write_bytes(struct.pack(f">{len(head)}i", *head) + body)


def test_the_population_is_compared_and_goes_on_without_its_code(tmp_path: Path) -> None:
    write_digits(tmp_path)
    cells = cells_of("population")
    sizes = next(cell for cell in cells if "MEMBERS, EPOCHS" in cell.source)
    assert SIZES in sizes.source
    sizes.source = sizes.source.replace(SIZES, "MEMBERS, EPOCHS, EVERY, SEEDS = 4, 2, 1, 2")
    done = [cell for cell in execute(cells, tmp_path) if cell.cell_type == "code"]
    assert "best accuracy" in str(done[2].outputs) and "done at round 2" in str(done[2].outputs)
    pictures = [shown(cell) for cell in done if "image/png" in shown(cell)]
    assert len(pictures) == 4, "the twin, scores, genealogy, the replay beside a plain session"
    table = next(shown(cell)["text/plain"] for cell in done if "means = " in cell.source)
    assert all(word in table for word in ("fixed", "random", "pbt", "mean test"))
    # Every population was tested once, and remembers it; each is found again without its code.
    store = tmp_path / "nbtrain-sessions"
    for name in (f"mnist-{arm}-{seed}" for arm in ("fixed", "random", "pbt") for seed in (0, 1)):
        found = nbtrain.resume(name, store=store, trust_code=True, bar=False)
        assert found.is_done and len(found.status()["tests"]) == 1


@pytest.mark.parametrize("how", TRAINING)
def test_a_kernel_that_is_shut_down_while_it_trains_saves_first(tmp_path: Path, how: str) -> None:
    kernel = KernelManager()
    kernel.start_kernel()
    client = kernel.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    tests = str(Path(__file__).parent)
    opened = OPENED.format(tests=tests, folder=str(tmp_path), bar=how != "own loop")
    client.execute(opened + TRAINING[how])
    deadline = time.monotonic() + 120
    while True:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            assert time.monotonic() < deadline, "the kernel never trained"
            continue
        assert message["msg_type"] != "error", message["content"]
        if "training" in str(message["content"].get("text")):
            break
    client.stop_channels()
    kernel.shutdown_kernel()
    run = session(tmp_path, epochs=None, decay="constant")
    assert run.step >= 3
    assert run._live.stages[-1]["ended"] in ("terminate", "error", "interrupt", "pause")
