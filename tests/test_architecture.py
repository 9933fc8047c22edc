"""A reader may start at the bottom: imports go down only, and everything is short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import nbtrain

ROOT = Path(nbtrain.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_NAMES = 400, 50, 20

# Bottom up; two on one floor do not know each other. A new module gets a place here. Behind the bar
# stand the modules of `population`; each has a floor of its own, while another package has one.
FLOORS = (
    "errors population",
    "accumulation budget grades history host interrupts judging memory orders randomness schedule",
    "naming schedulers source stores scales | space",
    "evidence frozen poll stream task thread trees | evolution",
    "bar checkpoint journal lines metrics parts recipe frames samples | parking table",
    "data",
    "forward",
    "growth live plots reading saving validation | ancestry",
    "arguments | genealogy making portrait shelf",
    "| replaying",
    "opening",
    "driving keeping probe trial | member",
    "face loop | worker",
    "auditing facts finding rehearsal status waiting | cluster",
    "| founding",
    "| storing",
    "| rounds tuning",
    "| engines standing",
    "session",
    "| population",
    "resuming",
    "magics",
    "nbtrain",
    "demo",
    "__main__",
)
FLOOR = {
    prefix + name: number
    for number, floor in enumerate(FLOORS)
    for prefix, names in zip(("", "population."), floor.split("|"), strict=False)
    for name in names.split()
}

HEAVY = ["torch", "ipywidgets", "matplotlib", "timm", "torchvision", "ray", "pandas", "IPython"]

NAMES = [
    "BudgetError",
    "CheckpointError",
    "DataError",
    "LossError",
    "NbtrainError",
    "NbtrainWarning",
    "Population",
    "Session",
    "SessionError",
    "StoreError",
    "Task",
    "TrustError",
    "audit",
    "loguniform",
    "randint",
    "resume",
    "sample_rng",
    "tune_trainable",
    "uniform",
]


def dotted(path: Path) -> str:
    """Return a file's module: nbtrain/stores/__init__.py is nbtrain.stores."""
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported(module: str) -> Iterator[str]:
    """Give the modules of ours that one imports, at its top or inside a function."""
    package = module if any(m.startswith(f"{module}.") for m in MODULES) else module.rpartition(".")[0]
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin in MODULES:
                inside = {f"{origin}.{alias.name}" for alias in node.names} & MODULES.keys()
                yield from inside or {origin}


def room(module: str) -> str:
    """Return the room of a module: a package such as stores is one, a module of population is one."""
    inner = module.removeprefix("nbtrain.")
    return inner if inner.startswith("population.") else inner.partition(".")[0]


def test_the_graph_is_read_as_it_is() -> None:
    assert {"nbtrain.loop", "nbtrain.opening", "nbtrain.parts"} <= set(imported("nbtrain.session"))
    assert "nbtrain.plots" in set(imported("nbtrain.session")), "an import inside a function counts"
    assert {"nbtrain.errors", "nbtrain.stores.contract"} <= set(imported("nbtrain.stores.folder"))
    assert "nbtrain.session" in set(imported("nbtrain"))


def test_imports_make_no_circle() -> None:
    list(TopologicalSorter({module: set(imported(module)) for module in MODULES}).static_order())


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    assert {room(module) for module in MODULES} == FLOOR.keys()


def test_a_module_imports_only_what_stands_below_it() -> None:
    upwards = [
        f"{module} (floor {FLOOR[room(module)]}) imports {other} (floor {FLOOR[room(other)]})"
        for module in MODULES
        for other in imported(module)
        if room(module) != room(other) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_module_outgrows_a_sitting() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > MAX_MODULE_LINES}


def test_no_function_outgrows_a_screen() -> None:
    """Without its docstring, which is read beside it."""
    long = {}
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long[f"{module}.{node.name}"] = length
    assert not long


def test_every_module_says_what_it_is() -> None:
    assert not [module for module, tree in MODULES.items() if not ast.get_docstring(tree)]


def test_every_module_stands_on_the_map_and_in_the_readme() -> None:
    names = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    names -= {"__init__", "__main__", "demo"}
    on_map = set(re.findall(r"\w+", (nbtrain.__doc__ or "").split("::")[1]))
    readme = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    assert not names - on_map
    assert not {name for name in names if f"{name}.py" not in readme and f"{name}/" not in readme}


def test_the_public_names_are_few_sorted_and_frozen() -> None:
    """A new one needs its line in the README, and a reason."""
    assert list(nbtrain.__all__) == NAMES == sorted(NAMES)
    assert len(NAMES) <= MAX_NAMES
    assert all(hasattr(nbtrain, name) for name in NAMES)


def test_an_import_brings_nothing_that_it_does_not_need() -> None:
    code = f"import sys, nbtrain; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.split() == []
