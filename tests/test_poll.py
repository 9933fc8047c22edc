"""A click acts while the cell trains, on every kernel, and nothing else of the kernel is disturbed."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kernels import NAMES, QUIET, Kernel, python_of

from nbtrain.poll import Poller, answer_where_asked

pytestmark = QUIET

SETUP = """
import os, signal, sys, threading, time
import ipywidgets, numpy
from nbtrain.poll import Poller, answer_where_asked

button, bad, ending, nest, press = (ipywidgets.Button() for _ in range(5))
field = ipywidgets.IntText()
clicks, values, ends, nested, pressed, pollers = [], [], [], [], [], []
button.on_click(lambda _: clicks.append(time.time()))
field.observe(lambda change: values.append((change["new"], time.time())), "value")
bad.on_click(lambda _: 1 / 0)
ending.on_click(lambda _: ends.append(True))
press.on_click(lambda _: (os.kill(os.getpid(), signal.SIGINT), pressed.append(True)))

def wait_inside(_):
    with Poller() as inner:
        print("nested", flush=True)
        turns = 0
        while turns < 20:
            inner(), pollers[0]()
            turns += os.path.exists("go")
            time.sleep(0.01)

nest.on_click(wait_inside)

def train(over):
    matrix = numpy.random.default_rng(0).random((200, 200))
    while not over.is_set():
        matrix @ matrix

def wait(at_most_s=30):
    # Train in another thread, and handle messages here, until `ending` is clicked.
    over = threading.Event()
    worker = threading.Thread(target=train, args=(over,))
    worker.start()
    ends.clear()
    print("waiting", flush=True)
    deadline = time.monotonic() + at_most_s
    try:
        with Poller() as poll:
            pollers[:] = [poll]
            while not ends and time.monotonic() < deadline:
                poll()
                worker.join(0.05)
    finally:
        over.set()
        worker.join()
    return poll.problem
"""


class Notebook(Kernel):
    """A kernel in which SETUP was run, and a cell that waits there."""

    def __init__(self, python: Path, folder: Path) -> None:
        super().__init__(python, folder)
        self.python, self.folder = python, folder
        self.run(SETUP)
        names = ("button", "bad", "ending", "nest", "press", "field")
        self.ids: dict[str, str] = self.value(f"{{name: globals()[name].model_id for name in {names}}}")

    def start(self, code: str = "assert wait() == ''") -> str:
        """Start a cell that calls `wait`; return when it does."""
        cell = self.send(code)
        self.wait(lambda: "waiting" in self.text(cell) or self.is_idle(cell), "the cell waits")
        return cell

    def handled(self, request: str) -> str:
        """Wait until a message that was sent during the cell is done with."""
        self.wait_idle(request, at_most_s=20)
        return request

    def end(self, cell: str) -> None:
        """End the cell by a click, and see that it ended well."""
        self.click(self.ids["ending"])
        self.wait(lambda: cell in self.replies and self.is_idle(cell), "the cell has ended")
        assert self.replies[cell]["content"]["status"] == "ok", self.of(cell, "error")


@pytest.fixture(scope="module", params=NAMES)
def kernel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Notebook]:
    python = python_of(request.param)
    with Notebook(python, tmp_path_factory.mktemp(request.param)) as kernel:
        yield kernel


def test_clicks_and_values_act_within_100_ms_while_the_cell_trains(kernel: Notebook) -> None:
    """With `-rP` pytest shows how long they took."""
    kernel.run("clicks.clear(), values.clear()")
    rng = random.Random(0)
    sent: dict[str, list[float]] = {"clicks": [], "values": []}
    cell = kernel.start()
    for number in range(10):
        sent["clicks"].append(time.time())
        kernel.handled(kernel.click(kernel.ids["button"]))
        time.sleep(rng.uniform(0, 0.1))  # at every phase of the cell's own waiting
        sent["values"].append(time.time())
        kernel.handled(kernel.update(kernel.ids["field"], value=100 + number))
        time.sleep(rng.uniform(0, 0.1))
    kernel.end(cell)
    clicks, values = kernel.value("clicks"), kernel.value("values")
    assert [value for value, _ in values] == [100 + number for number in range(10)]
    assert len(clicks) == 10
    for what, came in (("clicks", clicks), ("values", [at for _, at in values])):
        late_ms = [1000 * (at - then) for at, then in zip(came, sent[what], strict=True)]
        print(f"{what}: median {statistics.median(late_ms):.0f} ms, longest {max(late_ms):.0f} ms")
        assert statistics.median(late_ms) < 100, late_ms


OWN = """
import tempfile, torch, nbtrain
from torch import nn

model = nn.Linear(4, 2)
data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
session = nbtrain.Session(
    "own", model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), train=data,
    batch_size=8, num_workers=0, device="cpu", budget=None, store=tempfile.mkdtemp(),
)
session.panel()
buttons = session._face.panel

def tell():
    while session.state != "paused":
        time.sleep(0.01)
    print("held", flush=True)

def loop():
    held = threading.Thread(target=tell)
    held.start()
    num_steps = num_after = 0
    for x, y in session:
        session.update(nn.functional.cross_entropy(model(x), y))
        num_steps, num_after = num_steps + 1, num_after + (not held.is_alive())
        if num_steps == 20:
            print("trains", flush=True)
        if num_after == 20:
            print("went on", flush=True)
"""


@pytest.mark.parametrize("how", ["a click", "an interrupt"])
def test_pause_holds_a_loop_of_ones_own_until_resume(kernel: Notebook, how: str) -> None:
    kernel.run(OWN)
    ids = kernel.value(
        "{name: getattr(buttons, name).model_id for name in ('_start', '_pause', '_stop')}"
    )
    cell = kernel.send("loop()")
    kernel.wait(lambda: "trains" in kernel.text(cell), "it trains")
    kernel.click(ids["_pause"]) if how == "a click" else kernel.interrupt()
    for told, button in (("held", "_start"), ("went on", "_stop")):
        kernel.wait(lambda told=told: told in kernel.text(cell), told)
        kernel.click(ids[button])
    kernel.wait(lambda: cell in kernel.replies and kernel.is_idle(cell), "the cell has ended")
    assert kernel.replies[cell]["content"]["status"] == "ok", kernel.of(cell, "error")
    assert "ended by stop" in kernel.value("session.lines[-1]")
    assert "ended by stop" not in kernel.text(cell), "the panel's log has it already"


def test_cells_that_were_queued_meanwhile_run_afterwards_in_their_order(kernel: Notebook) -> None:
    cell = kernel.start()
    queued = [kernel.send("print('first')")]
    kernel.handled(kernel.click(kernel.ids["button"]))
    queued.append(kernel.send("print('second')"))
    asked = kernel.ask("complete_request", {"code": "prin", "cursor_pos": 4})
    kernel.handled(kernel.update(kernel.ids["field"], value=7))
    queued.append(kernel.send("print('third')"))
    assert not any(kernel.of(request, "status") for request in [*queued, asked])
    kernel.end(cell)
    kernel.wait_idle(*queued, asked)
    kernel.wait(lambda: asked in kernel.replies, "the completion is answered")
    starts = [m for m in kernel.messages if m["content"].get("execution_state") == "busy"]
    order = [
        m["parent_header"]["msg_id"] for m in starts if m["parent_header"]["msg_id"] in [*queued, asked]
    ]
    assert order == [queued[0], queued[1], asked, queued[2]]
    ended = kernel.messages.index(kernel.of(cell, "status")[-1])
    assert kernel.messages.index(kernel.of(queued[0], "status")[0]) > ended
    assert [kernel.text(request) for request in queued] == ["first\n", "second\n", "third\n"]


def test_cells_that_come_after_the_last_poll_keep_their_order_too(kernel: Notebook) -> None:
    """The first are put aside by the poller, the others still lie in the socket when it leaves."""
    kernel.run("order = []")
    cell = kernel.start(
        "print('waiting', flush=True)\n"
        "with Poller() as poll:\n"
        "    while not poll(): time.sleep(0.01)\n"
        "    print('deaf', flush=True)\n"
        "    while not os.path.exists('enough'): time.sleep(0.01)\n"
        "    time.sleep(0.2)"
    )
    queued = [kernel.send(f"order.append({number})") for number in range(3)]
    kernel.click(kernel.ids["button"])
    kernel.wait(lambda: "deaf" in kernel.text(cell), "it has polled")
    queued += [kernel.send(f"order.append({number})") for number in range(3, 6)]
    (kernel.folder / "enough").touch()
    kernel.wait_idle(cell, *queued)
    assert kernel.value("order") == list(range(6))


def test_who_sleeps_is_woken_by_a_click_and_by_nothing_else(kernel: Notebook) -> None:
    kernel.run("clicks.clear(); woken = 0")
    cell = kernel.start(
        "print('waiting', flush=True)\n"
        "with Poller() as poll:\n"
        "    while not clicks: poll.wait(60); poll(); woken += 1\n"
        "    began = time.monotonic(); poll.wait(0.2); slept_s = time.monotonic() - began"
    )
    queued = kernel.send("pass")
    kernel.handled(kernel.click(kernel.ids["button"]))
    kernel.wait_idle(cell, queued)
    assert not kernel.of(cell, "error")
    assert len(kernel.value("clicks")) == 1
    # A message that is put aside wakes it too, and some kernels send themselves one at the start.
    assert kernel.value("woken") <= 4
    assert 0.15 < kernel.value("slept_s") < 20


def test_who_sleeps_is_woken_by_what_came_before_it_lay_down(kernel: Notebook) -> None:
    """The socket tells once only that there is something: whoever has asked it must read it."""
    kernel.run("clicks.clear()")
    cell = kernel.start(
        "print('waiting', flush=True)\n"
        "while not os.path.exists('clicked'): time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "with Poller() as poll:\n"
        "    began = time.monotonic(); poll.wait(20); poll(); slept_s = time.monotonic() - began"
    )
    kernel.click(kernel.ids["button"])
    (kernel.folder / "clicked").touch()
    kernel.wait_idle(cell)
    assert not kernel.of(cell, "error")
    assert len(kernel.value("clicks")) == 1
    assert kernel.value("slept_s") < 15


def test_a_broken_message_is_left_to_the_kernel(kernel: Notebook) -> None:
    kernel.run("clicks.clear()")
    cell = kernel.start()
    kernel.send_broken()
    kernel.handled(kernel.click(kernel.ids["button"]))
    kernel.end(cell)
    assert len(kernel.value("clicks")) == 1


def test_what_is_printed_around_a_click_stays_where_it_was_printed(kernel: Notebook) -> None:
    kernel.run("talk = lambda _: print('from the click'); button.on_click(talk)")
    cell = kernel.start(
        "print('waiting', end='', flush=True); print(' before', end='')\n"
        "with Poller() as poll:\n"
        "    while not poll(): time.sleep(0.01)\n"
        "print(' after')"
    )
    click = kernel.click(kernel.ids["button"])
    kernel.wait_idle(cell, click)
    kernel.run("button.on_click(talk, remove=True)")
    assert kernel.text(cell) == "waiting before after\n"
    assert kernel.text(click) == "from the click\n"


def test_the_kernel_looks_busy_until_the_cell_ends(kernel: Notebook) -> None:
    cell = kernel.start()
    for _ in range(3):
        kernel.handled(kernel.click(kernel.ids["button"]))
        kernel.wait(lambda: not idle(kernel), "the kernel is busy again", 20)
    assert not kernel.is_idle(cell)
    kernel.end(cell)
    assert idle(kernel)


def idle(kernel: Kernel) -> bool:
    """Whether the front end shows the kernel as idle: it goes by the last status of all."""
    states = [m["content"]["execution_state"] for m in kernel.messages if m["msg_type"] == "status"]
    return bool(states[-1] == "idle")


def test_a_page_that_is_reloaded_gets_its_widgets_back_during_the_cell(kernel: Notebook) -> None:
    cell = kernel.start()
    there = kernel.answer("comm_info_request", {"target_name": "jupyter.widget"})
    assert kernel.ids["button"] in there["comms"]
    comm = kernel.open_control()
    kernel.wait(lambda: states(kernel, comm), "the states have come", 20)
    assert kernel.ids["field"] in states(kernel, comm)[0]["states"]
    assert not kernel.is_idle(cell)
    kernel.end(cell)


def states(kernel: Kernel, comm: str) -> list[dict[str, Any]]:
    sent = (m["content"] for m in kernel.messages if m["msg_type"] == "comm_msg")
    return [content["data"] for content in sent if content["comm_id"] == comm]


def test_an_error_in_a_callback_is_shown_and_the_next_click_works(kernel: Notebook) -> None:
    kernel.run("clicks.clear()")
    cell = kernel.start()
    wrong = kernel.handled(kernel.click(kernel.ids["bad"]))
    assert [error["content"]["ename"] for error in kernel.of(wrong, "error")] == ["ZeroDivisionError"]
    kernel.handled(kernel.click(kernel.ids["button"]))
    kernel.end(cell)
    assert len(kernel.value("clicks")) == 1


def test_an_error_in_the_cell_stops_the_queued_cells_and_no_later_one(kernel: Notebook) -> None:
    kernel.run("ran = []")
    cell = kernel.start("wait(); 1 / 0")
    queued = [kernel.send(f"ran.append({number})") for number in range(2)]
    kernel.handled(kernel.click(kernel.ids["button"]))
    kernel.click(kernel.ids["ending"])
    kernel.wait(lambda: {cell, *queued} <= kernel.replies.keys(), "all have ended")
    assert [kernel.replies[request]["content"]["status"] for request in [cell, *queued]] == [
        "error",
        "aborted",
        "aborted",
    ]
    assert kernel.value("ran") == []


def test_an_interrupt_of_the_idle_kernel_does_not_kill_it(kernel: Notebook) -> None:
    # What the kernel sets again when it is idle: a nested dispatch would leave another one behind.
    handler = "str(get_ipython().kernel.saved_sigint_handler)"
    before = kernel.value(handler)
    cell = kernel.start()
    kernel.handled(kernel.click(kernel.ids["button"]))
    kernel.end(cell)
    for _ in range(2):
        kernel.interrupt()
        assert kernel.value(handler) == before
    assert kernel.is_alive()


def test_an_interrupt_ends_the_cell_that_waits(kernel: Notebook) -> None:
    cell = kernel.start()
    kernel.handled(kernel.click(kernel.ids["button"]))
    kernel.interrupt()
    kernel.wait(lambda: cell in kernel.replies, "the cell is interrupted", 20)
    assert kernel.replies[cell]["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.value("1") == 1


def test_an_interrupt_that_comes_during_a_callback_acts_after_it(kernel: Notebook) -> None:
    kernel.run("pressed.clear()")
    cell = kernel.start()
    kernel.click(kernel.ids["press"])
    kernel.wait(lambda: cell in kernel.replies, "the cell is interrupted", 20)
    assert kernel.replies[cell]["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.value("pressed") == [True]


def test_a_callback_that_waits_itself_changes_no_order(kernel: Notebook) -> None:
    kernel.run("clicks.clear()")
    cell = kernel.start()
    queued = [kernel.send("nested.append('first')")]
    nest = kernel.click(kernel.ids["nest"])
    kernel.wait(lambda: "nested" in kernel.text(nest), "the callback waits", 20)
    queued.append(kernel.send("nested.append('second')"))
    click = kernel.click(kernel.ids["button"])
    (kernel.folder / "go").touch()
    kernel.handled(click)
    kernel.end(cell)
    kernel.wait_idle(*queued)
    assert len(kernel.value("clicks")) == 1
    assert kernel.value("nested") == ["first", "second"]


def test_a_kernel_that_is_shut_down_while_a_run_saves_runs_no_queued_cell(
    kernel: Notebook, tmp_path: Path
) -> None:
    with Notebook(kernel.python, tmp_path) as other:
        cell = other.start(
            "asked_s = []\n"
            "signal.signal(signal.SIGINT, lambda *_: asked_s.append(time.monotonic()))\n"
            "print('waiting', flush=True)\n"
            "with Poller() as poll:\n"
            "    while not asked_s or time.monotonic() - asked_s[0] < 1: poll(); time.sleep(0.01)\n"
            "open('problem', 'w').write(poll.problem)"
        )
        other.send("open('ran', 'w')")
        other.handled(other.click(other.ids["button"]))
        assert not other.is_idle(cell)
        assert other.shut_down(), "it had to be killed"
    assert (tmp_path / "problem").read_text() == ""
    assert not (tmp_path / "ran").exists()


def test_a_kernel_that_has_changed_inside_is_left_alone_and_the_click_acts_later(
    kernel: Notebook,
) -> None:
    kernel.run(
        "clicks.clear(); kernel = get_ipython().kernel; known = kernel.dispatch_shell\n"
        "async def unknown(*args, **more):\n"
        "    import asyncio\n"
        "    await asyncio.sleep(0.001)\n"
        "    return await known(*args, **more)\n"
    )
    cell = kernel.send(
        "kernel.dispatch_shell = unknown\n"
        "print('waiting', flush=True)\n"
        "with Poller() as poll:\n"
        "    while not poll.problem: poll(); time.sleep(0.01)\n"
        "    kernel.dispatch_shell = known\n"
        "    for _ in range(20): poll(); time.sleep(0.01)\n"
        "    print(len(clicks), poll.problem)"
    )
    kernel.wait(lambda: "waiting" in kernel.text(cell), "the cell waits")
    sent = [kernel.click(kernel.ids["button"]) for _ in range(2)]
    kernel.wait_idle(cell, *sent)
    assert "0 Buttons act only when the cell ends" in kernel.text(cell)
    assert len(kernel.value("clicks")) == 2


def test_a_button_is_heard_in_a_thread_of_its_own_where_the_kernel_has_them(kernel: Notebook) -> None:
    """JupyterLab asks ipykernel 7 for such threads; 7.4 used to send the click to the busy cell."""
    if "kernel subshells" not in kernel.answer("kernel_info_request", {}).get("supported_features", []):
        return  # up to ipykernel 6 there are none
    made = kernel.control("create_subshell_request", {})
    kernel.run("clicks.clear(); field.value = -1; answer_where_asked(button)")
    cell = kernel.send(
        "deadline = time.monotonic() + 20\n"
        "while not clicks and time.monotonic() < deadline: time.sleep(0.01)\n"
        "print(len(clicks))"
    )
    kernel.wait(lambda: kernel.of(cell, "execute_input"), "the cell runs")
    kernel.click(kernel.ids["button"], made["subshell_id"])
    kernel.wait_idle(cell)
    kernel.control("delete_subshell_request", {"subshell_id": made["subshell_id"]})
    assert kernel.text(cell) == "1\n"


def test_without_a_kernel_it_does_nothing_and_imports_nothing() -> None:
    code = (
        "import sys\n"
        "from nbtrain.poll import Poller\n"
        "with Poller() as poll:\n"
        "    print(poll(), repr(poll.problem), 'IPython' in sys.modules, 'ipykernel' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "0 '' False False\n"


def test_in_another_thread_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbtrain.host.kernel", lambda: pytest.fail("it looked for a kernel"))
    said: list[object] = []

    def work() -> None:
        with Poller() as poll:
            said.extend([poll(), poll.problem])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [0, ""]


def test_an_unknown_kernel_is_named_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbtrain.host.kernel", lambda: SimpleNamespace(shell_stream=None))
    for _ in range(2):
        with Poller() as poll:
            assert poll() == 0
            for word in ("when the cell ends", "AttributeError", "PAUSE", "STOP", "interrupt"):
                assert word in poll.problem


def test_a_widget_without_threads_of_its_own_is_left_as_it_is() -> None:
    for widget in (
        SimpleNamespace(),
        SimpleNamespace(comm=None),
        SimpleNamespace(comm=SimpleNamespace()),
    ):
        before = repr(widget)
        answer_where_asked(widget)
        assert repr(widget) == before
