"""One value of the user's as one statement of source: what it says, and which names it reads.

`write` gives a `Piece`: an import, a plain constant, or the definition cut out of the cell or file
where it was written, with what its names stand for. The invariant: running a piece makes that very
value again, or one equal to it; where that cannot be, `Unwritable` carries the reason and the fix.
"""

from __future__ import annotations
import __future__

import ast
import datetime
import enum
import linecache
import math
import os
import pathlib
import re
import symtable
import sys
import sysconfig
import textwrap
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

FUTURE = "from __future__ import annotations\n"
_MAX_CONSTANT = 100_000
_REBUILD = "a fresh kernel cannot rebuild it. Make it inside build(), or load it there from a file."
_TOO_LONG = "it is longer than 100 kB. Load it inside build() from a file."
_TIMES = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta)
IN_EVERY_MODULE = {"__name__", "__doc__", "__package__", "__spec__", "__loader__", "__builtins__"}
_CELL_FILE = "ipython-input|ipykernel_"  # in the names that IPython, Jupyter and Colab give cells
_COMPREHENSIONS = {"listcomp", "setcomp", "dictcomp", "genexpr"}
_OWN_PACKAGE = __name__.partition(".")[0]
_STDLIB = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))


@dataclass(frozen=True)
class Piece:
    """One statement of a recipe, and the names that it leans on."""

    text: str
    scope: Mapping[str, object] = field(default_factory=dict)  # what those names stand for
    eager: frozenset[str] = frozenset()  # read while the statement runs
    lazy: frozenset[str] = frozenset()  # read when what it defines is called
    maybe: frozenset[str] = frozenset()  # perhaps never read: deferred annotations, class locals
    has_future: bool = False
    problem: str = ""

    @property
    def is_import(self) -> bool:
        return self.text.startswith(("import ", "from "))

    @property
    def is_line(self) -> bool:
        return not self.text.startswith(("def ", "async def ", "class ", "@"))


class Unwritable(Exception):
    """A value cannot be written down; carries the value and the fix."""

    def __init__(self, value: object, fix: str = _REBUILD) -> None:
        self.value, self.fix = value, fix

    def line(self, name: str, whole: object) -> str:
        verb = "is" if self.value is whole else "holds"
        return f"`{name}` {verb} {type_name(self.value)}; {self.fix}"


def write(name: str, value: object) -> Piece:
    """Write the statement that gives the name this value."""
    if isinstance(value, ModuleType):
        return _write_import(name, value)
    origin = unwrap(value)
    if isinstance(origin, FunctionType | type) and not _is_installed(origin.__module__):
        return _write_definition(name, value, origin)
    if name == "__file__":
        raise Unwritable(value, "a recipe has no file. Write the folder out as a constant.")
    if name == "get_ipython":  # what `%magic` and `!command` inside a function become
        return Piece("from IPython import get_ipython")
    leads: dict[str, object] = {}
    try:
        text = f"{name} = {_expression(value, leads)}"
    except Unwritable:
        if path := _public_path(name, value):
            return Piece(f"from {path[0]} import {_renamed(path[1], name)}")
        raise
    if len(text) > _MAX_CONSTANT:
        raise Unwritable(value, _TOO_LONG)
    return Piece(text, leads, frozenset(leads))


def _write_import(name: str, module: ModuleType) -> Piece:
    path = module.__name__
    if sys.modules.get(path) is not module:
        raise Unwritable(module, f"`import {path}` gives another one by now. Import it again.")
    parent, _, child = path.rpartition(".")
    is_natural = parent and child == name
    text = f"from {parent} import {name}" if is_natural else f"import {_renamed(path, name)}"
    problem = (
        f"its file {getattr(module, '__file__', None)} is your own and a fresh kernel may not have "
        f"it. Use `from {path} import ...`: what is imported by name is kept as source."
    )
    return Piece(text, {name: module}, problem="" if _is_installed(path) else problem)


def _write_definition(name: str, value: object, origin: FunctionType | type) -> Piece:
    """Write a function or class of the user's as its source, or as a second name for it."""
    text, node, scope = _find(origin)
    path = origin.__qualname__.rpartition("<locals>.")[2]
    if isinstance(node, ast.Assign):
        path = ast.unparse(node.targets[0])
    if path != name:
        root = path.partition(".")[0]
        owner = scope.get(root) if "." in path else value
        if owner is None:
            raise Unwritable(value, f"`{root}`, where it was defined, is gone.")
        return Piece(f"{name} = {path}", {root: owner}, frozenset({root}))
    is_decorated = bool(getattr(node, "decorator_list", ()))
    if value is not origin and (not is_decorated or scope.get(name, value) is not value):
        raise Unwritable(value, "it was wrapped after its definition. Write it with a decorator.")
    has_future = _has_future(origin)
    try:
        eager, lazy, maybe = _names(FUTURE + text if has_future else text, name)
        maybe |= set().union(*_names(text, name)) if has_future else set()
    except SyntaxError as error:
        fix = f"it cannot stand alone ({error.msg}). Move it out of the function around it."
        raise Unwritable(value, fix) from error
    if name in eager:
        raise Unwritable(value, f"it is made from an earlier `{name}`. Rename one of the two.")
    return Piece(text, scope, frozenset(eager), frozenset(lazy), frozenset(maybe), has_future)


def _renamed(path: str, name: str) -> str:
    return path if path == name else f"{path} as {name}"


def _expression(value: Any, leads: dict[str, object], within: tuple[int, ...] = ()) -> str:
    """Write a plain value as source, and note in `leads` the names that the source reads."""

    def write(part: object) -> str:
        return _expression(part, leads, (*within, id(value)))

    def lead(name: str, target: object) -> str:
        if not name.isidentifier() or leads.setdefault(name, target) is not target:
            raise Unwritable(value)
        return name

    kind = type(value)
    if kind in (type(None), bool, int, str, bytes):
        return repr(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else f"float('{value}')"
    if kind is complex:
        return f"complex({write(value.real)}, {write(value.imag)})"
    if kind in (range, slice):
        return f"{kind.__name__}({write(value.start)}, {write(value.stop)}, {write(value.step)})"
    if kind in (tuple, list, set, frozenset, dict) and id(value) not in within:
        return _container(value, write)
    if isinstance(value, pathlib.PurePath) and _is_installed(kind.__module__):
        name = "Path" if isinstance(value, pathlib.Path) else kind.__name__
        return f"{lead(name, getattr(pathlib, name))}({str(value)!r})"
    if kind in _TIMES and getattr(value, "tzinfo", None) is None:
        return lead(kind.__name__, kind) + repr(value).removeprefix(f"datetime.{kind.__name__}")
    if kind.__module__ == "torch" and kind.__name__ in ("device", "dtype"):
        lead("torch", sys.modules["torch"])
        return str(value) if kind.__name__ == "dtype" else f"torch.device({str(value)!r})"
    if isinstance(value, enum.Enum) and value.name in kind.__members__:
        return f"{lead(kind.__name__, kind)}.{value.name}"
    if within and isinstance(value, type | FunctionType | BuiltinFunctionType):
        return lead(value.__name__, value)
    if any((base.__module__, base.__name__) == ("numpy", "generic") for base in kind.__mro__):
        raise Unwritable(value, "it is no plain number. Make it one with .item().")
    raise Unwritable(value)


def _container(value: Any, write: Callable[[object], str]) -> str:
    if len(value) > _MAX_CONSTANT:
        raise Unwritable(value, _TOO_LONG)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(key)}: {write(item)}" for key, item in value.items()) + "}"
    parts = [write(item) for item in value]
    if isinstance(value, list):
        return "[" + ", ".join(parts) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(parts) + (",)" if len(parts) == 1 else ")")
    # A set has no order of its own, and the same recipe must have the same hash.
    return f"{type(value).__name__}([{', '.join(sorted(parts))}])"


def _find(origin: FunctionType | type) -> tuple[str, ast.stmt, Mapping[str, object]]:
    """Find the statement that defined it: its text, its tree, and what its names stand for."""
    functions = [origin] if isinstance(origin, FunctionType) else _methods(origin)
    module = vars(sys.modules.get(origin.__module__, ModuleType("")))
    bases = {base.__name__: base for base in getattr(origin, "__mro__", ())}
    names = functions[0].__globals__ if functions else module
    scope = ChainMap(*map(_cells, functions), names, bases)
    for text in _texts(origin, functions):
        try:
            tree = ast.parse(text)
        except SyntaxError:  # the history also has the cells that never ran
            continue
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
        for node in reversed(statements):
            if _made(node, origin, functions):
                return _cut(text, node), node, scope
    raise Unwritable(origin, "its source is not to be found. Write it out in a cell or a file.")


def _methods(origin: type) -> list[FunctionType]:
    """Give the methods written in the class itself, not those that a dataclass adds."""
    plain = [getattr(value, "__func__", value) for value in vars(origin).values()]
    unwrapped = [unwrap(getattr(value, "fget", value)) for value in plain]
    return [
        method
        for method in unwrapped
        if isinstance(method, FunctionType)
        and method.__qualname__ == f"{origin.__qualname__}.{method.__code__.co_name}"
        and _file_text(method.__code__.co_filename)
    ]


def _texts(origin: FunctionType | type, functions: list[FunctionType]) -> Iterator[str]:
    """Give every text that may define it: the surest first, and newer cells before older."""
    for function in functions:
        yield _file_text(function.__code__.co_filename)
    if isinstance(origin, type):
        # A class without methods knows no file, so its module or the notebook's cells are asked.
        module = sys.modules.get(origin.__module__, ModuleType(""))
        yield _file_text(getattr(module, "__file__", None) or "")
        if origin.__module__ == "__main__":
            names = [name for name in linecache.cache if re.search(_CELL_FILE, name)]
            cells = [*map(_file_text, names), *vars(module).get("In", ())]
            yield from (cell for cell in reversed(cells) if f"class {origin.__name__}" in cell)


def _made(node: ast.stmt, origin: FunctionType | type, functions: list[FunctionType]) -> bool:
    """Tell whether this statement is the one that made the function or class."""
    starts = [function.__code__.co_firstlineno for function in functions]
    if isinstance(origin, FunctionType):
        name = origin.__code__.co_name
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            lambdas = [part.lineno for part in ast.walk(node) if isinstance(part, ast.Lambda)]
            return name == "<lambda>" and lambdas == starts and len(node.targets) == 1
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return False
        return (node.name, [first_line(node)]) == (name, starts)
    if not isinstance(node, ast.ClassDef) or node.name != origin.__name__:
        return False
    first, last = first_line(node), node.end_lineno or 0
    if starts or vars(origin).get("__firstlineno__", first) != first:
        return bool(starts) and all(first <= start <= last for start in starts)
    # A newer cell that failed before it came to the class is not the one.
    parts = [part for line in node.body for part in ast.iter_child_nodes(line)]
    names = [part for part in parts if isinstance(part, ast.Name)]
    written = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    made = {*origin.__annotations__, *getattr(origin, "__members__", ())}
    return made <= written <= made | set(vars(origin))


def first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _cut(text: str, node: ast.stmt) -> str:
    """Take a statement out of its text and move it to the margin, but not what its strings say."""
    if isinstance(node, ast.Assign):
        return ast.get_source_segment(text, node) or ""
    in_strings = {
        line
        for part in ast.walk(node)
        if isinstance(part, ast.Constant | ast.JoinedStr)
        for line in range(part.lineno + 1, (part.end_lineno or 0) + 1)
    }
    lines = text.split("\n")
    span = range(first_line(node), (node.end_lineno or 0) + 1)
    margins = {number: 0 if number in in_strings else node.col_offset for number in span}
    return "\n".join(re.sub(rf"^\s{{0,{margins[n]}}}", "", lines[n - 1]) for n in span)


def _names(text: str, own: str) -> tuple[set[str], set[str], set[str]]:
    """Give the global names that a statement reads: while it runs, when called, and perhaps."""
    eager: set[str] = set()
    lazy: set[str] = set()
    maybe: set[str] = set()

    def collect(table: symtable.SymbolTable, runs: bool, own: str = "") -> None:
        for symbol in table.get_symbols():
            name = symbol.get_name()
            if symbol.is_referenced() and (symbol.is_global() or name == own):
                (eager if runs else lazy).add(name)
            elif symbol.is_referenced() and symbol.is_local() and table.get_type() == "class":
                maybe.add(name)
        for child in table.get_children():
            is_scope = str(child.get_type()).startswith(("class", "type param"))
            is_loop = child.get_name().strip("<>") in _COMPREHENSIONS
            collect(child, runs and (is_scope or is_loop))

    # As the body of a function: there the variables of a comprehension are not taken for globals.
    start = len(FUTURE) if text.startswith(FUTURE) else 0
    body = f"{text[:start]}def _():\n{textwrap.indent(text[start:], ' ')}"
    collect(symtable.symtable(body, "recipe", "exec").get_children()[0], True, own)
    return eager, lazy, maybe


def _has_future(origin: FunctionType | type) -> bool:
    """Tell whether its source had `from __future__ import annotations`."""
    functions = [origin] if isinstance(origin, FunctionType) else _methods(origin)
    if functions:
        return bool(functions[0].__code__.co_flags & __future__.annotations.compiler_flag)
    return {*map(type, origin.__annotations__.values())} == {str}


def _cells(function: FunctionType) -> dict[str, object]:
    """Give what the variables of the functions around it hold; one not set yet is left out."""
    held: dict[str, object] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # empty: the function around it never came to set the variable
            continue
    return held


def _file_text(filename: str) -> str:
    linecache.checkcache(filename)
    return "".join(linecache.getlines(filename))


def unwrap(value: Any) -> Any:
    """Give the function under its decorators, without asking the value for what it may make up."""
    while not isinstance(value, MethodType) and "__wrapped__" in getattr(value, "__dict__", ()):
        value = value.__dict__["__wrapped__"]
    return value


def _is_installed(path: str | None) -> bool:
    """Tell whether a fresh kernel can be expected to have this module."""
    parent, _, name = (path or "").rpartition(".")
    if path in sys.builtin_module_names or (parent or name).partition(".")[0] == _OWN_PACKAGE:
        return True
    if path not in sys.modules or path in ("__main__", "__mp_main__"):
        return False
    module = vars(sys.modules[path])
    file = module.get("__file__") or next(iter(module.get("__path__") or ()), None)
    if file is None:  # made by C code, or when its parent was imported
        return _is_installed(parent) if parent else name in sys.stdlib_module_names
    return bool(re.search(r"[/\\](site|dist)-packages[/\\]", file)) or file.startswith(_STDLIB)


def _public_path(name: str, value: object) -> tuple[str, str] | None:
    """Find the shortest public module that has this very object, and its name there."""
    own = getattr(value, "__module__", "")
    names = {name, getattr(value, "__name__", name)}
    found = [
        (path, alias)
        for path, module in list(sys.modules.items())
        for alias in names
        if isinstance(module, ModuleType) and vars(module).get(alias) is value
        if _is_installed(path)
    ]

    def rank(place: tuple[str, str]) -> tuple[object, ...]:
        path, alias = place
        is_private = any(part.startswith("_") for part in path.split("."))
        is_above = f"{own}.".startswith(f"{path}.")
        return is_private, not is_above, path.count("."), path, alias != name

    return min(found, key=rank, default=None)


def type_name(value: object) -> str:
    """Say what kind of thing it is, with its article, and without asking the thing itself."""
    for kind, word in ((FunctionType, "function"), (type, "class"), (ModuleType, "module")):
        if isinstance(value, kind):
            return f"a {word}"
    made = type(value)
    path = _public_path(made.__name__, made) or (made.__module__, made.__qualname__)
    name = ".".join(path).removeprefix("builtins.")
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def submodules(piece: Piece) -> Iterator[str]:
    """Give the modules that the piece reaches through the attributes of another."""
    for node in ast.walk(ast.parse(piece.text)):
        names = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        module = piece.scope.get(names[0])
        if isinstance(module, ModuleType) and names[0] in piece.eager | piece.lazy:
            path = start = module.__name__
            for name in names[1:]:
                child = sys.modules.get(f"{path}.{name}")
                if child is None or vars(module).get(name) is not child:
                    break
                path, module = f"{path}.{name}", child
            if path != start:
                yield path
