"""What makes two runs differ, found by watching: what an action moves, and whom it asks.

An action that shall be a function of its key moves nothing that outlives it, and asks nobody who
answers differently each time. `watch` looks at both: at the generators, numbers and sizes that some
objects hold, before and after; and at the lines of the user's code from which the system was asked for
entropy, the time, or which process or worker this is.
"""

from __future__ import annotations

import datetime
import dis
import functools
import inspect
import itertools
import linecache
import os
import random
import sys
import sysconfig
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

MAX_OBJECTS = 20_000  # looked at in a walk
MAX_ITEMS = 64  # of one container
GENERATORS = {
    np.random.Generator: "numpy Generator",
    np.random.RandomState: "numpy RandomState",
    random.Random: "python Random",
    torch.Generator: "torch Generator",
}
SIZED = (dict, list, set, deque)
PLAIN = (bool, int, float, str, bytes, type(None), itertools.count)
ENTROPY = (os.urandom, time.time, time.time_ns, time.perf_counter, time.perf_counter_ns, time.monotonic)
LOADS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"}  # no local of that name
HIDDEN = {"_parameters", "_buffers", "_modules"}  # of a module: saved, or walked under plain names
LIBRARIES = tuple(
    {str(Path(sysconfig.get_paths()[name])) for name in ("stdlib", "purelib", "platlib")}
    | {str(Path(__file__).parent)}
)


# ---- digests


def digest(tree: Any) -> str:
    """Hash all bits of a batch or a state dict: tensors, arrays, numbers, in whatever holds them."""
    found = blake2b(digest_size=8)
    for piece in _pieces(tree):
        found.update(piece)
    return found.hexdigest()


def _pieces(tree: Any) -> Iterator[bytes]:
    if isinstance(tree, Tensor):
        dense = (tree if tree.layout == torch.strided else tree.to_dense()).detach().cpu()
        yield f"{tree.dtype}{tuple(tree.shape)}".encode()
        yield dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(tree, np.ndarray) and tree.dtype != object:
        yield f"{tree.dtype}{tree.shape}".encode()
        yield tree.tobytes()
    elif isinstance(tree, Mapping):
        yield b"{"
        for name, value in tree.items():
            yield repr(name).encode()
            yield from _pieces(value)
    elif isinstance(tree, (list, tuple)):
        yield f"[{len(tree)}".encode()
        for value in tree:
            yield from _pieces(value)
    elif isinstance(tree, (*PLAIN, complex, np.generic)):
        yield repr(tree).encode()
    else:  # its repr may be an address
        yield type(tree).__qualname__.encode()
        yield from _pieces(getattr(tree, "__dict__", {}))


# ---- what objects hold


def holdings(roots: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generators, plain values and containers that some objects hold, by path.

    Followed are attributes, items, what functions close over, and the globals that functions and
    methods of the user's own code name. The process's own generators are left out: they are keyed.
    """
    kinds = (*GENERATORS, *SIZED, *PLAIN)
    return {path: value for path, value in _walk(roots) if isinstance(value, kinds)}


def _walk(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    seen = {id(one): one for one in (torch.default_generator, random._inst, np.random.mtrand._rand)}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        seen |= {id(one): one for one in torch.cuda.default_generators}
    todo = deque(roots.items())
    while todo and len(seen) < MAX_OBJECTS:
        path, value = todo.popleft()
        if isinstance(value, PLAIN):
            yield path, value
        elif id(value) not in seen:
            seen[id(value)] = value  # kept alive, so that no other object gets its id
            yield path, value
            todo.extend(_inside(path, value))


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (*GENERATORS, Tensor, np.ndarray, types.ModuleType, type)):
        return
    if isinstance(value, Mapping):
        items = itertools.islice(list(value.items()), MAX_ITEMS)
        yield from ((f"{path}[{name!r}]", item) for name, item in items)
    elif isinstance(value, (list, tuple, set, deque)):
        items = itertools.islice(list(value), MAX_ITEMS)
        yield from ((f"{path}[{number}]", item) for number, item in enumerate(items))
    elif isinstance(value, types.MethodType):
        yield from ((path, value.__self__), (path, value.__func__))
    elif isinstance(value, functools.partial):
        yield from ((path, value.func), (path, value.args), (path, value.keywords))
    elif isinstance(value, types.FunctionType):
        yield from _named(path, value)
    if not isinstance(value, types.FunctionType):
        yield from _attributes(path, value)


def _attributes(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    own = dict(getattr(value, "__dict__", {}))
    for name, item in own.items():
        if not (isinstance(value, nn.Module) and name in HIDDEN):
            yield f"{path}.{name}", item
    if isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", module) for name, module in value.named_children())
    for kind in type(value).__mro__:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
        if kind.__module__ in sys.builtin_module_names or is_library(file):
            continue
        for name, item in list(vars(kind).items()):
            function: Any = getattr(item, "__func__", getattr(item, "fget", item))
            if isinstance(function, types.FunctionType):
                yield f"{kind.__name__}.{name}", inspect.unwrap(function)
            elif isinstance(item, (*GENERATORS, *SIZED, *PLAIN)) and name not in own:
                yield f"{path}.{name}", item


def _named(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give what a function closes over, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{name}, of the function around {function.__name__}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    if is_library(function.__code__.co_filename):
        return
    codes = deque([function.__code__])
    while codes:
        code = codes.popleft()
        codes.extend(one for one in code.co_consts if isinstance(one, types.CodeType))
        for name in set(code.co_names) & function.__globals__.keys():
            value = function.__globals__[name]
            if isinstance(value, types.FunctionType):
                yield name, value
            else:
                yield f"the global {name}", value


def is_library(path: str) -> bool:
    """Tell whether a file is python's, torch's, any installed package's, or ours."""
    return path.startswith((*LIBRARIES, "<frozen"))


def _state(value: Any) -> Any:
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    return len(value) if isinstance(value, SIZED) else repr(value)


def _put_back(value: Any, state: Any) -> None:
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    elif isinstance(value, (np.random.RandomState, torch.Generator)):
        value.set_state(state)
    else:
        value.setstate(state)


# ---- watching


@dataclass
class Seen:
    """What an action moved, and the lines of the user's from which it asked the system.

    Args:
        result: What it returned.
        generators: By path, those that moved.
        others: Numbers and sizes that changed, in words.
        entropy: Lines that ask for entropy or the time.
        places: Lines that ask which process or worker this is.
        before: By path, the states of those generators.
        functions: The user's, but for those that only make an object.
    """

    result: Any = None
    generators: dict[str, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    entropy: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict, repr=False)
    functions: list[types.FunctionType] = field(default_factory=list, repr=False)

    @property
    def names(self) -> list[str]:
        """The generators that moved, and where the user's code uses them."""
        return [
            f"{path}, a {_kind(value)}{''.join(self._uses(path)[:1])}"
            for path, value in self.generators.items()
        ]

    def _uses(self, path: str) -> list[str]:
        name = path.partition(",")[0].replace(" ", ".").rpartition(".")[2].partition("[")[0]
        return [
            f", in {_line(function.__code__, one.positions.lineno)}"
            for function in self.functions
            for one in dis.get_instructions(function)
            if one.argval == name and one.opname in LOADS
            if one.positions is not None and one.positions.lineno is not None
        ]

    def put_back(self) -> bool:
        """Put the generators back to where they were; False where one was made only meanwhile."""
        if not all(path in self.before for path in self.generators):
            return False
        for path, value in self.generators.items():
            _put_back(value, self.before[path])
        return bool(self.generators)


def watch(action: Callable[[], Any], **roots: Any) -> Seen:
    """Do something, and tell what it moved in some objects, named as in the user's code."""
    held = holdings(roots)
    before = {path: _state(value) for path, value in held.items()}
    seen = Seen()
    with _asked(seen):
        seen.result = action()
    for path, value in holdings(roots).items():
        state = _state(value)
        if path in before and digest(before[path]) == digest(state):
            continue
        if isinstance(value, tuple(GENERATORS)):
            seen.generators[path] = value
        elif isinstance(value, SIZED) and path in before:
            seen.others.append(f"{path} (of {before[path]} items before, {state} after)")
        elif path in before:
            seen.others.append(f"{path} ({before[path]} before, {state} after)")
    seen.functions = [
        value
        for _, value in _walk(roots)
        if isinstance(value, types.FunctionType)
        and value.__name__ != "__init__"
        and not is_library(value.__code__.co_filename)
    ]
    seen.before = {p: before[p] for p in seen.generators if isinstance(held.get(p), tuple(GENERATORS))}
    return seen


@contextmanager
def _asked(seen: Seen) -> Iterator[None]:
    """Note the lines from which the system is asked for what no key can fix."""
    before = sys.getprofile()

    def note(frame: types.FrameType, event: str, thing: Any) -> None:
        if event == "call" and frame.f_code is random.Random.seed.__code__:
            if frame.f_locals.get("a") is None:
                _add(seen.entropy, frame)
        elif event == "call" and frame.f_code is get_worker_info.__code__:
            _add(seen.places, frame.f_back, is_near=True)
        elif event == "c_call" and (thing is os.urandom or _reseeds(thing)):
            _add(seen.entropy, frame)
        elif event == "c_call" and (thing in ENTROPY or _is_now(thing)):
            _add(seen.entropy, frame, is_near=True)
        elif event == "c_call" and thing is os.getpid:
            _add(seen.places, frame, is_near=True)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def _reseeds(thing: Any) -> bool:
    """Whether this is torch's `seed()`, which asks the system, unlike `manual_seed`."""
    owner = getattr(thing, "__self__", None)
    return isinstance(owner, torch.Generator) and getattr(thing, "__name__", "") == "seed"


def _is_now(thing: Any) -> bool:
    owner = getattr(thing, "__self__", None)
    return owner is datetime.datetime and getattr(thing, "__name__", "") in ("now", "utcnow")


def _add(lines: list[str], frame: types.FrameType | None, *, is_near: bool = False) -> None:
    """Add the user's line that leads to a frame; a near one is that frame's own or none.

    Libraries look at the clock for reasons of their own.
    """
    while frame is not None and not is_near and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None or is_library(frame.f_code.co_filename):
        return
    line = _line(frame.f_code, frame.f_lineno)
    if line not in lines:
        lines.append(line)


def _line(code: types.CodeType, number: int) -> str:
    text = linecache.getline(code.co_filename, number).strip() or "?"
    return f"`{text}` (line {number}, in {code.co_qualname.split('<locals>.')[-1]})"


def _kind(value: Any) -> str:
    return next(words for kind, words in GENERATORS.items() if isinstance(value, kind))
