"""Real kernels for tests: started from another environment, clicked at, and waited for.

`.ci/kernels` builds the environments; NBTRAIN_KERNELS names their folder.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

NAMES = ("k617", "k629", "k71", "current")

# These come from Jupyter's own packages, at import and at shutdown.
QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def environments() -> dict[str, Path]:
    """Return the Python of every kernel that is there: this one's, and what NBTRAIN_KERNELS holds."""
    found = {"current": Path(sys.executable)}
    if folder := os.environ.get("NBTRAIN_KERNELS"):
        found |= {python.parts[-3]: python for python in Path(folder).absolute().glob("*/bin/python")}
    return found


def python_of(name: str) -> Path:
    """Return one environment's Python, or skip the test and say how to get it."""
    there = environments()
    if name in there:
        return there[name]
    if "NBTRAIN_KERNELS" in os.environ:
        pytest.fail(f"{os.environ['NBTRAIN_KERNELS']} has no {name}; run .ci/kernels again")
    pytest.skip(f"no kernel {name}: run .ci/kernels DIR python, and set NBTRAIN_KERNELS=DIR")


class Kernel:
    """A kernel process and its one client; messages are kept as they come.

    Args:
        python: Of the environment.
        folder: An empty one, for the kernel's files and as its working directory.
        env: Added to this process's environment.

    Attributes:
        messages: All that was published, in the order of arrival; `arrived_s` is added to each.
        replies: The reply to a request, by the request's id.
    """

    def __init__(self, python: Path, folder: Path, **env: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self.replies: dict[str, dict[str, Any]] = {}
        spec = folder / "specs" / "tested"
        spec.mkdir(parents=True)
        argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "tested", "language": "python"})
        )
        self._manager = KernelManager(
            kernel_name="tested",
            kernel_spec_manager=KernelSpecManager(
                kernel_dirs=[str(spec.parent)], ensure_native_kernel=False
            ),
            connection_file=str(folder / "connection.json"),
        )
        self._stderr = (folder / "stderr").open("wb")
        self._manager.start_kernel(
            cwd=str(folder),
            env={**os.environ, "IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1", **env},
            stderr=self._stderr,
        )
        self._client: BlockingKernelClient = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=120)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process at once."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()
        self._stderr.close()

    def send(self, code: str) -> str:
        """Queue a cell; return the id of the request."""
        return self._client.execute(code)

    def ask(self, kind: str, content: dict[str, Any], subshell: str | None = None) -> str:
        """Send any request on the shell channel; return its id."""
        message = self._client.session.msg(kind, content)
        if subshell is not None:
            message["header"]["subshell_id"] = subshell
        self._client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def answer(self, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        """Send any request on the shell channel; return the content of its reply."""
        asked = self.ask(kind, content)
        self.wait(lambda: asked in self.replies, f"{kind} is answered")
        return dict(self.replies[asked]["content"])

    def control(self, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        """Send a request on the control channel; return the content of its reply."""
        message = self._client.session.msg(kind, content)
        self._client.control_channel.send(message)
        return dict(self._client.get_control_msg(timeout=30)["content"])

    def click(self, model_id: str, subshell: str | None = None) -> str:
        """Click a button, as the front end does."""
        data = {"method": "custom", "content": {"event": "click"}}
        return self.ask("comm_msg", {"comm_id": model_id, "data": data}, subshell)

    def update(self, model_id: str, **state: Any) -> str:
        """Give a widget new values, as the front end does."""
        data = {"method": "update", "state": state, "buffer_paths": []}
        return self.ask("comm_msg", {"comm_id": model_id, "data": data})

    def open_control(self) -> str:
        """Ask for the state of all widgets, as a page does that was reloaded; return the comm's id."""
        comm_id = uuid.uuid4().hex
        target = {"target_name": "jupyter.widget.control", "target_module": None}
        # Widgets of ipywidgets 7 look for their protocol in the message's metadata.
        message = self._client.session.msg("comm_open", {"comm_id": comm_id, "data": {}, **target})
        message["metadata"] = {"version": "1.0.0"}
        self._client.shell_channel.send(message)
        data = {"method": "request_states"}
        self.ask("comm_msg", {"comm_id": comm_id, "data": data})
        return comm_id

    def send_broken(self) -> None:
        """Send what is no message at all."""
        self._client.shell_channel.socket.send_multipart([b"<IDS|MSG>", b"signature", b"no header"])

    def interrupt(self) -> None:
        """Do what the interrupt button does."""
        self._manager.interrupt_kernel()

    def shut_down(self, at_most_s: float = 30) -> bool:
        """Ask the kernel to end, as a server does; return whether it did before it was killed."""
        self._manager.shutdown_wait_time = at_most_s
        began_s = time.monotonic()
        self._manager.shutdown_kernel()
        return time.monotonic() - began_s < at_most_s

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return bool(self._manager.is_alive())

    def wait(self, until: Callable[[], object], what: str, at_most_s: float = 60) -> None:
        """Read messages until something holds, and fail in these words where it does not."""
        deadline = time.monotonic() + at_most_s
        self._read(0)
        while not until():
            assert time.monotonic() < deadline, f"{what}: not within {at_most_s} s\n{self.stderr()}"
            self._read(0.02)

    def wait_idle(self, *ids: str, at_most_s: float = 60) -> None:
        """Wait until requests are done with."""
        self.wait(lambda: all(self.is_idle(i) for i in ids), "the kernel is idle", at_most_s)

    def run(self, code: str, at_most_s: float = 120) -> str:
        """Run a cell to its end; return what it printed, or fail with its traceback."""
        deadline = time.monotonic() + at_most_s
        while True:
            cell = self.send(code)
            self.wait_idle(cell, at_most_s=at_most_s)
            self.wait(lambda cell=cell: cell in self.replies, "the cell has a reply", at_most_s)
            # A kernel refuses what comes within a millisecond after an error, like all it had queued.
            if self.replies[cell]["content"]["status"] != "aborted":
                break
            assert time.monotonic() < deadline, "the kernel has refused every cell since an error"
        for error in self.of(cell, "error"):
            pytest.fail("\n".join(error["content"]["traceback"]))
        return self.text(cell)

    def value(self, expression: str) -> Any:
        """Return what an expression is in the kernel; it must be JSON."""
        return json.loads(self.run(f"import json; print(json.dumps({expression}))"))

    def of(self, request: str, kind: str) -> list[dict[str, Any]]:
        """Return what was published in a request's name, of one kind."""
        return [
            message
            for message in self.messages
            if message["msg_type"] == kind and message["parent_header"].get("msg_id") == request
        ]

    def text(self, request: str) -> str:
        """Return what was printed in a request's name."""
        return "".join(message["content"]["text"] for message in self.of(request, "stream"))

    def is_idle(self, request: str) -> bool:
        """Whether the last status in a request's name is idle."""
        states = [m["content"]["execution_state"] for m in self.of(request, "status")]
        return states[-1:] == ["idle"]

    def stderr(self) -> str:
        """Return the end of what the process wrote beside its messages."""
        return Path(self._stderr.name).read_text(errors="replace")[-4000:]

    def _read(self, timeout_s: float) -> None:
        """Take everything that has come, and wait for the first of it."""
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=timeout_s)
            except queue.Empty:
                break
            self.messages.append({**message, "arrived_s": time.time()})
            timeout_s = 0
        while True:
            try:
                reply = self._client.get_shell_msg(timeout=0)
            except queue.Empty:
                return
            self.replies[reply["parent_header"]["msg_id"]] = reply
