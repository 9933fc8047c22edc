"""Does this code train reproducibly; and if not, where is the hidden randomness?

First what needs no training is tried on fresh builds: the first weights, the same samples read in two
orders, the same window done twice. Then the first steps are trained, three times as they are and with
other numbers of workers, and all bits compared. A cause is named only if trying shows it: a generator
that is put back to where it was, and then everything is equal; a line from which the system was asked
for entropy; a number that was another one afterwards.

What one process cannot show: the order of a set of strings, which another kernel hashes otherwise.
"""

from __future__ import annotations

import copy
import multiprocessing
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from nbtrain import data, randomness
from nbtrain.errors import DataError, SessionError
from nbtrain.evidence import Seen, digest, watch
from nbtrain.opening import Opened
from nbtrain.parts import Start
from nbtrain.task import Task
from nbtrain.trial import Bench, Fresh, Trial, said, undisturbed

RUNS, WORKERS = 3, (0, 1, 2)
MAX_NAMED = 3
KEYED = "torch's, numpy's or python's module-level random functions, which nbtrain keys"
DRAW = f"Draw there from nbtrain.sample_rng(), or from {KEYED}."
UNSURE = re.compile(r"(\S+) does not have a deterministic implementation")


@dataclass
class Audit:
    """What an audit found; `print` shows it.

    Args:
        ok: Whether all runs gave the same bits, and a resumed one would.
        cause: What makes them differ, and the line to change; "" where nothing does.
        step: The first step whose loss differs, from 1; None where none does.
        losses: The windows' mean losses by run, a number a step.
        weights: A digest of the weights and buffers after the last step, by run.
        notes: What was seen besides and is no failure.
    """

    ok: bool
    cause: str
    step: int | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""
    digits: int = 9

    def __str__(self) -> str:
        table = [self._table()] if self.losses else []
        return "\n".join([*table, self.verdict, *([self.cause] if self.cause else []), *self.notes])

    def __repr__(self) -> str:
        return f"<audit: {self.verdict}>"

    def _table(self) -> str:
        steps = len(next(iter(self.losses.values())))
        rows = [["step", *self.losses]]
        for step in range(steps):
            rows.append([str(step + 1), *(f"{x[step]:.{self.digits}g}" for x in self.losses.values())])
        rows.append(["weights", *self.weights.values()])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        marked = self.step
        if marked is None and not self.ok and len(set(self.weights.values())) > 1:
            marked = steps + 1
        return "\n".join(f"{line}  <- differs" if n == marked else line for n, line in enumerate(lines))


def audit(
    build: Callable[[], Task],
    steps: int = 4,
    *,
    batch_size: int | None = None,
    accumulate: int = 1,
    num_workers: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> Audit:
    """Train the first steps several times, compare all bits, and find what makes them differ.

    Prints a line a run, and then a table of the losses: a row a step, a column a run, the first row
    that differs marked. `build` is called some nine times. Random states, grad mode and torch's
    settings are left as they were, and no file is written; a generator that your own code keeps
    outside of `build` has moved.

    Args:
        build: As for a `Session`.
        steps: Optimizer steps of a run.
        batch_size, accumulate, num_workers, seed, device, precision: As for a `Session`.

    Returns:
        The table and the verdict: `ok`, `cause`, `step`, `losses`.

    Raises:
        ValueError: an argument makes no sense.
        SessionError: a session trains in this kernel.
        TaskError, DataError: what `build` gives cannot be used, or the data set raised.
    """
    bench = Bench(build, steps, batch_size, accumulate, num_workers, seed, device, precision)
    with undisturbed():
        found = said("built, read and computed twice", lambda: _before_training(bench))
    if found is None:
        cause = "Make both inside build: a session in a fresh kernel has nothing else."
        what = "build returns a model or an optimizer that is made outside of it, so nothing was run."
        result = Audit(False, cause, verdict=what)
    else:
        result = _trained(bench, found)
    print(result, flush=True)
    return result


def audit_session(name: str, opened: Opened, settings: dict[str, Any], steps: int) -> Audit:
    """Audit the `build` of a session as it was opened, with the settings that are in force.

    Raises:
        SessionError: a session trains in this kernel, or this one was made without `build`.
    """
    if opened.build is None:
        raise SessionError(f"{name!r} was made without build. Say nbtrain.audit(build).")
    return audit(
        opened.build,
        steps,
        batch_size=settings["batch_size"],
        accumulate=settings["accumulate"],
        num_workers=opened.arguments["num_workers"],
        seed=opened.seed,
        device=opened.device,
        precision=opened.forward.precision,
    )


# ---- before training


def _before_training(bench: Bench) -> str | None:
    """Return the cause that shows without training, "" for none, None where builds share a model."""
    one, two = bench.fresh(), bench.fresh()
    if one.task.model is two.task.model or one.task.optimizer is two.task.optimizer:
        return None
    named = dict(two.task.model.named_parameters())
    if any(named.get(name) is p for name, p in one.task.model.named_parameters()):
        return None
    if unequal := _unequal(one.weights(), two.weights()):
        return _of_weights(bench, unequal)
    if digest(list(map(int, one.order(0)))) != digest(list(map(int, two.order(0)))):
        return _of_order(bench)
    return _of_samples(bench, one, two) or _of_window(bench, one)


def _of_weights(bench: Bench, unequal: list[str]) -> str:
    def act() -> str:
        return digest(bench.fresh().weights())

    what = f"The first weights differ: {_few(unequal)}."
    way_out = f"Draw them with {KEYED}, or give the generator a seed inside build."
    return _blamed(what, way_out, watch(act, build=bench.build), act)


def _of_order(bench: Bench) -> str:
    fresh = bench.fresh()

    def act() -> str:
        return digest(list(map(int, data.Order(fresh.source, bench.seed)(0))))

    seen = watch(act, **{"train.sampler": fresh.source.sampler})
    what = f"The order differs: {type(fresh.source.sampler).__name__} draws it from what has no key."
    return _blamed(what, f"Let it draw from {KEYED}.", seen, act)


def _of_samples(bench: Bench, one: Fresh, two: Fresh) -> str:
    """Read the same places in two orders: what comes at one must not depend on what came before."""
    indices = [int(index) for index in one.order(0)[: one.batch_size]]
    first, _, again = (_read(bench, one, epoch, indices) for epoch in (0, 1, 0))
    _, later = (_read(bench, two, epoch, indices) for epoch in (1, 0))
    if first == again == later:
        return ""
    fresh = bench.fresh()
    act = partial(_read, bench, fresh, 0, indices)
    seen = watch(act, train=fresh.task.train, collate=fresh.source.collate)
    what = "A sample depends on what was read before it: " if first != again else ""
    what = what or "A sample of the same epoch and position differs from build to build: "
    return _blamed(what + "a resumed run, or another number of workers, gets others.", DRAW, seen, act)


def _read(bench: Bench, fresh: Fresh, epoch: int, indices: list[int]) -> str:
    return digest(_batch(bench, fresh, epoch, indices))


def _batch(bench: Bench, fresh: Fresh, epoch: int, indices: list[int]) -> Any:
    keyed = data.Keyed(fresh.source.dataset, fresh.source.collate, (bench.seed, "train"))
    _, batch = keyed.__getitems__((epoch, 0, indices))
    if isinstance(batch, data.Failure):
        raise batch.to_raise()
    return batch


def _of_window(bench: Bench, fresh: Fresh) -> str:
    """Do one forward and backward twice, as a session does a window again after a cut."""
    task = fresh.task
    batch = _batch(bench, fresh, 0, [int(index) for index in fresh.order(0)[: fresh.batch_size]])
    start = Start(task)
    start.mark()

    def act() -> str:
        randomness.seed(bench.seed, "step", 0, 0)
        with torch.enable_grad():
            # A copy, for a model may change what it is given.
            loss, _, _ = fresh.forward.run(task, fresh.forward.moved(copy.deepcopy(batch)))
            loss.squeeze().backward()  # type: ignore[no-untyped-call]
        found = digest([loss, [p.grad for p in task.model.parameters()]])
        start.go_back()
        return found

    task.model.train()
    if act() == act():
        return ""
    seen = watch(act, model=task.model, loss=task.loss, step=task.step)
    what = "The same window, done twice, has another loss or gradient."
    way_out = f"Draw in forward from {KEYED}, and keep nothing there outside of buffers."
    if bench.device.type == "cuda" and not (seen.generators or seen.entropy):
        return _of_operation(bench)
    return _blamed(what, way_out, seen, act)


def _blamed(what: str, way_out: str, seen: Seen, act: Callable[[], Any]) -> str:
    """Say what it was: generators, if with them put back it is the same; else all that was seen."""
    if seen.put_back() and act() == seen.result:
        return f"{what}\n  {_few(seen.names)}\n{way_out}"
    found = seen.entropy + seen.names + seen.others
    if not seen.entropy and not seen.names:
        way_out = "Let it keep nothing from one call to the next that changes what it gives."
    found = found or ["nothing that was looked at has moved: it may be kept in C, or in a file"]
    return f"{what}\n  {_few(found)}\n{way_out}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _unequal(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


# ---- training


def _trained(bench: Bench, cause: str) -> Audit:
    trials = [_trial(bench, f"run {number}") for number in range(1, RUNS + 1)]
    notes = []
    others = [n for n in WORKERS if n != trials[0].num_workers]
    for number in others if "fork" in multiprocessing.get_all_start_methods() else ():
        label = _counted(number, "worker")
        try:
            trials.append(_trial(bench, label, number))
        except DataError as error:  # not the number that was asked for
            notes.append(f"Note: with {label} the data could not be read. {error}")
    differ = [trial for trial in trials if trial.bits != trials[0].bits]
    result = Audit(not (differ or cause), cause, digits=trials[0].digits)
    result.step = _first_step(trials)
    result.verdict = _verdict(bench, trials, result)
    if differ and not cause:
        with undisturbed():
            result.cause = _after_training(bench, trials)
    if result.ok and bench.device.type == "cpu":
        trials += _with_other_threads(bench, trials[0], notes)
    result.losses = {trial.label: trial.losses for trial in trials}
    result.weights = {trial.label: digest(trial.last)[:8] for trial in trials}
    return replace(result, notes=notes)


def _trial(bench: Bench, label: str, *args: Any, **kwargs: Any) -> Trial:
    trial: Trial = said(label, lambda: bench.run(label, *args, **kwargs))
    return trial


def _first_step(trials: list[Trial]) -> int | None:
    for step, losses in enumerate(zip(*(trial.losses for trial in trials), strict=True), 1):
        if len(set(map(repr, losses))) > 1:
            return step
    return None


def _verdict(bench: Bench, trials: list[Trial], result: Audit) -> str:
    steps = _counted(bench.steps, "step")
    numbers = sorted({trial.num_workers for trial in trials})
    same = f"{RUNS} runs and workers {', '.join(map(str, numbers))} gave the same bits for {steps}"
    if result.ok:
        return f"reproducible: {same}."
    bits: list[Any] = [trial.bits for trial in trials]
    if all(one == bits[0] for one in bits):
        return f"not reproducible: {same}, but a resumed run would not."
    if result.step is not None:
        what = f"step {result.step}"
        bits = [repr(trial.losses[result.step - 1]) for trial in trials]
    else:
        what = f"the weights after step {bench.steps}"
    others = [trial.label for trial, one in zip(trials, bits, strict=True) if one != bits[0]]
    if others[0] not in [f"run {number}" for number in range(1, RUNS + 1)]:
        return (
            f"not reproducible: {what} differs between {RUNS} runs as they are and {', '.join(others)}."
        )
    return f"not reproducible: {what} differs between {trials[0].label} and {', '.join(others)}."


def _with_other_threads(bench: Bench, first: Trial, notes: list[str]) -> list[Trial]:
    now = torch.get_num_threads()
    other = 1 if now > 1 else 2
    trial = _trial(bench, _counted(other, "thread"), threads=other)
    if trial.bits != first.bits:
        notes.append(
            f"Note: another number of CPU threads, {other} for {now}, gives other last bits. "
            "That is arithmetic and no fault; keep the number to resume exactly."
        )
    return [trial]


def _after_training(bench: Bench, trials: list[Trial]) -> str:
    """Return the cause that shows only by training: go from what comes first in a step to the last."""
    first = trials[0]
    for trial in trials[1:]:
        if unequal := _unequal(first.first, trial.first):
            return _of_weights(bench, unequal)
        if trial.order != first.order:
            return _of_order(bench)
    if any(trial.samples != first.samples for trial in trials[1:RUNS]):
        return f"The samples differ between equal runs.\n{_asked(bench)}{DRAW}"
    for trial in trials[RUNS:]:
        if trial.samples != first.samples:
            return (
                f"The samples depend on the worker that reads them: with {trial.label} they are others "
                f"than with {first.num_workers}.\n{_asked(bench)}"
                f"A sample must be a function of its index and of keyed randomness. {DRAW}"
            )
    return _of_operation(bench)


def _asked(bench: Bench) -> str:
    """Return the lines of the data set that ask who or when it is, as they are when it is read."""
    fresh = bench.fresh()
    indices = [int(index) for index in fresh.order(0)[: fresh.batch_size]]
    seen = watch(partial(_read, bench, fresh, 0, indices), train=fresh.task.train)
    found = seen.places + seen.entropy + seen.others
    if fresh.source.worker_init is not None:
        found.append("the DataLoader's worker_init_fn, which changes what a worker holds")
    return f"  {_few(found)}\n" if found else ""


def _of_operation(bench: Bench) -> str:
    """Name the operation that gives other bits each time, as far as torch can."""
    what = "The samples and the first weights are equal, but an operation gives other bits each time"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        equal = _is_cured(bench, lambda: torch.use_deterministic_algorithms(True, warn_only=True))
    if names := dict.fromkeys(m[1] for w in caught if (m := UNSURE.search(str(w.message)))):
        return f"{what}: {_few([*names])}, of which torch has no deterministic form. Replace it."
    if equal:
        cudnn = _is_cured(bench, lambda: setattr(torch.backends.cudnn, "deterministic", True))
        line = "torch.backends.cudnn.deterministic = True" if cudnn else ""
        which = "cuDNN's convolutions" if cudnn else "one that has a deterministic form too"
        line = line or "torch.use_deterministic_algorithms(True)"
        return f"{what}: {which}.\nWrite into build: {line}, with which {RUNS} runs were equal."
    return (
        f"{what}; torch names none.\nLook in the model, the loss and the optimizer for what draws, "
        "counts or caches outside of torch."
    )


def _is_cured(bench: Bench, cure: Callable[[], object]) -> bool:
    with undisturbed():
        cure()
        first = bench.run("first").bits
        return all(bench.run("again").bits == first for _ in range(RUNS - 1))
