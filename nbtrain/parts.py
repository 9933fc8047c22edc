"""What is alive, to a snapshot and back: the model, the optimizer, the history, the user's parts.

Putting back checks first and touches nothing until everything fits: names, shapes and dtypes of the
model, class and groups of the optimizer, the set of parts. The learning rate is not restored here: it
is written before each step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbtrain import schedulers, trees
from nbtrain.errors import CheckpointError, NbtrainWarning, explain
from nbtrain.history import History
from nbtrain.task import Task

MISFIT = "Build the session as it was, or give the new one another name; the checkpoint is untouched."


class Start:
    """The start of a window: what a forward pass may change, kept until the window is done.

    What is trained does not change inside a window, so with the buffers (BatchNorm's running
    statistics), the parts, and frozen parameters that the user's step moves, such as a teacher's, this
    is all that it takes to go back.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        # Owners and not tensors: a module may bind a new tensor to a buffer's name in forward.
        self._owners = {
            f"{prefix}.{name}".lstrip("."): (module, name)
            for prefix, module in task.model.named_modules(remove_duplicate=False)
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        self._kept = [buffer.detach().clone() for buffer in self._live()]
        self._parts: dict[str, Any] = {}
        named = task.model.named_parameters(remove_duplicate=False)
        self._frozen = {name: p for name, p in named if not p.requires_grad}
        self._versions: dict[str, int] = {}
        self._moving: dict[str, Tensor] = {}

    def mark(self) -> None:
        """Remember this moment."""
        self._mark_frozen()
        if self._kept:
            torch._foreach_copy_(self._kept, self._live())
        for name, part in self._task.parts.items():
            tensors: dict[str, Tensor] = {}
            self._parts[name] = tensors, trees.flatten(part.state_dict(), f"parts/{name}", tensors)

    def go_back(self) -> None:
        """Make the model and the parts what they were, and drop the window's gradients."""
        if self._kept:
            torch._foreach_copy_(self._live(), self._kept)
        for name, kept in self._moving.items():
            self._frozen[name].detach().copy_(kept)
        for name, (tensors, tree) in self._parts.items():
            self._task.parts[name].load_state_dict(trees.restore(tree, tensors))
        self._task.optimizer.zero_grad(set_to_none=True)

    def _mark_frozen(self) -> None:
        for name, parameter in self._frozen.items():
            before = self._versions.get(name)
            if before is None:  # in the first window any of them may move: on the CPU they cost nothing
                self._moving[name] = parameter.detach().to("cpu", copy=True)
            elif before != parameter._version:
                self._moving[name] = parameter.detach().clone()
            else:
                self._moving.pop(name, None)
            self._versions[name] = parameter._version

    def _live(self) -> list[Tensor]:
        found = (module._buffers[name] for module, name in self._owners.values())
        return [buffer.detach() for buffer in found if buffer is not None]

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The model's buffers, and what moves of its frozen parameters, as they were."""
        return self._moving | dict(zip(self._owners, self._kept, strict=True))

    @property
    def parts(self) -> Mapping[str, Any]:
        """The parts as they were: (tensors, tree) by name."""
        return self._parts


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
    state = dict(task.model.state_dict())
    if start is not None:
        state.update({n: b for n, b in start.buffers.items() if n in state})
    same = tied(state)
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
    _check_model(state, here)
    if "tied" in found:  # an older nbtrain did not write it down
        _check_same("The model ties other weights to each other.", found["tied"], tied(here))
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
        _check_model(ema, task.ema.state_dict(), "EMA")
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


def _check_model(there: Mapping[str, Any], here: Mapping[str, Any], which: str = "model") -> None:
    for name in [*there, *here]:
        sides = [form(side, name) for side in (there, here)]
        if sides[0] != sides[1]:
            hint = ", and fresh=[...] of the Task does not name it" if which == "model" else ""
            what = f"The {which} does not fit at {name!r}{hint}."
            raise CheckpointError(explain(what, checkpoint=sides[0], session=sides[1], way_out=MISFIT))


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
    for number, (before, group) in enumerate(zip(built, optimizer.param_groups, strict=True)):
        for name in before.keys() - {"lr", "initial_lr"} - schedulers.written(group):
            if name in group and group[name] != before[name]:
                what = f"{name} of the optimizer's group {number}"
                _tell_kept(what, group[name], before[name], "session.task.optimizer.param_groups")
    # load_state_dict casts moments to the parameter's dtype, where float32 ones under bf16 lose bits,
    # and fused kernels walk through parameter and moments alike: their strides have to agree.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        parameter, live = parameters[index], optimizer.state[parameters[index]]
        for name, value in saved.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                live[name] = torch.empty_like(parameter, dtype=value.dtype).detach().copy_(value)
            elif isinstance(value, Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device)
