"""JupyterLab and the classic Notebook in a headless Chromium: what a person does there, for tests.

A server has folders, a port and a token of its own, and ends with all its kernels. A page waits for
what it sees, with a deadline, and never for time. Screenshots go to the folder that the environment
variable NBTRAIN_SCREENSHOTS names, else to the test's own. Nothing here knows nbtrain.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

DEADLINE_S = 60.0  # of one thing that is waited for; a loaded machine is slow, a dead one is silent
HEIGHT = 1900  # of the window, in pixels: the whole panel is in a picture of it
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# The time of a click is taken in the page, where it happens.
_NOTE_CLICKS = "addEventListener('click', () => { window.clickedAt = Date.now() / 1000 }, true)"


@dataclass(frozen=True)
class Face:
    """Where a notebook's face keeps its things, as CSS selectors and addresses."""

    address: str
    cell: str
    editor: str
    prompt: str
    output: str
    idle: str
    save: str
    interrupt: str
    restart: str
    confirm: str


LAB = Face(
    address="/doc/tree/{name}?reset&token={token}",
    cell=".jp-Notebook .jp-CodeCell",
    editor=".cm-content",
    prompt=".jp-InputPrompt",
    output=".jp-OutputArea-child",
    idle='.jp-Notebook-ExecutionIndicator[data-status="idle"]',
    save='[data-command="docmanager:save"]',
    interrupt='[data-command="notebook:interrupt-kernel"]',
    restart='[data-command="notebook:restart-kernel"]',
    confirm=".jp-Dialog .jp-mod-accept",
)
CLASSIC = Face(
    address="/notebooks/{name}?token={token}",
    cell=".code_cell",
    editor=".CodeMirror",
    prompt=".input_prompt",
    output=".output_area",
    idle=".kernel_idle_icon",
    save="#save-notbook button",  # spelled so by its makers
    interrupt='[data-jupyter-action="jupyter-notebook:interrupt-kernel"]',
    restart='[data-jupyter-action="jupyter-notebook:confirm-restart-kernel"]',
    confirm=".modal.in .btn-danger",
)


def missing(*packages: str) -> str:
    """Say which packages this environment lacks and what installs them, "" if it has them all."""
    lacks = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacks)} missing: pip install {' '.join(lacks)}" if lacks else ""


def no_chromium() -> str:
    """Say that there is no browser and what installs one, "" if there is."""
    return "" if CHROMIUM else "no Chromium on this machine: apt-get install chromium"


def until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Return the condition's first true value, or fail and say what was waited for."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
    return value


class Server:
    """A notebook server on this machine: see `serving`.

    Args:
        python: The interpreter of the server and its kernels.
        face: LAB or CLASSIC.
        folder: For its configuration, log, and in `notebooks` its notebooks.
    """

    def __init__(self, python: str, face: Face, folder: Path) -> None:
        self.face, self.token = face, secrets.token_hex(8)
        self.notebooks, self.log = folder / "notebooks", folder / "server.log"
        self.notebooks.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = _lab(folder, self) if face is LAB else _classic(self)
        arguments += ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", *arguments],
                env=_environment(folder),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ask(self, method: str, path: str) -> Any:
        """Call the server's REST interface."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.loads(answer.read() or "null")

    def end_kernels(self) -> None:
        """Shut down every kernel, as a closed or culled notebook's is."""
        for session in self.ask("GET", "sessions"):
            self.ask("DELETE", f"sessions/{session['id']}")

    def end(self) -> None:
        """End the server and all its kernels."""
        try:
            if self._process.poll() is None and self.is_up():
                self.end_kernels()
        finally:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def is_up(self) -> bool:
        """Tell whether it answers.

        Raises:
            AssertionError: it has ended; says what it said.
        """
        assert self._process.poll() is None, self.log.read_text()[-3000:]
        try:
            self.ask("GET", "status")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True


def _lab(folder: Path, server: Server) -> list[str]:
    quiet = {
        # Else a question about news lies over the notebook, and now and then one about the kernel.
        "apputils-extension/notification": {"fetchNews": "false", "doNotDisturbMode": True},
        "notebook-extension/tracker": {"autoStartDefaultKernel": True},
        # Light or dark as the browser asks for.
        "apputils-extension/themes": {"adaptive-theme": True},
    }
    for name, settings in quiet.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    return [
        "jupyterlab",
        f"--IdentityProvider.token={server.token}",
        f"--ServerApp.root_dir={server.notebooks}",
        "--ServerApp.port_retries=0",
        f"--LabApp.workspaces_dir={folder / 'workspaces'}",
    ]


def _classic(server: Server) -> list[str]:
    return [
        "notebook",
        f"--NotebookApp.token={server.token}",
        f"--NotebookApp.notebook_dir={server.notebooks}",
        "--NotebookApp.port_retries=0",
    ]


def _environment(folder: Path) -> dict[str, str]:
    own = {
        "HOME": "home",
        "XDG_CACHE_HOME": "home/cache",
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
    }
    for name in own.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return os.environ | {name: str(folder / place) for name, place in own.items()}


@contextmanager
def serving(folder: Path, face: Face = LAB, python: str = sys.executable) -> Iterator[Server]:
    """Have a server for as long as the block lasts."""
    server = Server(python, face, folder)
    try:
        until(server.is_up, f"the server, whose log is {server.log}")
        yield server
    finally:
        server.end()


@contextmanager
def browsing() -> Iterator[Any]:
    """Have a Chromium for as long as the block lasts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        # With scrollbars, as on most desktops: they show what is a little too wide.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=arguments, ignore_default_args=["--hide-scrollbars"]
        )
        try:
            yield browser
        finally:
            browser.close()


def write(path: Path, *cells: str) -> None:
    """Write a notebook of code cells for the kernel that the server has."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(notebook, path)


class Page:
    """One notebook, open in a browser's window for as long as a `with` block lasts.

    Args:
        browser: From `browsing`.
        server: Its server.
        name: The notebook's file in the server's folder.
        width: Of the window, in pixels.
        shots: Folder for screenshots.
    """

    def __init__(
        self, browser: Any, server: Server, name: str, *, width: int = 1200, shots: Path
    ) -> None:
        self.server, self.face, self.name = server, server.face, name
        self._shots = Path(os.environ.get("NBTRAIN_SCREENSHOTS") or shots)
        self._context = browser.new_context(viewport={"width": width, "height": HEIGHT})
        self._context.add_init_script(_NOTE_CLICKS)
        self.page = self._context.new_page()
        self.page.set_default_timeout(DEADLINE_S * 1000)
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(server.url + self.face.address.format(name=name, token=server.token))
        self.page.wait_for_selector(self.face.cell)

    def wait_for_kernel(self) -> None:
        """Wait until the kernel is idle."""
        self.page.wait_for_selector(self.face.idle, state="attached")

    def cell(self, index: int) -> Any:
        """Return a code cell."""
        return self.page.locator(self.face.cell).nth(index)

    def run(self, index: int, code: str | None = None) -> None:
        """Run a cell, perhaps after typing it; return when it runs or has run."""
        cell = self.cell(index)
        cell.locator(self.face.editor).first.click()
        if code is not None:
            self.page.keyboard.press("Control+A")
            self.page.keyboard.insert_text(code)
        prompt = cell.locator(self.face.prompt).first
        before = prompt.inner_text()

        def runs() -> bool:
            # A kernel is shown as idle before it is connected, and what is sent then is lost.
            self.page.keyboard.press("Control+Enter")
            self.page.wait_for_timeout(500)
            if prompt.inner_text() == before:
                cell.locator(self.face.editor).first.click()
                return False
            return True

        until(runs, f"cell {index} to run")

    def wait_for_cell(self, index: int) -> None:
        """Wait until a cell that runs has ended."""
        prompt = self.cell(index).locator(self.face.prompt).first
        until(lambda: re.search(r"\d", prompt.inner_text()), f"the end of cell {index}")

    def see(self, text: str | re.Pattern[str]) -> None:
        """Wait until a text is seen in an output."""
        found = self.page.locator(self.face.output).get_by_text(text)
        found.locator("visible=true").first.wait_for()

    def button(self, label: str) -> Any:
        """Return the first visible button of this label."""
        return self.page.locator(f'.widget-button:has-text("{label}"):visible').first

    def click(self, label: str) -> float:
        """Click a button once it may be clicked; return the moment, as `time.time()`."""
        self.button(label).click()
        return float(self.page.evaluate("window.clickedAt"))

    def field(self, description: str) -> Any:
        """Return the input beside a description."""
        row = self.page.locator(f'.jupyter-widgets:has(> label:text-is("{description}")):visible').first
        return row.locator("input, select").first

    def save(self) -> None:
        """Save the notebook, and wait until the file is new."""
        path = self.server.notebooks / self.name
        before = path.stat().st_mtime_ns
        self.page.locator(self.face.save).first.click()
        until(lambda: path.stat().st_mtime_ns != before, "the notebook's file")

    def reload(self, *, width: int = 1200, theme: str = "light") -> None:
        """Load the page again, as F5 does, perhaps in another width, or in the "dark"."""
        self.page.set_viewport_size({"width": width, "height": HEIGHT})
        self.page.emulate_media(color_scheme=theme)
        self.page.reload()
        self.page.wait_for_selector(self.face.cell)

    def interrupt_kernel(self) -> None:
        """Press the face's own ■."""
        self.page.locator(self.face.interrupt).first.click()

    def restart_kernel(self) -> None:
        """Restart the kernel by the face's own button."""
        self.page.locator(self.face.restart).first.click()
        self.page.locator(self.face.confirm).first.click()
        self.wait_for_kernel()

    def shot(self, name: str) -> Path:
        """Take a picture of the window."""
        self._shots.mkdir(parents=True, exist_ok=True)
        path = self._shots / f"{name}.png"
        self.page.screenshot(path=str(path))
        return path

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the window; where something went wrong, take a picture of it first."""
        try:
            if kind is not None:
                self.shot(f"failed-{Path(self.name).stem}")
        finally:
            self._context.close()
