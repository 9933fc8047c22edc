"""A recipe is imports, constants, functions and classes, and gives `build` what it had.

Whatever cannot come along is told by name before training; rebuilding starts none; and no secret is
ever written down. Each case is a notebook of cells in a real IPython, or a script, in a process of
its own, rebuilt in another process that has none of the user's code.
"""

import contextlib
import functools
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbtrain import recipe as room
from nbtrain.errors import RecipeError
from nbtrain.recipe import Recipe, capture

# The package without its `__init__`: these processes need no torch, and start in a blink.
BARE = f"""
import json, sys, types
sys.modules["nbtrain"] = types.ModuleType("nbtrain")
sys.modules["nbtrain"].__path__ = [{str(Path(room.__file__).parent)!r}]
from nbtrain.recipe import Recipe, capture
"""
TELL = """
kept = capture(build)
with open("recipe.json", "w") as file:
    json.dump([kept.source, kept.entry, kept.problems], file)
"""
SHELL = """
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
shell = InteractiveShell.instance(config=Config({"HistoryManager": {"hist_file": ":memory:"}}))
if KERNEL:
    from ipykernel.compiler import XCachingCompiler
    shell.compile = XCachingCompiler()
for cell, fails in CELLS:
    result = shell.run_cell(cell, store_history=True)
    assert bool(result.error_before_exec or result.error_in_exec) == fails, cell
"""


def python(code: str, folder: Path) -> str:
    (folder / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "run.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(folder: Path) -> Recipe:
    source, entry, problems = json.loads((folder / "recipe.json").read_text())
    return Recipe(source, entry, tuple(problems))


def script(source: str, folder: Path) -> Recipe:
    """Run a script whose `build` stands in `__main__`, and give its recipe."""
    python(textwrap.dedent(source) + BARE + TELL, folder)
    return told(folder)


def rebuilt(kept: Recipe, folder: Path) -> str:
    """Call `build` in a process that has only the recipe, and give what it printed."""
    fresh = folder / "fresh"
    fresh.mkdir()
    (fresh / "kept.py").write_text(kept.source)
    load = f'build = Recipe(open("kept.py").read(), {kept.entry!r}).load("cifar")\nprint(build())'
    return python(BARE + load, fresh).strip()


@pytest.fixture(params=["ipython", "ipykernel"])
def notebook(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Recipe]:
    """Run cells in a real IPython; a cell that starts with `#fails` must fail."""
    if request.param == "ipykernel":
        pytest.importorskip("ipykernel")

    def run(*cells: str) -> Recipe:
        each = [(textwrap.dedent(cell), "#fails" in cell) for cell in [*cells, BARE, TELL]]
        python(f"CELLS, KERNEL = {each!r}, {request.param == 'ipykernel'}\n{SHELL}", tmp_path)
        return told(tmp_path)

    return run


# ------------------------------------------------------------------------------- the round trip


def test_a_notebook_of_many_cells_is_rebuilt_in_a_fresh_process(notebook, tmp_path):
    kept = notebook(
        "import math\nfrom dataclasses import dataclass\nfrom enum import Enum",
        """
        class Mode(Enum):
            FAST = 1
            SLOW = 2
        """,
        """
        @dataclass
        class Config:
            width: int = 3
            mode: Mode = Mode.FAST
        """,
        "WIDTH = 7",
        """
        class Layer:
            def __init__(self, config): self.config = config
        class Net(Layer):
            def area(self): return double(self.config.width) + math.floor(2.5)
        """,
        "def double(x): return 2 * x",
        "double_or_not = lambda x: double(x)",
        """
        def build(mode=Mode.SLOW):
            return Net(Config(WIDTH)).area(), Config().mode.name, mode.name, double_or_not(1)
        """,
    )
    assert kept.problems == ()
    assert rebuilt(kept, tmp_path) == "(16, 'FAST', 'SLOW', 2)"


def test_a_script_and_the_local_module_that_it_imports_from_are_rebuilt(tmp_path):
    (tmp_path / "parts.py").write_text(
        "SCALE = 3\ndef scale(x): return x * SCALE\n"
        "class Head:\n    def out(self): return scale(5)\n"
        "class Bare:\n    size = 9\n"
    )
    kept = script(
        """
        from parts import Bare, Head
        def build():
            return Head().out(), Bare.size
        """,
        tmp_path,
    )
    assert kept.problems == () and "parts" not in kept.source
    assert rebuilt(kept, tmp_path) == "(15, 9)"


def test_rebuilding_starts_no_training(notebook, tmp_path):
    kept = notebook(
        "def train(): print('TRAINING')",
        """
        print('TRAINING')
        SIZE = 2
        def build(): return SIZE
        train()
        for epoch in range(3): train()
        """,
    )
    assert "train" not in kept.source.lower()
    assert rebuilt(kept, tmp_path) == "2"


def test_the_recipe_reads_like_a_module(notebook):
    kept = notebook(
        """
        import os.path as places, math
        from collections import OrderedDict as Ordered
        def helper(): return math.pi  # why
        SIZES = [1, 2]
        MORE = {"a": (1,), "b": {8, 1}}
        def build(): return helper(), SIZES, MORE, places, Ordered
        """
    )
    places = "posixpath" if sys.platform != "win32" else "ntpath"
    assert kept.source == textwrap.dedent(
        f"""\
        import math
        import {places} as places
        from collections import OrderedDict as Ordered


        SIZES = [1, 2]
        MORE = {{'a': (1,), 'b': set([1, 8])}}


        def helper(): return math.pi  # why


        def build(): return helper(), SIZES, MORE, places, Ordered
        """
    )


def test_a_loaded_build_gives_back_the_very_same_recipe():
    unwritable, width = object(), 3

    def build():
        return width, unwritable

    kept = capture(build)
    again = capture(kept.load("same"))
    assert again == kept and again.sha256 == kept.sha256
    assert again.problems[0].startswith("`unwritable` is an object;")


def test_the_hash_is_that_of_the_source():
    one, other = Recipe("a = 1\n", "a"), Recipe("a = 2\n", "a")
    assert one.sha256 != other.sha256 and len(one.sha256) == 64
    assert one.sha256 == Recipe("a = 1\n", "other", ("a problem",)).sha256


# ------------------------------------------------------------------------------ the module of it


def test_a_traceback_shows_the_lines_of_the_recipe():
    build = Recipe("def build():\n    x = 1\n    return x / 0  # here\n", "build").load("lines")
    with pytest.raises(ZeroDivisionError) as caught:
        build()
    shown = "".join(traceback.format_exception(caught.value))
    assert 'File "<nbtrain recipe lines>", line 3, in build' in shown
    assert "return x / 0  # here" in shown


def test_the_source_of_a_loaded_function_and_class_can_be_read():
    build = Recipe("class Net:\n    width = 3\n\ndef build():\n    return Net\n", "build").load("see")
    assert inspect.getsource(build) == "def build():\n    return Net\n"
    assert inspect.getsource(build()) == "class Net:\n    width = 3\n"


def test_what_build_makes_can_be_pickled_for_a_worker():
    build = Recipe("class Net: ...\n\ndef build(): return Net()\n", "build").load("my run/2")
    assert type(pickle.loads(pickle.dumps(build()))) is type(build())
    assert build.__module__ == "nbtrain_recipe_my_run_2"


def test_a_recipe_loaded_again_is_a_fresh_module():
    kept = Recipe("class Net: ...\n\ndef build(): return Net()\n", "build")
    first, second = kept.load("twice"), kept.load("twice")
    assert type(first()) is not type(second())
    assert type(pickle.loads(pickle.dumps(second()))) is type(second())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import math\nimport no_such_package\n", "line 2, `import no_such_package`"),
        ("x = 1\n\nif x\n", "line 3, `if x`"),
        ("def f(x):\n    return x.nothing\n\nf(1)\n", "line 2, `return x.nothing`"),
        ("x = 1\n", "KeyError: 'build'"),
    ],
)
def test_a_recipe_that_fails_names_its_line_and_leaves_no_module(source, said):
    with pytest.raises(RecipeError) as caught:
        Recipe(source, "build").load("broken")
    assert said in str(caught.value) and "\nMake that line work" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert "nbtrain_recipe_broken" not in sys.modules


# ----------------------------------------------------------------------------- following names


def test_names_are_followed_through_every_kind_of_scope(notebook, tmp_path):
    names = ["base", "deco", "default", "anno", "body", "inner", "Listed", "lam", "nested", "key"]
    kept = notebook(
        "rate = 5\n" + "\n".join(f"def {n}(*a): return a[0] if a else int" for n in names),
        """
        @deco
        class Net(base(object)):
            width = body(3)
            rate = rate
            sizes = [Listed(i) for i in range(2)]
            x: anno()
            def forward(self, a=default(1)):
                def deep(): return inner(1)
                return deep() + sum(inner(i) for i in [1]) + (lambda: lam(1))()
        """,
        """
        def build(sizes=[nested(i) for i in range(2)]):
            local = sizes
            return Net().forward(), sorted([2, 1], key=key), Net.width, local, Net.rate, Listed(6)
        """,
    )
    assert kept.problems == ()
    assert all(f"def {name}(" in kept.source for name in names)
    assert rebuilt(kept, tmp_path) == "(3, [1, 2], 3, [0, 1], 5, 6)"


def test_an_attribute_or_a_local_is_not_a_name_to_follow(notebook):
    kept = notebook(
        "train = object()\nforward = object()\nmodel = object()\ni = object()",
        """
        class Net:
            def forward(self): return self.train
        def build(train=1, n=[i for i in range(2)]):
            model = Net()
            model.train = train
            return model.forward()
        """,
    )
    assert kept.problems == () and "object()" not in kept.source


def test_a_submodule_reached_by_attributes_is_imported(notebook, tmp_path):
    kept = notebook(
        "import xml, xml.dom.minidom, concurrent.futures as cf, importlib.machinery",
        """
        def build():
            xml = globals()["xml"]
            return xml.dom.minidom.parseString("<a/>").documentElement.tagName
        """,
        """
        def build():
            return xml.dom.minidom.parseString("<a/>").documentElement.tagName, cf.Future.__name__
        """,
    )
    assert "import xml\nimport xml.dom.minidom\n" in kept.source
    assert "import concurrent.futures as cf\n" in kept.source
    assert rebuilt(kept, tmp_path) == "('a', 'Future')"


def test_what_was_loaded_meanwhile_does_not_make_it_other_code():
    """A kernel in which numpy.random was not used yet writes no line for it."""
    code = "import numpy as np\n{}import torch\n\n\ndef build():\n    return np.random.rand({})\n"
    early, late = Recipe(code.format("", 1), ""), Recipe(code.format("import numpy.random\n", 1), "")
    other = Recipe(code.format("", 2), "")
    assert early.sha256 != late.sha256 and early.code_sha256 == late.code_sha256
    assert early.code_sha256 != other.code_sha256
    renamed = Recipe(early.source.replace("numpy as", "cupy.numpy as"), "")
    assert early.code_sha256 != renamed.code_sha256


def test_the_public_path_of_an_installed_name_is_written(notebook, tmp_path):
    kept = notebook(
        """
        from concurrent.futures import Future, ThreadPoolExecutor as Pool
        from random import shuffle
        from typing import Optional
        def build(x: Optional[int] = None): return Future.__name__, Pool.__name__, shuffle.__name__
        """
    )
    assert "from concurrent.futures import Future\n" in kept.source
    assert "from concurrent.futures import ThreadPoolExecutor as Pool\n" in kept.source
    assert rebuilt(kept, tmp_path) == "('Future', 'ThreadPoolExecutor', 'shuffle')"


def test_this_package_counts_as_installed_wherever_it_stands():
    def build():
        return room.Recipe, Recipe

    kept = capture(build)
    assert kept.problems == ()
    assert kept.source.startswith("import nbtrain.recipe as room\nfrom nbtrain.recipe import Recipe\n")


def test_deferred_annotations_stay_deferred_and_may_name_what_is_not_there(notebook, tmp_path):
    kept = notebook(
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import ClassVar
        frame = object()
        @dataclass
        class Config:
            count: ClassVar[int] = 3
            size: int = 2
            other: NotThere = None
            frame: frame = None
        def build(x: AlsoNotThere = 0) -> Later: return Config(5).size
        """
    )
    assert kept.source.startswith("from __future__ import annotations\n\n")
    assert kept.problems == () and "from typing import ClassVar" in kept.source
    assert rebuilt(kept, tmp_path) == "5"


def test_the_future_import_is_not_added_where_no_piece_had_it(notebook):
    assert "__future__" not in notebook("def build(x: int = 0): return x").source


def test_the_newest_definition_wins_when_a_cell_was_run_again(notebook, tmp_path):
    bare = "from enum import Enum\nclass Mode(Enum):\n    A = {}"
    method = "class Net:\n    def width(self): return {}"
    kept = notebook(
        bare.format(1),
        method.format(1),
        bare.format(2),
        method.format(2),
        bare.format(1),
        method.format(1),
        bare.format(2),
        method.format(3),
        "def build(): return Mode.A.value, Net().width()",
    )
    assert rebuilt(kept, tmp_path) == "(2, 3)"


def test_a_class_of_a_newer_cell_that_failed_is_not_taken(notebook, tmp_path):
    kept = notebook(
        "class Config:\n    size = 1",
        "#fails\n1 / 0\nclass Config:\n    size = 2\n    more = 3",
        "#fails\nclass Config(:",
        "def build(): return Config.size",
    )
    assert rebuilt(kept, tmp_path) == "1"


def test_a_cell_is_not_taken_for_the_source_of_an_imported_class(notebook, tmp_path):
    (tmp_path / "mine.py").write_text("exec('class Net: pass')")
    kept = notebook("class Net: pass", "from mine import Net\ndef build(): return Net")
    assert kept.problems == (
        "`Net` is a class; its source is not to be found. Write it out in a cell or a file.",
    )


def test_a_file_that_was_edited_and_reloaded_is_read_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "edited_once.py"
    file.write_text("def build(): return 1\n")
    module = importlib.import_module("edited_once")
    assert capture(module.build).source == "def build(): return 1\n"
    file.write_text("def build(): return 1 + 1\n")
    importlib.reload(module)
    assert capture(module.build).source == "def build(): return 1 + 1\n"


def test_magics_and_commands_beside_a_definition_do_not_come_along(notebook):
    kept = notebook("%precision 3\nimport math\n!true\ndef build(): return math.pi")
    assert kept.source == "import math\n\n\ndef build(): return math.pi\n"


def test_a_command_inside_a_function_finds_the_shell(notebook):
    kept = notebook("def build():\n    !echo unzipped\n    return 1")
    assert "from IPython import get_ipython\n" in kept.source and kept.problems == ()


def closed_over(width: int) -> Callable[..., Any]:
    text = """left
    as it was"""

    class Layer:
        def size(self):
            return later() * width

    def build(extra=1):
        """Give the size.

        Indented.
        """
        return Layer().size() + extra, text

    def later():
        return 2

    return build


def test_a_build_inside_a_function_takes_the_variables_around_it():
    kept = capture(closed_over(21))
    assert kept.problems == () and "width = 21\n" in kept.source
    assert "\ndef build(extra=1):\n" in kept.source
    assert kept.load("closed")() == (43, "left\n    as it was")
    assert kept.load("closed").__doc__ == closed_over(1).__doc__


def test_definitions_stand_in_an_order_in_which_they_run(tmp_path):
    kept = script(
        """
        class Order: pass
        class Base:
            def twin(self): return Child(), Net()
        def register(made):
            assert Order
            return made
        @register
        class Net(Base):
            def parent(self): return Child
        class Child(Net): pass
        Alias = Child
        def build(): return Order and [type(made).__name__ for made in Alias().twin()]
        """,
        tmp_path,
    )
    place = kept.source.index
    assert place("class Order") < place("class Net") < place("class Child") < place("Alias =")
    assert place("class Base") < place("class Net") and place("def build") > place("Alias =")
    assert rebuilt(kept, tmp_path) == "['Child', 'Net']"


def test_classes_inside_a_function_find_their_bases():
    class Base:
        size = 4

    class Net(Base): ...

    def build():
        return Net.size

    kept = capture(build)
    assert kept.problems == () and kept.load("local")() == 4


def test_functions_that_call_each_other_come_along(notebook, tmp_path):
    kept = notebook(
        "def even(n): return n == 0 or odd(n - 1)",
        "def odd(n): return n != 0 and even(n - 1)",
        "def build(): return even(4), odd(4)",
    )
    assert rebuilt(kept, tmp_path) == "(True, False)"


def test_second_names_and_decorated_functions_come_along(notebook, tmp_path):
    kept = notebook(
        """
        import functools, contextlib
        class Net:
            class Inner: size = 4
            def area(self): return 6
            @staticmethod
            def start(): return 7
        Model, Deep, area, start = Net, Net.Inner, Net.area, Net.start
        @functools.lru_cache(maxsize=None)
        def cached(n): return n
        @contextlib.contextmanager
        def timer(): yield 8
        def build():
            with timer() as time:
                return Model.__name__, Deep.size, area(None), start(), cached(5), time
        """
    )
    assert kept.problems == ()
    assert rebuilt(kept, tmp_path) == "('Net', 4, 6, 7, 5, 8)"


# ---------------------------------------------------------------------------------- constants

CONSTANTS = """
import datetime as dt, enum, math, pathlib, signal
class Mode(enum.Enum):
    FAST = "fast"
def scale(x): return x
V = [
    None, True, -3, 0.1, 1e300, complex(-0.0, 2), "it's\\n\\"so\\"", b"\\x00",
    (), (1,), [1, [2]], {"a": {1: (2,)}}, {3, 1, 2}, set(), frozenset({1}), frozenset(),
    range(1, 9, 2), slice(None, 3), pathlib.Path("a b"), pathlib.PureWindowsPath("c:/d"),
    dt.timedelta(hours=1), dt.date(2024, 2, 3), dt.datetime(2024, 2, 3, 4), dt.time(5),
    Mode.FAST, signal.SIGINT, int, scale, math.sin, math.inf, -math.inf,
]
class NoNumber: pass
"""


def test_plain_constants_come_back_equal_and_of_the_same_type(tmp_path):
    kept = script(CONSTANTS + "def build(): return [(type(v).__name__, v) for v in V]\n", tmp_path)
    assert kept.problems == ()
    here: dict[str, Any] = {"__name__": "constants"}
    exec(CONSTANTS, here)
    for was, (kind, now) in zip(here["V"], kept.load("constants")(), strict=True):
        assert type(was).__name__ == kind
        if not callable(was) and kind != "Mode":
            assert (now, repr(now)) == (was, repr(was))
    assert rebuilt(kept, tmp_path)


def test_a_name_that_stands_for_none_comes_along():
    limit = None

    def build():
        return limit

    assert capture(build).source.startswith("limit = None\n")


def test_nan_comes_back_as_nan():
    nan = float("nan")

    def build():
        return nan

    assert capture(build).load("nan")() != 0 and "nan = float('nan')" in capture(build).source


def test_the_devices_and_types_of_torch_come_back():
    torch = pytest.importorskip("torch")
    device, kind, table = torch.device("cuda", 1), torch.bfloat16, {"cpu": torch.device("cpu")}

    def build():
        return device, kind, table

    kept = capture(build)
    assert kept.problems == () and kept.load("torch")() == (device, kind, table)


# ----------------------------------------------------------------------------------- problems


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (
            "thing = object()",
            "`thing` is an object; a fresh kernel cannot rebuild it. Make it inside",
        ),
        ("thing = {'a': [object()]}", "`thing` holds an object; a fresh kernel cannot rebuild it."),
        ("thing = open('run.py')", "`thing` is an io.TextIOWrapper; a fresh kernel cannot rebuild"),
        ("import functools\nthing = functools.partial(print)", "`thing` is a functools.partial; "),
        ("class Net:\n    pass\nthing = Net()", "`thing` is a __main__.Net; a fresh kernel cannot"),
        ("class Lr(float):\n    pass\nthing = Lr(1)", "`thing` is a __main__.Lr; a fresh kernel"),
        ("", "`thing` is not defined; define it before the session is made."),
        (
            "thing = 'x' * 200_000",
            "`thing` is a str; it is longer than 100 kB. Load it inside build",
        ),
        ("thing = [0] * 200_000", "`thing` is a list; it is longer than 100 kB. Load it inside"),
        ("thing = [[0] * 200_000]", "`thing` holds a list; it is longer than 100 kB. Load it"),
        ("thing = []\nthing.append(thing)", "`thing` is a list; a fresh kernel cannot rebuild it."),
        (
            "exec('def thing(): pass')",
            "`thing` is a function; its source is not to be found. Write",
        ),
        ("exec('class thing: pass')", "`thing` is a class; its source is not to be found. Write"),
        ("thing = [lambda: 1][0]", "`thing` is a function; its source is not to be found. Write"),
        ("from mine import helper as thing", "its source is not"),
        (
            "import mine as thing",
            "`thing` is a module; its file {folder}/mine.py is your own and a",
        ),
        ("thing = [].append", "`thing` is a builtin_function_or_method; a fresh kernel cannot"),
        (
            "class thing:\n    a = 1\nclass thing(thing):\n    b = 2",
            "`thing` is a class; it is made from an earlier `thing`. Rename one of the two.",
        ),
        (
            "import functools\ndef slow(): pass\nthing = slow = functools.lru_cache(slow)",
            "`slow` is a functools._lru_cache_wrapper; it was wrapped after its definition.",
        ),
        (
            "import functools\n@functools.lru_cache\ndef slow(): pass\n"
            "thing = functools.lru_cache(slow)",
            "`slow` is a functools._lru_cache_wrapper; it was wrapped after its definition.",
        ),
        (
            "def make():\n    n = 0\n    def inc():\n        nonlocal n\n        n += 1\n"
            "    return inc\nthing = make()",
            "`inc` is a function; it cannot stand alone (no binding for nonlocal 'n' found). Move",
        ),
        (
            "def make(n):\n    def add(x): return x + n\n    return add\na, b = make(1), make(2)\n"
            "def thing(): return a, b",
            "`n` is an int; another `n` is needed too. Rename one of the two.",
        ),
    ],
)
def test_what_cannot_be_written_down_is_told_with_its_type_and_a_fix(cell, said, tmp_path):
    (tmp_path / "mine.py").write_text("exec('def helper(): pass')")
    kept = script(f"{cell}\ndef build(): return thing\n", tmp_path)
    assert len(kept.problems) == 1
    assert said.format(folder=tmp_path) in kept.problems[0]
    assert "\n" not in kept.problems[0]
    assert kept.problems[0].endswith(".")


def test_a_data_frame_a_tensor_and_a_numpy_number_are_told_by_their_public_types():
    pandas, torch = pytest.importorskip("pandas"), pytest.importorskip("torch")
    numpy = pytest.importorskip("numpy")
    frame, weight, layer = pandas.DataFrame(), torch.ones(1), torch.nn.Linear(1, 1)
    lr = numpy.float64(0.1)

    def build():
        return frame, weight, layer, lr

    frame_told, layer_told, lr_told, weight_told = capture(build).problems
    rest = "a fresh kernel cannot rebuild it. Make it inside build(), or load it there from a file."
    assert frame_told == f"`frame` is a pandas.DataFrame; {rest}"
    assert layer_told == f"`layer` is a torch.nn.Linear; {rest}"
    assert weight_told == f"`weight` is a torch.Tensor; {rest}"
    assert lr_told == "`lr` is a numpy.float64; it is no plain number. Make it one with .item()."


def test_no_object_of_the_users_is_asked_to_show_itself():
    class Shy:
        def __repr__(self):
            raise AssertionError("shown")

        __str__ = __repr__

        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = None

    shy, listed = Shy(), [Shy()]

    def build():
        return shy, listed

    assert [line.split(";")[0].split(" ")[:2] for line in capture(build).problems] == [
        ["`listed`", "holds"],
        ["`shy`", "is"],
    ]


def test_the_place_of_the_script_is_told_as_a_problem(tmp_path):
    kept = script("def build(): return __file__, __name__\n", tmp_path)
    assert kept.problems == (
        "`__file__` is a str; a recipe has no file. Write the folder out as a constant.",
    )
    assert "__name__ =" not in kept.source


# --------------------------------------------------------------------------- what is no build


class Builder:
    def build(self):
        return 1

    @contextlib.contextmanager
    def managed(self):
        yield 1

    def __call__(self):
        return 1


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: 1, "a lambda"),
        (Builder().build, "a method"),
        (Builder().managed, "a method"),
        (functools.partial(closed_over, 1), "a functools.partial"),
        (Builder(), "a test_recipe.Builder"),
        (Builder, "a class"),
        (len, "a builtin_function_or_method"),
    ],
)
def test_only_a_function_can_be_build(build, kind):
    with pytest.raises(RecipeError, match="Write it as a function: def build") as caught:
        capture(build)
    assert kind in str(caught.value)


def test_a_build_from_an_installed_package_is_imported():
    kept = capture(textwrap.dedent)
    assert (kept.source, kept.problems) == ("from textwrap import dedent\n", ())
    assert kept.load("installed") is textwrap.dedent


def test_a_build_without_source_is_refused():
    here: dict[str, Any] = {}
    exec("def build(): return 1", here)
    with pytest.raises(RecipeError, match="its source is not to be found"):
        capture(here["build"])


# ------------------------------------------------------------------------------------ secrets

LETTERS = "aB3dE5fG7hJ9kL2mN4pQ6rS8tU1vW3xY5zA7"  # put together here, so that no scanner is alarmed


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (f"AWS = 'AKIA{LETTERS[:16].upper()}'", "an AWS key"),
        (f"x = 'hf_{LETTERS[:34]}'", "a Hugging Face token"),
        (f"x = 'sk-proj-{LETTERS}'", "an API key"),
        (f"x = 'ghp_{LETTERS}'", "a GitHub token"),
        (f"x = 'github_pat_{LETTERS}'", "a GitHub token"),
        (f"x = 'AIza{LETTERS[:35]}'", "a Google key"),
        (f"x = 'xoxb-1234-{LETTERS}'", "a Slack token"),
        (f"x = 'eyJ{LETTERS}.eyJ{LETTERS}.{LETTERS}'", "a JSON web token"),
        ("env['KAGGLE_KEY'] = 'abc'", "a Kaggle key"),
        ("x = {'username': 'me', 'key': '" + "0a1b" * 8 + "'}", "an API key"),
        ("x = '-----BEGIN RSA " + "PRIVATE KEY-----'", "a private key"),
        (f"password = '{LETTERS[:16]}'", "a secret"),
        (f"client_secret: str = '{LETTERS[:20]}'", "a secret"),
        (f"login(token='{LETTERS[:20]}')", "a secret"),
        (f"env['MY_API_KEY'] = '{LETTERS[:20]}'", "a secret"),
        (f"env.setdefault('WANDB_API_KEY', '{LETTERS[:20]}')", "a secret"),
        ("x = 'long and mine'", "the value of the environment variable MY_TOKEN"),
    ],
)
def test_a_line_that_looks_like_a_secret_is_refused_by_its_number(line, kind, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "long and mine")
    with pytest.raises(RecipeError) as caught:
        room._refuse_secrets(f"import os\n\ndef build(env, login):\n    # a line\n    {line}\n")
    said = str(caught.value)
    assert f"Line 5 of the recipe (in `build`) looks like {kind}" in said
    assert "os.environ[" in said and "inside build()" in said
    assert not any(secret in said for secret in (LETTERS[:10], "0a1b", "long and mine"))


@pytest.mark.parametrize(
    "line",
    [
        "token = '[CLS]'",
        "tokenizer = load('mistralai/Mistral-7B-Instruct-v0.2')",
        "x = dict(pad_token='<pad>', eos_token='<|endoftext|>', sep_token='</s>')",
        "tokenizer_name = 'bert-base-uncased-whole-word-masking-finetuned-squad'",
        "extra_token = '<|reserved_special_token_250|>'",
        "mask_token = 'reserved_special_token_250'",
        "key = 'conv1.weight'",
        "secret = os.environ['MY_SECRET']",
        "token = os.environ['KAGGLE_KEY']",
        "x = 'sk-learn-is-fine-by-us-all'",
        "x = timm.create_model('hf_hub:timm/resnet50.a1_in1k')",
        "x = task_k('risk-adjusted-returns-2024-2025-v3')",
        "x = 'false'",
    ],
)
def test_an_innocent_line_is_not_taken_for_a_secret(line, monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "false")
    room._refuse_secrets(f"def build():\n    {line}\n")


def test_a_secret_that_a_constant_holds_is_refused_when_captured():
    setting = "hf_" + LETTERS[:34]

    def build():
        return setting

    with pytest.raises(RecipeError, match=r"Line 1 of the recipe \(in `setting`\)"):
        capture(build)
