"""Would a fresh kernel really resume this? Tried out in a fresh process, while this kernel still lives.

The fresh process shares nothing with this one but the disk: a new interpreter in the same folder, with
the environment variables that this kernel was started with, not those that cells have set since. It
does what `nbtrain.resume(name, trust_code=True)` does, trains one window, tells it as hashes (`probe`),
and ends. The same lines then run here, and what they change is put back. What differs first is named:
something that was loaded, the samples of the window, or what the window made of them.

Neither process writes a checkpoint, so a rehearsal leaves the store as it is; only what was not saved
yet is saved first, for it could not be resumed at all.
"""

from __future__ import annotations

import json
import linecache
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from nbtrain import checkpoint, opening, parts, probe
from nbtrain.budget import words
from nbtrain.errors import NbtrainError, SessionError
from nbtrain.history import History
from nbtrain.interrupts import Interrupts
from nbtrain.live import Live
from nbtrain.loop import Loop
from nbtrain.opening import Opened

FRESH = """\
import sys, nbtrain
from nbtrain import rehearsal
rehearsal.answer(nbtrain.resume, *sys.argv[1:])
"""
PRESENT = ("place", "journal", "logged", "trees", "arguments", "entry", "problems", "group_lrs")
NUM_LAST_LINES = 8
GB = 1e9


@dataclass(frozen=True, repr=False)
class Rehearsal:
    """What a rehearsal has found.

    Attributes:
        ok: Whether a fresh process went on from the checkpoint, as far as `text` says.
        text: What was checked, or what is missing or different and what to do.
        step: Where, in optimizer updates.
        seconds: How long it took.
    """

    ok: bool
    text: str
    step: int
    seconds: float

    def __repr__(self) -> str:
        ok = "ok" if self.ok else "not ok"
        return f"<rehearsal: {ok} at step {self.step}, {self.seconds:.1f} s>"


def rehearse(name: str, opened: Opened, loop: Loop, within_s: float | None) -> Rehearsal:
    """Resume in a fresh process, train one window there and here, and compare; say it and return it.

    Raises:
        SessionError: it is training, or a newer session of this name was made.
        LossError, StoreError: what is alive had to be saved first, and could not be.
        DataError: the data set raises in this kernel.
    """
    _refuse_if_it_trains(name, opened, loop)
    if loop.live.is_torn:  # its checkpoint could not be read when the last loop ended
        loop.keeping.fall_back()
    began = time.monotonic()
    problem = _hopeless(opened, loop)
    if not problem:
        loop.lines.say(f"{name}: rehearsing in a fresh process ...")
        if not _is_saved(name, opened, loop.live):
            loop.save()
        problem, proven = _compared(name, opened, loop, within_s)
    took_s = time.monotonic() - began
    if problem:
        text = f"{name}: {problem}"
    else:
        at = f"checked at step {loop.live.step} in {took_s:.0f} s"
        text = f"{name}: a fresh kernel will resume this: {at}{proven}."
    loop.lines.say(text)
    return Rehearsal(not problem, text, loop.live.step, took_s)


def answer(resume: Callable[..., Any], request: str, path: str) -> None:
    """Be the fresh process: open what is asked for, train one window of it, write down what was seen.

    Args:
        resume: `nbtrain.resume`, which stands on a floor above.
        request: Its arguments, as JSON.
        path: The file to write, as JSON.
    """
    try:
        session = resume(**json.loads(request), trust_code=True, budget=None, bar=False)
        try:
            seen = probe.seen(session._opened, session._live, trains=True)
        finally:
            session._opened.close()
    except Exception as error:  # told by the process that asked
        seen = {"error": _in_words(error), "is_memory": isinstance(error, torch.OutOfMemoryError)}
    Path(path).write_text(json.dumps(seen))


# ---- before


def _refuse_if_it_trains(name: str, opened: Opened, loop: Loop) -> None:
    if loop.state == "running" or loop.runs_elsewhere:
        raise SessionError(f"{name!r} is training. Pause it first, session.pause(), then rehearse.")
    opening.claim(name, opened, loop)


def _hopeless(opened: Opened, loop: Loop) -> str:
    """Say what needs no trying: where there is no recipe that could be run, or no way to the store."""
    if opened.recipe is None or loop.is_own:
        return (
            "there is nothing to rehearse, since the loop is your own and not in the recipe.\n"
            f"In a fresh kernel run the same cells: the session goes on at step {loop.live.step}."
        )
    if opened.recipe.problems:
        return "\n  ".join(["a fresh kernel would not resume this:", *opened.recipe.problems])
    if opened.store is not None and not isinstance(opened.store, (str, os.PathLike)):
        return (
            f"a fresh kernel would not resume this: {opened.stores[-1].place} was given as an object "
            "of this kernel.\nGive a folder or a URL: store='...'."
        )
    return ""


def _is_saved(name: str, opened: Opened, live: Live) -> bool:
    """Tell whether the newest whole checkpoint is what is alive, bit for bit."""
    found = checkpoint.find(opened.stores, name)
    if not found:
        return False
    there = checkpoint.load_newest(found)[1]
    model, tensors, state = live.take()
    state |= opened.identity(live)
    return (
        all(there.state[key] == state[key] for key in PRESENT)
        and there.recipe == opened.recipe_source
        and probe.hashed(there.model) == probe.hashed(model)
        and probe.hashed(there.tensors) == probe.hashed(tensors)
    )


# ---- the fresh process, and this one


def _compared(name: str, opened: Opened, loop: Loop, within_s: float | None) -> tuple[str, str]:
    """Return what is wrong, or "", and then what was proven besides."""
    device, free, used = str(opened.device), *_memory(opened.device)
    if free < used:
        device, why = (
            "cpu",
            f"the GPU has {free / GB:.1f} GB free, and this process took {used / GB:.1f}",
        )
    fresh = _ask(name, opened, device, within_s)
    if fresh.get("is_memory") and device != "cpu":
        device, why = "cpu", "the GPU has no room for a second process"
        fresh = _ask(name, opened, device, within_s)
    if "error" in fresh:
        return f"a fresh kernel would not resume this:\n  {fresh['error']}", ""
    is_same_device = device == str(opened.device) and free >= used
    here: list[dict[str, Any]] = []
    # Under the lock of the orders: no click can start the training meanwhile.
    loop.order("rehearse", lambda: here.append(_seen_here(opened, loop, trains=is_same_device)))
    if not here:
        raise SessionError(f"{name!r} was started while it rehearsed. Pause it, then rehearse again.")
    problem = _difference(fresh, here[0])
    proven = f", {fresh['beyond']}" if fresh["beyond"] else ""
    if not is_same_device:
        proven += (
            f"; on the CPU, since {why}.\n  That proves that recipe, weights, optimizer and samples "
            "come along and a window runs, not that the GPU computes the same bits"
        )
    return problem, proven


def _memory(device: torch.device) -> tuple[float, float]:
    """Return the bytes free on a GPU, and the most that this process has had of them."""
    if device.type != "cuda":
        return float("inf"), 0.0
    used = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()  # what is only kept for the next window is room for the other process
    return torch.cuda.mem_get_info(device)[0], used


def _ask(name: str, opened: Opened, device: str, within_s: float | None) -> dict[str, Any]:
    """Start a fresh process and return its answer, or {"error": why there is none}."""
    store = None if opened.store is None else os.fspath(opened.store)
    request = json.dumps({"name": name, "store": store, "device": device})
    with tempfile.TemporaryDirectory(prefix="nbtrain-rehearsal-") as folder:
        path, said = Path(folder, "answer.json"), Path(folder, "stderr")
        with said.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", FRESH, request, str(path)],
                env=_environ(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            code = process.wait(within_s)
        except subprocess.TimeoutExpired:
            return {
                "error": f"The fresh process was not done after {words(within_s)}, and was ended.\n"
                'If build needs longer: session.rehearse(within="1h").'
            }
        finally:  # an interrupt ends it too
            process.kill()
            process.wait()
        last = "\n  ".join(said.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:])
        if code or not path.exists():
            hint = " (killed, as is done where memory runs out)" if code == -signal.SIGKILL else ""
            return {"error": f"The fresh process ended with exit code {code}{hint}.\n  {last}".rstrip()}
        found: dict[str, Any] = json.loads(path.read_text())
        return found | {"said": last}


def _environ() -> dict[str, str]:
    """Return the environment that this kernel was started with, which a fresh one will have again."""
    try:
        return dict(psutil.Process().environ())
    except psutil.Error:  # some systems tell nobody; then it is that of now
        return dict(os.environ)


def _seen_here(opened: Opened, loop: Loop, *, trains: bool) -> dict[str, Any]:
    """See what the fresh process sees, and be afterwards what was before."""
    live, task = loop.live, opened.task
    model, tensors, state = live.take()
    start = parts.Start(task)
    start.mark()
    modes = {module: module.training for module in task.model.modules()}
    with Interrupts(), _own_randomness():
        live.is_torn = True  # should even the putting back be cut, the next loop loads the checkpoint
        try:
            return probe.seen(opened, live, trains=trains)
        finally:
            if trains:
                parts.put(task, History(), model, tensors, state["trees"])
                start.go_back()
            for module, training in modes.items():
                module.training = training
            if loop.state != "paused":  # only a pause keeps its workers
                opened.close()
            live.is_torn = False


@contextmanager
def _own_randomness() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if has_cuda else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# ---- after


def _difference(fresh: dict[str, Any], here: dict[str, Any]) -> str:
    """Say what differs first, or ""."""
    if fresh["place"] != here["place"]:
        return (
            f"a fresh kernel would resume at step {fresh['place'][0]}, not {here['place'][0]}.\n  "
            f"{fresh['said']}\nSave once more, session.save(), and rehearse again."
        )
    for stage, means in (
        ("loaded", "What was loaded differs"),
        ("samples", "The samples of the next window differ"),
        ("trained", "The next window's results differ"),
    ):
        there, mine = fresh[stage], here.get(stage, fresh[stage])
        name = next((n for n in [*mine, *there] if mine.get(n) != there.get(n)), None)
        if name is not None:
            sides = _sides(fresh["kernel"], here["kernel"])
            hint = (
                "What a cell has set, set in build too; if it differs still: nbtrain.audit(build)."
                if sides
                else "It may be hidden randomness, a file that has changed, or state outside model, "
                "optimizer and parts: run nbtrain.audit(build)."
            )
            first = f"a fresh kernel would go on, but not to the same bits. {means}, first at {name!r}."
            return "\n".join([first, *sides, hint])
    return ""


def _sides(fresh: dict[str, Any], here: dict[str, Any]) -> list[str]:
    names = [n for n in here if None not in (fresh[n], here[n]) and fresh[n] != here[n]]
    told = [", ".join(f"{name} {side[name]}" for name in names) for side in (fresh, here)]
    return [f"  in a fresh kernel: {told[0]}", f"  in this kernel:    {told[1]}"] if names else []


def _in_words(error: Exception) -> str:
    """Word what a fresh process has met: the error, and the last line of the recipe that led to it."""
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, NbtrainError):
        return said
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if file.startswith("<nbtrain recipe "):
            line = linecache.getline(file, number).strip()
            said = f"{said}\n  at line {number} of the recipe, `{line}`"
            break
    return f"{said}\nLet build bring what it needs, nothing else of this kernel comes along."
