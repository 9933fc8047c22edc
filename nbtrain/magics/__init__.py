"""`%nbtrain`: words for a notebook, each a line over what a session does; `%nbtrain help` has them all.

They speak to the newest session or population of the kernel. Loading them imports no torch: a word that
needs it imports it. What is wrong is told in one block, as an error of the cell and so of a batch job
too, but without a traceback, unless the user's own code raised.
"""

# The decorators of IPython have no types.
# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from __future__ import annotations

import inspect
import re
import symtable
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import display

from nbtrain.errors import DataError, NbtrainError, TrustError
from nbtrain.magics import completing, listing, telling
from nbtrain.magics.said import Said, read

if TYPE_CHECKING:
    from nbtrain.population.population import Population
    from nbtrain.session import Session

    Trained: TypeAlias = Session | Population

NO_SESSION = (
    'There is no session in this kernel. Make one, session = nbtrain.Session("name", build), '
    "or go on with a stored one: %nbtrain resume NAME. %nbtrain list shows those."
)
# What all the others do is done to a single session.
FOR_POPULATIONS = ("status", "start", "resume", "pause", "stop", "panel", "plot", "history", "list")
ORDERED = {
    "pause": "pauses after this window, and saves. %nbtrain resume goes on",
    "save": "saves after this window",
    "stop": "stops after this window, and saves. %nbtrain resume goes on",
}


def load(shell: Any) -> None:
    """Add the magics to a shell; those that are there already stay, with what they know."""
    if NbtrainMagics.__name__ not in shell.magics_manager.registry:
        shell.register_magics(NbtrainMagics)
        shell.set_hook("complete_command", completing.complete, str_key="%nbtrain")


def unload(shell: Any) -> None:
    """Take the magics out of a shell; where there are none do nothing."""
    if shell.magics_manager.registry.pop(NbtrainMagics.__name__, None) is not None:
        for magics in shell.magics_manager.magics.values():
            magics.pop("nbtrain", None)
        shell.strdispatchers["complete_command"].strs.pop("%nbtrain", None)


@magics_class
class NbtrainMagics(Magics):
    """The words."""

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)
        self._shell = shell
        self._build: Callable[[], Any] | None = None

    @magic_arguments()
    @argument("words", nargs="*", help="As above.")
    @argument("--store", metavar="PLACE", help="A folder or a URL, for resume, start and list.")
    @argument("--trust-code", action="store_true", help="As trust-code above.")
    @line_cell_magic
    def nbtrain(self, line: str, cell: str | None = None) -> None:
        """Start, watch, steer, stop and resume a training run.

        %nbtrain                    how the session of this kernel stands
        %nbtrain start              train: show the panel and wait; if it trains already, only wait
        %nbtrain start background   train and leave the kernel free
        %nbtrain start NAME epochs=20 batch_size=32 ...
                                    make a session of the marked recipe, or open it again, and train
        %nbtrain resume             go on with the session of this kernel, or else the only stored one
        %nbtrain resume NAME trust-code
                                    go on with a stored one, running the code that is stored with it
        %nbtrain pause, save, stop  after this window; pause and stop save too
        %nbtrain set accumulate=4 lr=0.05 budget=8h
                                    change settings from the next window on; without any, show them
        %nbtrain rehearse           try out, in a fresh process, whether a fresh kernel would go on
        %nbtrain find_lr [low=1e-6 high=1 steps=100]
                                    the loss over rising learning rates; the session stays as it is
        %nbtrain panel              the panel, here
        %nbtrain plot [NAME ...]    the curves, with those of other sessions of this notebook over them
        %nbtrain plot lineage       of a population: who went on from whose state
        %nbtrain history            the last epochs, and the last step
        %nbtrain list               the sessions found in every place
        %nbtrain audit [STEPS]      train the first steps several times and compare all bits: is this
                                    session's `build` reproducible, or else the notebook's `build`?
        %nbtrain help [WORD]        this
        %%nbtrain recipe [FUNCTION] as the very first line of a cell: run it, and check that all that
                                    `build` (or FUNCTION) needs can be kept for a fresh kernel

        A value is Python's, else text: epochs=20, budget=8h, milestones=[30,60]. For {rate} stands
        what your variable `rate` holds.
        """
        with _short():
            said = read(self.nbtrain.parser, line)
            if cell is not None or said.word == "recipe":
                self._mark(said, cell)
                return
            acts: dict[str, Callable[[Said], None]] = {
                "start": self._start,
                "resume": self._resume,
                "pause": _order,
                "save": _order,
                "stop": _order,
                "set": _set,
                "rehearse": _rehearse,
                "find_lr": _find_lr,
                "panel": lambda said: _trained().panel(),
                "plot": self._plot,
                "history": lambda said: print(_history()),
                "list": lambda said: print(_list(said)),
                "audit": self._audit,
                "status": lambda said: print(_status()),
                "help": self._help,
            }
            if said.word not in acts:
                raise telling.no_word(said.word)
            _refuse_for_populations(said.word)
            acts[said.word](said)

    def _start(self, said: Said) -> None:
        name, trained = said.name(), newest()
        if name and self._build is not None and not (trained and _is_herd(trained, name)):
            from nbtrain.session import Session

            trained = Session(name, self._build, **said.values)
            self._give(trained)
        elif name and (trained is None or trained.name != name):
            raise UsageError(
                f"There is no recipe for {name!r}. Write %%nbtrain recipe above the cell that defines "
                f"build and run it, or go on with a stored session: %nbtrain resume {name}."
            )
        elif said.values:
            raise UsageError(
                "start takes settings only for a new session: %nbtrain start NAME epochs=20. "
                "Those of a session that is there are changed by %nbtrain set."
            )
        _train(trained or _trained(), said)

    def _resume(self, said: Said) -> None:
        name, trained = said.name(), newest()
        is_here = trained is not None and name in ("", trained.name)
        changes = {key: value for key, value in said.values.items() if key != "trust_code"}
        if trained is not None and is_here and not {"store", "at_least"} & changes.keys():
            if changes and _is_herd(trained):
                raise UsageError(
                    f"{trained.name} is here already: what it was made with is changed by making it "
                    "again, with the same name."
                )
            if changes:
                trained.set(**changes)
        else:
            from nbtrain.resuming import resume

            try:
                trained = resume(name or None, **said.values)
            except TrustError as error:
                error.add_note(f"Or: %nbtrain {said.line} trust-code")
                raise
            self._give(trained)
        _train(trained, said)

    def _plot(self, said: Said) -> None:
        trained = _trained()
        if _is_herd(trained):
            display(trained.plot("scores" if said.name() in ("", trained.name) else said.name()))
            return
        from nbtrain.session import Session

        held = {name: x for name, x in self._shell.user_ns.items() if isinstance(x, Session)}
        known = {x.name: x for x in held.values()}
        known |= {name: x for name, x in held.items() if not name.startswith("_")}
        for name in said.names:
            if name not in known:
                there = ", ".join(known) or "none"
                raise UsageError(f"There is no session {name!r} in this notebook. There is: {there}.")
        others = [known[name] for name in said.names if known[name] is not trained]
        display(trained.plot(compare=others) if others else trained.plot())

    def _audit(self, said: Said) -> None:
        text, session = said.name() or "4", newest()
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(f"{text!r} is no number of steps. Write a whole one: %nbtrain audit 8.")
        if session is not None:
            session.audit(int(text))
            return
        build = self._build or self._shell.user_ns.get("build")
        if not callable(build):
            raise UsageError("There is no session and no function `build` here that could be audited.")
        from nbtrain.auditing import audit

        audit(build, int(text))

    def _help(self, said: Said) -> None:
        print(telling.help(inspect.cleandoc(self.nbtrain.parser.description), said.name()))
        if not said.name() and _is_herd(herd := newest()):
            print(f"\n{herd.name} is a population. It knows: {', '.join(FOR_POPULATIONS)}.")

    def _give(self, session: Trained) -> None:
        """Let the user's code have it, under a name that takes nothing away."""
        short = "population" if _is_herd(session) else "session"
        longer = f"{short}_" + re.sub(r"\W", "_", session.name)
        names = chain((short, longer), (f"{longer}_{number}" for number in count(2)))
        held = self._shell.user_ns
        name = next(n for n in names if n not in held or _is_older(held[n], session))
        self._shell.push({name: session})
        print(f"{session.name} is `{name}` in this notebook.")

    def _mark(self, said: Said, cell: str | None) -> None:
        if said.word != "recipe":
            raise UsageError("%%nbtrain goes with one word: %%nbtrain recipe. Others take one %.")
        if cell is None:
            raise UsageError("recipe marks a cell: write %%nbtrain recipe as its very first line.")
        if not self._shell.run_cell(cell).success:
            raise UsageError("The cell failed, so nothing was marked.")
        name = said.name() or "build"
        table = symtable.symtable(self._shell.transform_cell(cell), "cell", "exec")
        made = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
        if name not in made:
            functions = [c.get_name() for c in table.get_children() if c.get_type() == "function"]
            near = f" If it is {functions[-1]}: %%nbtrain recipe {functions[-1]}." if functions else ""
            raise UsageError(f"This cell defines no {name}, which returns the Task.{near}")
        from nbtrain.recipe import capture

        kept = capture(self._shell.user_ns[name])
        self._build = self._shell.user_ns[name]
        print(telling.recipe(kept, made))


def newest() -> Any:
    """Return the session or population that is meant, if there is one; to find none needs no torch."""
    room = sys.modules.get("nbtrain.opening")
    return None if room is None else room.newest()


def _is_older(value: Any, session: Trained) -> bool:
    return isinstance(value, type(session)) and value.name == session.name


def _is_herd(trained: Any, name: str = "") -> bool:
    """Tell whether it is a population, of this name if one is given."""
    room = sys.modules.get("nbtrain.population.population")
    return room is not None and isinstance(trained, room.Population) and name in ("", trained.name)


def _refuse_for_populations(word: str) -> None:
    trained = newest()
    if word not in (*FOR_POPULATIONS, "help") and _is_herd(trained):
        raise UsageError(
            f"{trained.name} is a population, for which {word} has no meaning. "
            f"It knows: {', '.join(FOR_POPULATIONS)}."
        )


def _trained() -> Any:
    trained = newest()
    if trained is None:
        raise UsageError(NO_SESSION)
    return trained


def _train(session: Trained, said: Said) -> None:
    telling.refuse_a_loop(session.status())
    if said.in_background:
        trains = not session.is_done  # else it says so itself
        session.start()
        if trains:
            print(f"{session.name} trains, and the kernel is free. %nbtrain tells how it stands.")
    elif session.state == "running":
        session.wait()
    else:
        session.run()


def _order(said: Said) -> None:
    session = _trained()
    trains, holds = session.state == "running", session.state == "paused"
    if not trains and said.word != "save" and not (said.word == "stop" and holds):
        print(f"{session.name} is {session.state}: there is nothing to {said.word}.")
        return
    getattr(session, said.word)()
    if trains:
        print(f"{session.name} {ORDERED[said.word]}.")
    else:
        print(f"{session.name} is {session.state}; saved: {telling.saved(session.status())}.")


def _set(said: Said) -> None:
    session = _trained()
    if not said.values:
        print(telling.settings(session.status()["settings"]))
        return
    session.set(**said.values)
    print(f"{session.name}, from the next window on: {telling.settings(said.values)}")


def _rehearse(said: Said) -> None:
    session = _trained()
    found = session.rehearse()
    if not session._shows:  # else it has said so itself
        print(found.text)


def _find_lr(said: Said) -> None:
    if said.values.keys() - {"low", "high", "steps"}:
        raise UsageError("find_lr takes low, high and steps: %nbtrain find_lr low=1e-5 high=0.5")
    display(_trained().find_lr(**said.values))


def _status() -> str:
    trained = newest()
    if trained is None:
        return NO_SESSION
    return (telling.population if _is_herd(trained) else telling.status)(trained.status())


def _history() -> str:
    trained = _trained()
    if _is_herd(trained):
        return telling.slices(trained.history)
    return telling.history(trained.history.epochs, trained.history.last)


def _list(said: Said) -> str:
    if said.values.keys() - {"store"}:
        raise UsageError("list takes a place and nothing else: %nbtrain list store=PLACE")
    found, problems = listing.sessions(**said.values)
    told = [telling.sessions(found)] if found else []
    trained = newest()
    if trained is not None and not said.values:
        now = trained.status()
        if (trained.name, now["store"]) not in {(row.name, row.place) for row in found}:
            at = f"in round {now['round'] + 1}" if _is_herd(trained) else f"at step {now['step']}"
            told.append(f"In this kernel: {trained.name}, {at}; it is kept in {now['store']}.")
    return "\n".join([*(told or ["There is no session."]), *problems])


@contextmanager
def _short() -> Iterator[None]:
    """Let an error that says all there is to say be shown without its traceback."""
    try:
        yield
    except (NbtrainError, ValueError, KeyboardInterrupt) as error:
        if _says_all(error):
            said = f"{type(error).__name__}: {error}".removesuffix(": ")
            text = "\n".join([said, *getattr(error, "__notes__", ())])
            # What IPython, from 7 on, asks an exception for that it is to show.
            vars(error)["_render_traceback_"] = lambda: [text]
        raise


def _says_all(error: BaseException) -> bool:
    """Tell whether nothing in it is the user's own code, whose lines have to be seen."""
    if isinstance(error, ValueError):
        last = list(traceback.walk_tb(error.__traceback__))[-1][0]
        return Path(last.f_code.co_filename).is_relative_to(Path(__file__).parents[1])
    return not (isinstance(error, DataError) and error.__cause__ is not None)
