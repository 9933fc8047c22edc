"""The notebook face as a person meets it: in JupyterLab, in the classic Notebook, and in batch.

Look at what is tested here:  NBTRAIN_SCREENSHOTS=shots pytest tests/test_browser.py
"""

from __future__ import annotations

import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import nbformat
import pytest
import torch
from browser import DEADLINE_S, Page, Server, until
from runs import assert_same_bits, bits
from torch import nn
from torch.utils.data import TensorDataset

import nbtrain
from nbtrain.interrupts import ONE_PRESS_S

# These come from Jupyter's own packages.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

REACH_S = 0.1  # from a click to the session
RELOAD_S = 10.0  # from a page that is loaded again to one that lives

STEP_S = 0.04
EPOCHS = 24


def slow_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    time.sleep(float(os.environ.get("STORY_STEP_S", 0)))
    return nn.functional.mse_loss(output, target)


def build() -> nbtrain.Task:
    x = torch.linspace(-3, 3, 300)[:, None]
    data = TensorDataset(x, x.sin() + 0.1 * torch.randn(300, 1))
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return nbtrain.Task(
        model=model,
        optimizer=optimizer,
        train=data,
        valid=TensorDataset(x[::10], x[::10].sin()),
        loss=slow_loss,
    )


SETTINGS: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch_size": 4,
    "num_workers": 0,
    "warmup_epochs": 10,  # long enough to be changed while it lasts
    "decay": "cosine",
    "device": "cpu",
}


def recipe(**changes: str) -> str:
    """Return the cell that a user writes; values are text as they would type it."""
    written = {name: repr(value) for name, value in SETTINGS.items()} | changes
    arguments = ", ".join(f"{name}={value}" for name, value in written.items())
    return f"""\
import os, time
import torch
from torch import nn
from torch.utils.data import TensorDataset
import nbtrain

{inspect.getsource(slow_loss)}
{inspect.getsource(build)}
session = nbtrain.Session("story", build, {arguments})
"""


OVERFLOW = """() => {
    const panel = document.querySelector(".nbt-panel");
    return panel.scrollWidth - panel.clientWidth;
}"""

# Notes when an order reaches the session, from outside of it.
WATCH = f"""\
os.environ["STORY_STEP_S"] = "{STEP_S}"

import json, threading

def watch():
    before = None
    with open("seen.jsonl", "w", buffering=1) as file:
        while True:
            now = [session.state, session.asked]
            if now != before:
                print(json.dumps([time.time(), *now]), file=file)
            before = now
            time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if lacks := browser.missing("playwright") or browser.no_chromium():
        pytest.skip(lacks)
    with browser.browsing() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if lacks := browser.missing("jupyterlab"):
        pytest.skip(lacks)
    with browser.serving(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture
def classic(tmp_path: Path) -> Iterator[Server]:
    kernels = os.environ.get("NBTRAIN_KERNELS")
    if not kernels:
        pytest.skip("NBTRAIN_KERNELS does not name the folder that .ci/kernels has built")
    python = Path(kernels) / "classic" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: run .ci/kernels {kernels} python")
    with browser.serving(tmp_path / "classic", browser.CLASSIC, str(python)) as server:
        yield server


def status(page: Page) -> str:
    """Return what the last status line on the page says, "" where there is none."""
    lines = page.page.locator('.nbt[role="status"]:visible').all_inner_texts()
    return str(lines[-1]) if lines else ""


def step(page: Page) -> int:
    found = re.findall(r"step\s+([\d,]+)", status(page))
    return int(found[0].replace(",", "")) if found else -1


def see_state(page: Page, word: str) -> None:
    until(lambda: word in status(page), f"the status {word!r}")


def reached(page: Page, clicked_at: float, order: str) -> float:
    """Return how long after a click its order was at the session, in seconds."""

    def found() -> float | None:
        lines = (page.server.notebooks / "seen.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        after = [at for at, *seen in rows if at > clicked_at and order in seen]
        return after[0] if after else None

    return float(until(found, f"{order!r} at the session")) - clicked_at


def see_life(page: Page) -> None:
    """Wait until the status line of a page that was just loaded changes."""
    began, steps = time.monotonic(), {-1}
    until(lambda: steps.add(step(page)) or len(steps) > 2, "a status line that changes", RELOAD_S)
    print(f"alive again after {time.monotonic() - began:.1f} s")


def see_no_twin(page: Page) -> None:
    assert page.page.locator(".nbt-twin").count() == 1
    assert page.page.locator(".nbt-twin:visible").count() == 0, "the twin is seen beside the panel"


# A picture that is renewed meanwhile can no longer be read, but the new one can.
READ = """async image => {
    for (;;) {
        try {
            return Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()));
        } catch {
            await new Promise(then => setTimeout(then, 20));
        }
    }
}"""


def picture(page: Page) -> bytes:
    """Return the panel's picture as it is shown now."""
    return bytes(page.page.locator("img.widget-image:visible").first.evaluate(READ))


def entries(session: nbtrain.Session) -> list[tuple[int, str, Any, str]]:
    return [(e.step, e.what, e.new, e.by) for e in session.journal.entries]


def uncut(folder: Path, edits: list[tuple[int, str, Any, str]]) -> nbtrain.Session:
    """Train in one go in this process, making the same edits at the same steps."""
    session = nbtrain.Session("story", build, store=folder, budget=None, bar=False, **SETTINGS)
    for batch in session:
        loss, n, _ = session.task.run(batch)
        before = session.step
        session.update(loss, n=n)
        changes = {what: new for at, what, new, _ in edits if before < at == session.step}
        if changes:
            session.set(**changes)
    return session


def press_tab_until(page: Page, label: str) -> None:
    """Go to a button by the keyboard alone."""
    for _ in range(60):
        focused = page.page.evaluate("document.activeElement.innerText || ''")
        if focused.strip() == label:
            return
        page.page.keyboard.press("Tab")
    raise AssertionError(f"Tab never reached {label!r}")


def test_a_run_is_steered_reloaded_stopped_and_gone_on_with_to_the_same_bits(
    chromium: Any, lab: Server, tmp_path: Path
) -> None:
    browser.write(lab.notebooks / "story.ipynb", recipe() + WATCH, "session.run()", "")
    with Page(chromium, lab, "story.ipynb", shots=tmp_path) as page:
        train_and_steer(page)
        reload_and_stop(page)
        stopped_at = step(page)
        page.reload()
        page.restart_kernel()
        see_an_end(page)
        page.run(2, 'import nbtrain; nbtrain.resume("story", trust_code=True).run()')
        page.wait_for_cell(2)
        see_state(page, "done")
        page.shot("lab-done")
        page.save()
    lab.end_kernels()
    with Page(chromium, lab, "story.ipynb", shots=tmp_path) as page:
        see_without_kernel(page)

    resumed = nbtrain.resume("story", store=lab.notebooks / "nbtrain-sessions", trust_code=True)
    assert resumed.is_done
    edits = entries(resumed)
    changes = {(what, new, by) for _, what, new, by in edits}
    assert changes == {("accumulate", 4, "hand"), ("warmup_epochs", 20, "hand")}
    assert edits[0][0] == edits[1][0] < stopped_at < resumed.step
    whole = uncut(tmp_path / "uncut", edits)
    assert entries(whole) == edits
    assert_same_bits(bits(resumed), bits(whole))


def train_and_steer(page: Page) -> None:
    page.wait_for_kernel()
    page.run(0)
    page.run(1)
    see_state(page, "running")
    until(lambda: step(page) > 20, "steps in the status line")
    page.shot("lab-running")
    see_no_twin(page)

    # A click reaches the session while the cell trains.
    took_s = [reached(page, page.click("Checkpoint now"), "save") for _ in range(7)]
    took_s.append(reached(page, page.click("Pause"), "pause"))
    see_state(page, "paused")
    print("from click to session, ms:", *(round(1000 * took) for took in took_s))
    assert statistics.median(took_s) < REACH_S
    page.shot("lab-paused")

    # What is typed is drawn before it acts, and refused where it makes no sense.
    before = picture(page)
    page.field("accumulate").fill("x")
    page.see(re.compile("must be a whole number"))
    assert page.button("Apply at the next window").is_disabled()
    page.field("accumulate").fill("4")
    page.field("warmup epochs").fill("20")
    page.see(re.compile("effective batch 16"))
    until(lambda: picture(page) != before, "a picture with the planned rates")
    page.shot("lab-draft")

    # It acts at the next window, and the picture follows.
    press_tab_until(page, "Resume")
    page.page.keyboard.press("Enter")
    see_state(page, "running")
    planned = picture(page)
    page.click("Apply at the next window")
    page.see("now 4")
    page.see("now 20")
    until(lambda: picture(page) != planned, "a picture with the new rates")
    page.shot("lab-applied")


def reload_and_stop(page: Page) -> None:
    page.save()
    page.reload(width=700, theme="dark")
    see_life(page)
    page.shot("lab-reloaded-dark-700")
    assert page.page.evaluate(OVERFLOW) == 0, "the panel is too wide for 700 pixels"
    press_tab_until(page, "Stop")
    page.page.keyboard.press("Enter")
    see_state(page, "stopped")
    page.shot("lab-stopped-dark-700")


# What stands before a panel and each of its widgets where their kernel is gone.
SIGNS = """() => [...document.querySelectorAll(".jupyter-widgets-disconnected")].map(
    widget => getComputedStyle(widget, "::before")
).filter(sign => sign.display != "none").map(sign => sign.content)"""


def see_an_end(page: Page) -> None:
    """See one line above the old panel, and not a broken link before each of its widgets."""
    signs = until(lambda: page.page.evaluate(SIGNS), "a panel whose kernel is gone")
    assert len(signs) == 1 and "has ended" in signs[0]
    page.shot("lab-restarted")


def see_without_kernel(page: Page) -> None:
    twin = page.cell(2).locator(".nbt-twin")
    page.cell(2).scroll_into_view_if_needed()
    twin.wait_for()
    assert "done" in twin.inner_text()
    assert (
        page.cell(2)
        .locator("img:visible")
        .evaluate("image => image.complete && image.naturalWidth > 300")
    )
    page.shot("lab-without-kernel")
    page.reload(width=700, theme="dark")
    page.cell(2).scroll_into_view_if_needed()
    twin.wait_for()
    page.shot("lab-without-kernel-dark-700")


TUNED = (
    inspect.getsource(build)
    .replace("def build()", "def build(lr=0.05, momentum=0.9)")
    .replace("parameters(), lr=0.05, momentum=0.9", "parameters(), lr=lr, momentum=momentum")
)
HERD = f"""\
import os, time
import torch
from torch import nn
from torch.utils.data import TensorDataset
import nbtrain

{inspect.getsource(slow_loss)}
{TUNED}
os.environ["STORY_STEP_S"] = "0.012"
space = {{"lr": nbtrain.loguniform(1e-3, 1e-1), "momentum": nbtrain.uniform(0.1, 0.9)}}
population = nbtrain.Population("herd", build, members=6, interval="1 epoch", space=space,
    quantile=0.3, epochs=8, batch_size=10, num_workers=0, device="cpu")
"""


def test_a_population_is_steered_in_lab(chromium: Any, lab: Server, tmp_path: Path) -> None:
    browser.write(lab.notebooks / "herd.ipynb", HERD, "population.run()")
    with Page(chromium, lab, "herd.ipynb", shots=tmp_path) as page:
        page.wait_for_kernel()
        page.run(0)
        page.run(1)
        see_state(page, "running")
        page.see(re.compile("<- "))  # somebody was copied
        page.shot("herd-running")
        page.click("Pause")
        see_state(page, "paused")
        page.click("Resume")
        see_state(page, "running")
        page.save()
        page.reload(width=700, theme="dark")
        see_state(page, "running")
        page.shot("herd-dark-700")
        assert page.page.evaluate(OVERFLOW) == 0, "the panel is too wide for 700 pixels"
        page.click("Stop")
        see_state(page, "stopped")
        page.run(1)
        see_state(page, "done")
        page.wait_for_cell(1)
        page.shot("herd-done")
        page.save()
    lab.end_kernels()
    with Page(chromium, lab, "herd.ipynb", shots=tmp_path) as page:
        twin = page.cell(1).locator(".nbt-twin")
        twin.wait_for()
        assert "done" in twin.inner_text()
        page.shot("herd-without-kernel")


def test_the_classic_notebook_with_the_widgets_of_colab_steers_a_run_too(
    chromium: Any, classic: Server, tmp_path: Path
) -> None:
    browser.write(classic.notebooks / "story.ipynb", recipe() + WATCH, "session.run()")
    with Page(chromium, classic, "story.ipynb", width=1000, shots=tmp_path) as page:
        page.wait_for_kernel()
        page.run(0)
        page.run(1)
        see_state(page, "running")
        took_s = [reached(page, page.click("Checkpoint now"), "save") for _ in range(5)]
        took_s.append(reached(page, page.click("Pause"), "pause"))
        print("from click to session, ms:", *(round(1000 * took) for took in took_s))
        assert statistics.median(took_s) < REACH_S
        see_state(page, "paused")
        page.field("accumulate").fill("2")
        page.click("Apply at the next window")
        page.see("now 2")
        page.click("Resume")
        see_state(page, "running")
        page.shot("classic-running")
        see_no_twin(page)
        page.save()
        page.reload(width=1000)
        see_life(page)
        page.interrupt_kernel()
        see_state(page, "paused")
        page.page.wait_for_timeout(2000 * ONE_PRESS_S)  # sooner it would count as the same press
        page.interrupt_kernel()
        see_state(page, "stopped")
        page.save()
    classic.end_kernels()

    with Page(chromium, classic, "story.ipynb", width=1000, shots=tmp_path) as page:
        page.page.wait_for_selector(".nbt-twin:visible")
        page.shot("classic-without-kernel")


def test_in_batch_a_run_ends_at_its_budget_with_text_and_a_picture(tmp_path: Path) -> None:
    if lacks := browser.missing("nbconvert", "papermill"):
        pytest.skip(lacks)
    # The budget counts from the cell, because a loaded machine starts slowly.
    endless = recipe(epochs="None", decay="'constant'", budget="'10s'", started_at="time.time()")
    commands = {
        "nbconvert": ["run.ipynb", "--to", "notebook", "--execute", "--output", "done"],
        "papermill": ["run.ipynb", "done.ipynb"],
    }
    tools = {}
    for tool, arguments in commands.items():
        (folder := tmp_path / tool).mkdir()
        reason = "session.state, session.reason, session.step > 0"
        browser.write(folder / "run.ipynb", endless, "session.run()", reason)
        command, pipe = [sys.executable, "-m", tool, *arguments], subprocess.PIPE
        tools[tool] = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=subprocess.STDOUT)
    said = {tool: process.communicate(timeout=3 * DEADLINE_S)[0] for tool, process in tools.items()}
    for tool, process in tools.items():
        assert process.returncode == 0, said[tool][-3000:].decode()
        cells = nbformat.read(tmp_path / tool / "done.ipynb", as_version=4).cells
        outputs = cells[-2].outputs
        kinds = {kind for output in outputs for kind in output.get("data", {})}
        assert {"image/png", "text/html", "text/plain"} <= kinds
        assert "application/vnd.jupyter.widget-view+json" not in kinds
        assert "budget" in "".join(output.get("text", "") for output in outputs)
        assert "('stopped', 'budget', True)" in str(cells[-1].outputs)
