"""What is alive, to a snapshot and back: the model, the optimizer, the history, the user's parts.

Putting back checks first and touches nothing until everything fits: names, shapes and dtypes of the
model, class and groups of the optimizer, the set of parts. The learning rate is not restored here: it
is written before each step.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbtrain import frozen, schedulers, trees
from nbtrain.errors import CheckpointError, NbtrainWarning, explain
from nbtrain.history import History
from nbtrain.task import Task

MISFIT = "Build the session as it was, or give the new one another name; the checkpoint is untouched."

_built: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


class Start:
    """The start of a window: what may change inside it, kept until the window is done.

    What is trained does not change inside a window, so with the buffers (BatchNorm's running
    statistics), the parts, the weights that an optimizer among the parts steps, and frozen parameters
    that the user's step moves, such as a teacher's, this is all that it takes to go back.

    Which frozen ones move, and what of it stays unseen, says `frozen.Watch`.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._owners = task, owners(task.model)
        as_built(task.model)
        self._kept: dict[str, Tensor | None] = {}
        self._parts: dict[str, Any] = {}
        found = [p for p in task.parts.values() if isinstance(p, torch.optim.Optimizer)]
        self._optimizers = [optimizer for optimizer in found if optimizer is not task.optimizer]
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        stepped = {id(p) for group in groups for p in group["params"]}
        self._parameters = dict(task.model.named_parameters(remove_duplicate=False))
        self._moving = {name for name, p in self._parameters.items() if id(p) in stepped}
        named = self._parameters.items()
        still = {n: p for n, p in named if not p.requires_grad and n not in self._moving}
        self._watch = frozen.Watch(still)
        self._copies: dict[str, Tensor] = {}

    def mark(self) -> None:
        """Remember this moment."""
        self._moving |= self._watch.look()
        self._copies = {name: self._parameters[name].detach().clone() for name in self._moving}
        to, of = [], []
        for name, buffer in self._live():
            kept = self._kept.get(name)
            if buffer is None or kept is None or not _fits(kept, buffer):
                self._kept[name] = None if buffer is None else buffer.clone()
            else:
                to.append(kept)
                of.append(buffer)
        if to:
            torch._foreach_copy_(to, of)
        for name, part in self._task.parts.items():
            tensors: dict[str, Tensor] = {}
            self._parts[name] = tensors, trees.flatten(part.state_dict(), f"parts/{name}", tensors)

    def go_back(self) -> None:
        """Make the model and the parts what they were, and drop the window's gradients."""
        to, of = [], []
        for name, buffer in self._live():
            kept = self._kept[name]
            if buffer is None or kept is None or not _fits(kept, buffer):
                module, own = self._owners[name]
                module._buffers[own] = None if kept is None else kept.clone()
            else:
                to.append(buffer)
                of.append(kept)
        if to:
            torch._foreach_copy_(to, of)
        for name, copied in {**self._copies, **self._watch.copies}.items():
            self._parameters[name].detach().copy_(copied)
        self._watch.go_back()
        for name, (tensors, tree) in self._parts.items():
            self._task.parts[name].load_state_dict(trees.restore(tree, tensors))
        for optimizer in (self._task.optimizer, *self._optimizers):
            optimizer.zero_grad(set_to_none=True)

    def _live(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, (module, own) in self._owners.items():
            buffer = module._buffers[own]
            yield name, None if buffer is None else buffer.detach()

    @property
    def buffers(self) -> Mapping[str, Tensor | None]:
        """The model's buffers, and what may move of its parameters, as they were."""
        return {**self._copies, **self._watch.copies, **self._kept}

    @property
    def parts(self) -> Mapping[str, Any]:
        """The parts as they were: (tensors, tree) by name."""
        return self._parts


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return who holds each buffer, and under which name.

    Owners and not tensors: a module may bind another tensor to a buffer's name in forward, or None.
    """
    return {
        f"{prefix}.{name}".lstrip("."): (module, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers
    }


def as_built(model: nn.Module) -> dict[str, str]:
    """Return the forms that the buffers in a model's state_dict had when it was first seen here.

    One that is bound in forward may be "None" then, and have another form ever after.
    """
    if model not in _built:
        state, forms = model.state_dict(), {}
        for name, (module, own) in owners(model).items():
            if name in state:
                forms[name] = form(state, name)
            elif module._buffers[own] is None and own not in module._non_persistent_buffers_set:
                forms[name] = "None"
        _built[model] = forms
    return _built[model]


def bound(model: nn.Module, found: Mapping[str, Any]) -> set[str]:
    """Return the names of the buffers whose form forward has changed, there or here."""
    here, forms = model.state_dict(), as_built(model)
    is_same = {n for n, was in forms.items() if was == (form(here, n) if n in here else "None")}
    return {*(forms.keys() - is_same), *found.get("built", {})}


def take(
    task: Task, history: History, start: Start | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Copy everything to the CPU: (the model's tensors, other tensors, the trees they hang on).

    Args:
        task: What is alive.
        history: Its rows.
        start: The start of the window that is under way, if one is: the copy is of that moment.
    """
    model: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    state, forms = dict(task.model.state_dict()), as_built(task.model)
    same = tied(state)
    for name, kept in {} if start is None else start.buffers.items():
        if kept is None:
            state.pop(name, None)
        elif name in state or name in forms:
            state[name] = kept
    same = {name: first for name, first in same.items() if name in state and first in state}
    held = {name: trees.flatten(v, name, model) for name, v in state.items() if name not in same}
    found = {
        "model": {name: held[same.get(name, name)] for name in state},
        "tied": same,
        "optimizer_names": parameter_names(task),
        "optimizer": trees.flatten(task.optimizer.state_dict(), "optimizer", tensors),
        "optimizer_class": type(task.optimizer).__name__,
        "history": trees.flatten(history.state_dict(), "history", tensors),
        "scheduler_class": _scheduler_class(task),
        "parts": {},
    }
    if grown := {n: was for n, was in forms.items() if n in state and was != form(state, n)}:
        found["built"] = grown
    if task.ema is not None:
        found["ema"] = trees.flatten(task.ema.state_dict(), "ema", tensors)
    for name, part in task.parts.items():
        if start is not None:
            copies, found["parts"][name] = start.parts[name]
            tensors.update(copies)
        else:
            path = f"parts/{name}"
            found["parts"][name] = trees.flatten(part.state_dict(), path, tensors)
    return model, tensors, found


def tied(state: Mapping[str, Any]) -> dict[str, str]:
    """Return which names are another name of a tensor that came before, and of which."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
            place = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype
            if first.setdefault(place, name) != name:
                found[name] = first[place]
    return found


def spoilt(model: nn.Module) -> str | None:
    """Return the name of a trained weight that is not finite; None where all are."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    # A sum is finite only where all are, and needs no copy; one that is not may be too large merely.
    sums = [p.sum() for p in trained.values()]
    if not sums or torch.stack(sums).isfinite().all():
        return None
    return next((name for name, p in trained.items() if not p.isfinite().all()), None)


def parameter_names(task: Task) -> list[list[str | None]]:
    """Return the names of what the optimizer's groups hold; None is no parameter of the model."""
    names = {id(p): name for name, p in task.model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in task.optimizer.param_groups]


def put(
    task: Task,
    history: History,
    model: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    found: Mapping[str, Any],
) -> None:
    """Make everything what it was when it was taken.

    Raises:
        CheckpointError: something does not fit; says what on each side. Nothing was changed.
    """
    state = weights(model, found)
    here = task.model.state_dict()
    _check_model(_forms(state) | found.get("built", {}), _forms(here) | as_built(task.model))
    if "tied" in found:  # an older nbtrain did not write it down
        _check_ties(found["tied"], tied(here), bound(task.model, found))
    _check_same(
        "The optimizer is of another class.",
        found["optimizer_class"],
        type(task.optimizer).__name__,
    )
    there = found.get("scheduler_class", _scheduler_class(task))
    _check_same("The scheduler is of another class.", there, _scheduler_class(task))
    _check_same("The parts are others.", sorted(found["parts"]), sorted(task.parts))
    sides = [f"{'an' if there else 'no'} EMA" for there in ("ema" in found, task.ema is not None)]
    _check_same("There is no EMA on both sides.", *sides)
    ema = {} if task.ema is None else trees.restore(found["ema"], tensors)
    if task.ema is not None:
        _check_model(_forms(ema), _forms(task.ema.state_dict()), "EMA")
    built = {} if task.scheduler is None else schedulers.options(task.scheduler)
    if task.scheduler is not None:
        kept = trees.restore(found["parts"]["scheduler"], tensors)
        sizes = [len(each.get("base_lrs", ())) for each in (kept, task.scheduler.state_dict())]
        _check_same("The scheduler was made for another number of groups.", *sizes)
    optimizer = trees.restore(found["optimizer"], tensors)
    _check_same(
        "The optimizer's groups hold other numbers of parameters. Where some were unfrozen or added, "
        'Task(fresh=["their.names.*"]) says so.',
        [len(group["params"]) for group in optimizer["param_groups"]],
        [len(group["params"]) for group in task.optimizer.param_groups],
    )
    _make_room(task.model, state)
    task.model.load_state_dict(state)
    if task.ema is not None:
        task.ema.load_state_dict(ema)
    _put_optimizer(task.optimizer, optimizer)
    history.load_state_dict(trees.restore(found["history"], tensors))
    for name, part in task.parts.items():
        part.load_state_dict(trees.restore(found["parts"][name], tensors))
    for name, value in {} if task.scheduler is None else schedulers.options(task.scheduler).items():
        if value != built[name]:
            what = f"{name} of the {type(task.scheduler).__name__}"
            _tell_kept(what, value, built[name], "session.task.scheduler")


def weights(model: Mapping[str, Tensor], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's state_dict as it was taken."""
    state: dict[str, Any] = trees.restore(found["model"], model)
    return state


def model_of(
    task: Task, model: Mapping[str, Tensor], tensors: Mapping[str, Tensor], found: Mapping[str, Any]
) -> nn.Module:
    """Return a copy of a task's model with the weights that were taken: its EMA's, where it has one."""
    made = copy.deepcopy(task.validated.model)
    state = weights(model, found)
    if task.ema is not None:
        ema = trees.restore(found["ema"], tensors)
        state = {n.removeprefix("module."): v for n, v in ema.items() if n.startswith("module.")}
    _make_room(made, state)
    made.load_state_dict(state)
    return made


def _scheduler_class(task: Task) -> str | None:
    return None if task.scheduler is None else type(task.scheduler).__name__


def _tell_kept(what: str, there: object, here: object, where: str) -> None:
    warnings.warn(
        explain(
            f"{what} is the checkpoint's.",
            checkpoint=there,
            session=here,
            way_out=f"To change it, set it in {where}.",
        ),
        NbtrainWarning,
        stacklevel=3,
    )


def _check_same(what: str, there: object, here: object) -> None:
    if there != here:
        raise CheckpointError(explain(what, checkpoint=there, session=here, way_out=MISFIT))


def _check_model(there: Mapping[str, str], here: Mapping[str, str], which: str = "model") -> None:
    for name in [*there, *here]:
        sides = [side.get(name, "absent") for side in (there, here)]
        if sides[0] != sides[1] and sides != ["absent", "None"]:  # which holds nothing either
            hint = ", and fresh=[...] of the Task does not name it" if which == "model" else ""
            what = f"The {which} does not fit at {name!r}{hint}."
            raise CheckpointError(explain(what, checkpoint=sides[0], session=sides[1], way_out=MISFIT))


def _check_ties(there: Mapping[str, str], here: Mapping[str, str], apart: set[str]) -> None:
    sides = [{n: first for n, first in side.items() if n not in apart} for side in (there, here)]
    _check_same("The model ties other weights to each other.", *sides)


def _forms(state: Mapping[str, Any]) -> dict[str, str]:
    return {name: form(state, name) for name in state}


def _make_room(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let the buffers that forward binds be such that a state, which was checked, can be loaded."""
    here, device = model.state_dict(), next(model.parameters()).device
    for name, (module, own) in owners(model).items():
        value = state.get(name)
        if value is None and name in here:
            module._buffers[own] = None
        elif isinstance(value, Tensor) and form(state, name) != form(here, name):
            module._buffers[own] = torch.empty_like(value, device=device)


def _fits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def form(state: Mapping[str, Any], name: str) -> str:
    """Return what must be the same of a value in a model's state_dict, in words."""
    if name not in state:
        return "absent"
    value = state[name]
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _put_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    built = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    schedulers.restored(optimizer)
    for number, (before, group) in enumerate(zip(built, optimizer.param_groups, strict=True)):
        for name in before.keys() - {"lr", "initial_lr"} - schedulers.written(group):
            if name in group and group[name] != before[name]:
                what = f"{name} of the optimizer's group {number}"
                _tell_kept(what, group[name], before[name], "session.task.optimizer.param_groups")
    # load_state_dict casts moments to the parameter's dtype, where float32 ones under bf16 lose bits,
    # and fused kernels walk through parameter and moments alike: their strides have to agree.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {index: kept for index, kept in state["state"].items() if isinstance(index, int)}
    for index, saved in held.items():  # what has another key is no parameter's, and is put as it is
        parameter, live = parameters[index], optimizer.state[parameters[index]]
        for name, value in saved.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                live[name] = torch.empty_like(parameter, dtype=value.dtype).detach().copy_(value)
            elif isinstance(value, Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device)
