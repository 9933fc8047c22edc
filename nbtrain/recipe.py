"""The source that `build` needs: followed name by name, checked, rebuilt.

A fresh kernel has none of the user's cells, so a session keeps its *recipe* with its checkpoints:
one readable module with `build` and all that its global names lead to. From a notebook whose other
cells train, print and plot, that is::

    import torch                       # modules, and names out of installed packages
    from torch import nn

    WIDTH = 64                         # plain constants, with their values now

    class Net(nn.Module): ...          # what the user wrote, from whichever cell or file;
                                       # what a definition needs stands above it
    def build(lr=0.1): ...             # last

The invariant: a recipe is imports, constants, functions and classes and nothing else, so running it
starts no training; and either it gives `build` what it had in the notebook, or `problems` says by
name what does not come along. No line of it looks like a secret.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import linecache
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from nbtrain.errors import RecipeError
from nbtrain.source import (
    FUTURE,
    IN_EVERY_MODULE,
    Piece,
    Unwritable,
    first_line,
    submodules,
    type_name,
    unwrap,
    write,
)

_NOWHERE = object()
_SECRET_NAME = r"(?:password|passwd|secret|token|(?:api|access|auth|private)_?key)"
_SECRETS = {
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key (sk-...)": r"\bsk-(?=[\w-]*\d)[\w-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,})",
    "a Google key": r"\bAIza[\w-]{30,}",
    "a Slack token": r"\bxox[abeprs]-[\w-]{10,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    "a Kaggle key": r"""KAGGLE_KEY["']?\]?\s*[=:,]\s*[rbu]*["'][^"']+""",
    "an API key": r"""\bkey["']?\s*[=:]\s*["'][0-9a-f]{32,}["']""",
    "a password in an address": r"""://[^/\s:@'"{}]+:[^/\s@'"{}]{4,}@""",
    "a bearer token": r"\bBearer\s+[\w.~+/-]{16,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
}
_ASSIGNED = re.compile(
    rf"""{_SECRET_NAME}["']?\]?\s*(?::\s*[\w.]+\s*)?[=:,]\s*[rbu]*["']([^\s"'<>|\[\]]{{16,}})["']""",
    re.IGNORECASE,
)
_MIXED = re.compile(r"(?<=[a-z])[A-Z0-9]|(?<=[A-Z])[a-z0-9]|(?<=[0-9])[A-Za-z]")
_REACHED = re.compile(r"^import \w+(?:\.\w+)+\n", re.MULTILINE)
_SECRET_VARIABLE = re.compile("TOKEN|SECRET|PASSWORD|API_KEY|KAGGLE_KEY")


@dataclass(frozen=True)
class Recipe:
    """The source that `build` needs, as text.

    Attributes:
        source: A whole module: imports, constants, then classes and functions, `build` last.
        entry: The name of `build` in it.
        problems: What could not be written down, a line each: the name, its type, and the fix.
    """

    source: str
    entry: str
    problems: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Name the source by its content, in hex."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def code_sha256(self) -> str:
        """Name the code by its content, whichever packages were loaded when it was captured.

        A submodule that is reached by attributes, such as numpy.random, is imported by a line of its
        own only if it was loaded by then; that line tells of the kernel and not of the code.
        """
        return hashlib.sha256(_REACHED.sub("", self.source).encode()).hexdigest()

    def load(self, session: str) -> Callable[..., Any]:
        """Run the source in a module of its own and return `build`.

        The module stays registered under a name made from the session's, where dataclasses and
        forked workers find it; tracebacks and `inspect.getsource` show its lines.

        Raises:
            RecipeError: a line of it failed and is named by its number; no module was left behind.
        """
        filename = f"<nbtrain recipe {session}>"
        lines = self.source.splitlines(keepends=True)
        # An entry without a time stamp is never checked against the disk, and stays.
        linecache.cache[filename] = (len(self.source), None, lines, filename)
        module = ModuleType("nbtrain_recipe_" + re.sub(r"\W", "_", session))
        vars(module).update(__file__=filename, __nbtrain_recipe__=self)
        sys.modules[module.__name__] = module
        try:
            exec(compile(self.source, filename, "exec", dont_inherit=True), vars(module))
            entry: Callable[..., Any] = vars(module)[self.entry]
        except Exception as error:
            del sys.modules[module.__name__]
            raise RecipeError(_where_it_failed(error, filename, lines)) from error
        return entry


def capture(build: Callable[..., Any]) -> Recipe:
    """Write down what `build` needs, as one module of readable source.

    None of it is run. What cannot be written down does not stop the capture: it is told in
    `problems`, for the session to show before any training. A `build` that came from `Recipe.load`
    gives back that very recipe.

    Raises:
        RecipeError: `build` is not a function with a name and a source, or a line of the recipe
            looks like a secret; nothing was kept.
    """
    origin = unwrap(build)
    if not isinstance(origin, FunctionType) or not origin.__name__.isidentifier():
        kind = "a lambda" if isinstance(origin, FunctionType) else type_name(build)
        raise RecipeError(
            f"build is {kind}, which has no name and source of its own to keep.\n"
            "Write it as a function: def build(): ... return nbtrain.Task(...)"
        )
    entry = origin.__name__
    known = origin.__globals__.get("__nbtrain_recipe__")
    if isinstance(known, Recipe) and origin.__globals__.get(known.entry) is build:
        return known
    trail = _Trail()
    trail.follow(entry, build)
    if entry not in trail.pieces:
        raise RecipeError("build cannot be kept: " + "\n".join(trail.problems))
    source = trail.source(last=entry)
    _refuse_secrets(source)
    return Recipe(source, entry, tuple(trail.problems))


class _Trail:
    """The names followed so far, and what was written down for each."""

    def __init__(self) -> None:
        self.pieces: dict[str, Piece] = {}
        self.problems: dict[str, None] = {}
        self._seen: dict[tuple[str, int], object] = {}  # keeps the values, so that no id is reused

    def follow(self, name: str, value: object) -> None:
        """Keep what the name stands for, and all that this leads to."""
        waiting = deque([(name, value, True)])
        while waiting:
            name, value, must = waiting.popleft()
            if (name, id(value)) in self._seen:
                continue
            try:
                piece = self._keep(name, value)
            except Unwritable as reason:
                # A name that may never be read is no reason to refuse a run.
                if must:
                    self.problems[reason.line(name, value)] = None
                continue
            self._seen[name, id(value)] = value
            must_have = piece.eager | piece.lazy
            for needed in sorted((must_have | piece.maybe) - IN_EVERY_MODULE):
                builtin = vars(builtins).get(needed, _NOWHERE)
                found = piece.scope.get(needed, builtin)
                if found is not builtin:
                    waiting.append((needed, found, needed in must_have))
                elif needed in must_have and found is _NOWHERE:
                    line = f"`{needed}` is not defined; define it before the session is made."
                    self.problems[line] = None

    def _keep(self, name: str, value: object) -> Piece:
        piece = write(name, value)
        if name in self.pieces and piece.text != self.pieces[name].text:
            raise Unwritable(value, f"another `{name}` is needed too. Rename one of the two.")
        self.pieces[name] = piece
        if piece.problem:
            self.problems[Unwritable(value, piece.problem).line(name, value)] = None
        return piece

    def source(self, *, last: str) -> str:
        """Put the pieces in an order in which they run, with one name's piece at the end."""
        imports = {piece.text for piece in self.pieces.values() if piece.is_import}
        reached = {path for piece in self.pieces.values() for path in submodules(piece)}
        above = {path.rpartition(".")[0] for path in reached}
        imports |= {f"import {path}" for path in reached - above}
        blocks = ["\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))]
        after_line = False
        for piece in self._in_order(last):
            if piece.is_line and after_line:
                blocks[-1] += "\n" + piece.text
            else:
                blocks.append(piece.text)
            after_line = piece.is_line
        if any(piece.has_future for piece in self.pieces.values()):
            blocks[0] = f"{FUTURE}\n{blocks[0]}"
        return "\n\n\n".join(block.strip("\n") for block in blocks if block) + "\n"

    def _in_order(self, last: str) -> Iterator[Piece]:
        """Give each piece after those that it reads while it runs."""
        waiting = [name for name in reversed(self.pieces) if not self.pieces[name].is_import]
        waiting.sort(key=lambda name: (name == last, not self.pieces[name].is_line))
        while waiting:
            # A decorator or a base class may be called at once and read names of its own, so these
            # come first too, unless they stand in turn on what waits for them.
            others = [name for name in waiting if name != last]
            calm = (name for name in others if self._reads(name, True).isdisjoint(waiting))
            able = (name for name in others if self._reads(name, False).isdisjoint(waiting))
            name = next(calm, None) or next(able, waiting[-1])
            waiting.remove(name)
            yield self.pieces[name]

    def _reads(self, name: str, calls: bool) -> set[str]:
        found: set[str] = set()
        waiting = set(self.pieces[name].eager)
        while waiting:
            needed = waiting.pop()
            if needed in self.pieces and needed not in found:
                found.add(needed)
                waiting |= self.pieces[needed].eager
                waiting |= self.pieces[needed].lazy if calls else set()
        return found - {name}


def _refuse_secrets(source: str) -> None:
    """Raise at the first line that looks like a secret, without repeating it."""
    values = {
        f"the value of the environment variable {name}": value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name.upper()) and len(value) >= 8
    }
    for number, line in enumerate(source.splitlines(), 1):
        kinds = [kind for kind, pattern in _SECRETS.items() if re.search(pattern, line)]
        assigned = [match[1] for match in _ASSIGNED.finditer(line)]
        kinds += ["a secret" for text in assigned if len(_MIXED.findall(text)) >= 4]
        kinds += [kind for kind, value in values.items() if value in line]
        if kinds:
            raise RecipeError(
                f"Line {number} of the recipe{_in_what(source, number)} looks like {kinds[0]}; "
                "a recipe is kept as plain text.\n"
                'Read it at run time, e.g. os.environ["..."] inside build().'
            )


def _in_what(source: str, number: int) -> str:
    for node in ast.parse(source).body:
        if first_line(node) <= number <= (node.end_lineno or 0):
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            name = getattr(target, "id", None) or getattr(node, "name", None)
            return f" (in `{name}`)" if name else ""
    return ""


def _where_it_failed(error: Exception, filename: str, lines: list[str]) -> str:
    frames = traceback.walk_tb(error.__traceback__)
    numbers = [number for frame, number in frames if frame.f_code.co_filename == filename]
    if isinstance(error, SyntaxError) and error.filename == filename:
        numbers.append(error.lineno or 1)
    line = f" at its line {numbers[-1]}, `{lines[numbers[-1] - 1].strip()}`" if numbers else ""
    return (
        f"The recipe fails{line}: {type(error).__name__}: {error}\n"
        "Make that line work in this kernel (is a package missing?), then resume again."
    )
