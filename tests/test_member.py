"""A slice is a function of its state, its turn and the seed; and every hyperparameter acts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from herds import Noisy, accuracy
from torch import nn

import nbtrain
from nbtrain import data
from nbtrain.checkpoint import Snapshot
from nbtrain.errors import DataError, TaskError
from nbtrain.journal import SETTINGS
from nbtrain.population import space
from nbtrain.population.evolution import Turn
from nbtrain.population.making import Maker
from nbtrain.population.member import Interval, Member, score_of

CPU = torch.device("cpu")
SPACE = space.read(
    {
        "lr": nbtrain.loguniform(1e-3, 1e-1),
        "momentum": nbtrain.uniform(0.1, 0.9),
        "accumulate": nbtrain.randint(1, 4),
    }
)
VALUES = {"lr": 0.05, "momentum": 0.5, "accumulate": 1}


def build(lr: float = 0.1, momentum: float = 0.9) -> nbtrain.Task:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    slow, fast = model[0].parameters(), model[3].parameters()
    groups = [{"params": slow, "lr": lr / 2}, {"params": fast, "nesterov": True}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    return nbtrain.Task(
        model=model, optimizer=optimizer, train=Noisy(), valid=Noisy(), metrics={"accuracy": accuracy}
    )


def arguments(**changes: Any) -> dict[str, Any]:
    plain = dict.fromkeys(SETTINGS) | {"accumulate": 1, "warmup_epochs": 0, "warmup": "linear"}
    plain |= {"decay": "constant", "milestones": (), "gamma": 0.1, "batch_size": 4}
    return plain | {"num_workers": 0, "seed": 0, "clip_norm": None} | changes


def maker(made: Any = build, domains: Any = SPACE, **changes: Any) -> Maker:
    return Maker(made, domains, arguments(**changes), CPU, None)


def member(id: int = 0, interval: Any = "1 epoch", made: Maker | None = None) -> Member:
    return Member(id, made or maker(), Interval.read(interval))


def turn(round: int = 0, id: int = 0, source: int | None = None, **values: Any) -> Turn:
    return Turn(round, id, source, VALUES | values)


def trained(one: Member) -> Snapshot:
    """Do the slice that was begun; return its end."""
    assert one.train(lambda what: True, lambda what, took_s: None, time.monotonic)
    assert one.validate(lambda what: True) is not None
    end = Snapshot(0, *one.take(), "", {})
    one.finish()
    return end


def first(id: int = 0, **changes: Any) -> Snapshot:
    one = member(id, made=maker(**changes))
    one.begin(turn(id=id), None, 1)
    return trained(one)


def equal(one: Snapshot, other: Snapshot) -> bool:
    both = [one.model | one.tensors, other.model | other.tensors]
    names = [n for n in both[0] if not n.endswith(("seconds", "stage"))]
    same = both[0].keys() == both[1].keys()
    return same and all(torch.equal(both[0][n], both[1][n]) for n in names)


def test_a_slice_again_gives_the_same_bits_in_another_member_object() -> None:
    start = first()
    ends = []
    for _ in range(2):
        one = member()
        torch.manual_seed(torch.seed() % 1000)  # what ran before changes nothing
        one.begin(turn(1, source=0), start, 1)
        ends.append(trained(one))
    assert equal(*ends) and not equal(ends[0], start)


def test_going_on_from_what_is_alive_is_going_on_from_the_state() -> None:
    one = member()
    one.begin(turn(), None, 1)
    start = trained(one)
    one.go_on(turn(1, source=0))
    alive = trained(one)
    other = member()
    other.begin(turn(1, source=0), start, 1)
    assert equal(alive, trained(other))


def test_a_slice_may_be_cut_at_every_boundary() -> None:
    start = first()
    whole = member()
    whole.begin(turn(1, source=0), start, 1)
    expected, cuts = trained(whole), 0
    for num_windows in range(20):
        one = member()
        one.begin(turn(1, source=0), start, 1)
        left = iter(range(num_windows))
        done = one.train(lambda what: next(left, None) is not None, lambda *_: None, time.monotonic)  # noqa: B023
        done = done and one.validate(lambda what: next(left, None) is not None) is not None  # noqa: B023
        if done:
            break
        part = Snapshot(0, *one.take(), "", {})
        other = member()
        other.begin(turn(1, source=0), part, 2)
        assert equal(trained(other), expected), f"cut after {num_windows}"
        cuts += 1
    assert cuts >= 13  # 6 windows, the validation, and 6 batches in it


def test_a_copy_trains_on_from_its_donor_on_batches_of_its_own() -> None:
    start = first()
    ends = []
    for id in (0, 1):
        one = member(id)
        one.begin(turn(1, id, source=0), start, 1)
        assert one.live is not None
        assert equal(Snapshot(0, *one.take(), "", {}), start)
        ends.append(trained(one))
    assert not equal(*ends)


def adam(lr: float = 0.1, momentum: float = 0.9) -> nbtrain.Task:
    task = build(lr, momentum)
    task.optimizer = torch.optim.AdamW(task.model.parameters(), lr=lr, betas=(momentum, 0.99))
    return task


def test_a_state_that_two_go_on_from_is_the_same_for_both() -> None:
    one = member(made=maker(adam))
    one.begin(turn(), None, 1)
    start = trained(one)
    copies = {name: t.clone() for name, t in (start.model | start.tensors).items()}
    for id in (0, 1):
        one = member(id, made=maker(adam))
        one.begin(turn(1, id, source=0), start, 1)
        trained(one)
    assert all(torch.equal(copies[n], t) for n, t in (start.model | start.tensors).items())


def test_a_moved_hyperparameter_acts_in_the_optimizer_and_moments_are_the_donors() -> None:
    one = member(1)
    start = first()
    one.begin(turn(1, 1, source=0, momentum=0.7, lr=0.02), start, 1)
    assert one.live is not None
    groups = one.live.task.optimizer.param_groups
    assert [g["momentum"] for g in groups] == [0.7, 0.7]
    assert [g["lr"] for g in groups] == [0.01, 0.02]
    assert [g["nesterov"] for g in groups] == [False, True]
    moments = one.live.task.optimizer.state_dict()["state"]
    assert torch.equal(
        moments[0]["momentum_buffer"], start.tensors["optimizer/state/0/momentum_buffer"]
    )


def test_the_schedules_peak_follows_a_moved_rate_and_the_journal_tells_it() -> None:
    start = first(warmup_epochs=2)
    one = member(1, made=maker(warmup_epochs=2))
    one.begin(turn(1, 1, source=0, lr=0.02), start, 1)
    assert one.live is not None
    journal = one.live.journal
    assert journal.peak_lr == 0.01 and journal.rates(5.0) == [0.01, 0.02]
    entry = journal.entries[-1]
    assert (entry.what, entry.old, entry.new, entry.by) == (
        "group_lrs",
        [0.025, 0.05],
        [0.01, 0.02],
        "explore",
    )
    again = type(journal).from_state_dict(journal.state_dict())
    assert again.rates(5.0) == journal.rates(5.0) and again.entries == journal.entries
    end = trained(one)
    assert end.state["journal"] == journal.state_dict()


def test_a_rate_that_was_lowered_by_hand_stays_where_the_hyperparameter_did_not_move() -> None:
    one = member()
    one.begin(turn(), None, 1)
    trained(one)
    assert one.live is not None
    one.live.task.optimizer.param_groups[0]["lr"] = 1e-4
    start = Snapshot(0, *one.take(), "", {})
    other = member(1)
    other.begin(turn(1, 1, source=0, momentum=0.3), start, 1)
    assert other.live is not None
    groups = other.live.task.optimizer.param_groups
    assert [(g["lr"], g["momentum"]) for g in groups] == [(1e-4, 0.3), (0.05, 0.3)]


def test_what_build_does_not_take_is_a_setting_of_the_members_journal() -> None:
    start = first()
    one = member(1)
    one.begin(turn(1, 1, source=0, accumulate=3), start, 1)
    assert one.live is not None and one.live.journal.settings["accumulate"] == 3
    window = one.live.next_window()
    assert window is not None and window.num_samples == 12
    entry = one.live.journal.entries[-1]
    assert (entry.what, entry.old, entry.new, entry.by) == ("accumulate", 1, 3, "explore")


def test_a_setting_that_the_cell_changed_is_changed_from_here_on() -> None:
    one = member(made=maker(epochs=9))
    one.begin(turn(1, source=0), first(epochs=3), 1)
    assert one.live is not None
    entry = one.live.journal.entries[-1]
    assert (entry.what, entry.old, entry.new, entry.by) == ("epochs", 3, 9, "cell")


def test_the_first_weights_are_the_same_for_all_and_the_order_is_each_members_own() -> None:
    made = maker()
    one, other = (made.make(id, VALUES) for id in (0, 1))
    pairs = zip(
        one.task.model.state_dict().values(), other.task.model.state_dict().values(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert list(one.order(0)) != list(other.order(0))
    assert one.valid is not None and other.valid is not None
    assert one.valid._torch.dataset.words == other.valid._torch.dataset.words  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "round", "expected"),
    [
        ("1 epoch", 0, (6, 1, 0)),
        ("2 epochs", 0, (12, 2, 0)),
        (0.5, 0, (3, 0, 12)),
        ("4 steps", 0, (4, 0, 16)),
        ("8 steps", 0, (8, 1, 8)),
        ("6 steps", 0, (6, 1, 0)),
    ],
)
def test_an_interval_ends_where_it_says(given: Any, round: int, expected: tuple[int, int, int]) -> None:
    one = member(interval=given)
    one.begin(turn(round), None, 1)
    end = trained(one)
    assert tuple(end.state["place"]) == expected
    one.go_on(turn(1, source=0))
    assert one.live is not None
    trained(one)
    assert one.live.step == 2 * expected[0]
    assert len([row for row in one.live.history.epochs if "valid_loss" in row]) == 2


def test_no_slice_goes_over_the_end_of_the_run() -> None:
    one = member(interval="4 epochs", made=maker(epochs=3))
    one.begin(turn(), None, 1)
    assert trained(one).state["place"] == [18, 3, 0]


@pytest.mark.parametrize("given", ["", "4", "4 hours", "0 epochs", -1, "1.5 steps", None, True, "x y"])
def test_an_interval_without_sense_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"interval=.* cannot be read"):
        Interval.read(given)


def test_an_unknown_hyperparameter_is_refused_with_the_name_that_was_meant() -> None:
    with pytest.raises(ValueError, match=r"'momentun', which build does not take.*'momentum'"):
        maker(domains=space.read({"momentun": [1, 2]}))
    with pytest.raises(ValueError, match="'epochs', which build does not take"):
        maker(domains=space.read({"epochs": [1, 2]}))
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        maker(domains=space.read({"batch_size": nbtrain.randint(0, 8)}))
    taken = maker(lambda **values: build(), space.read({"anything": [1, 2]}))
    assert taken.given == ("anything",) and not taken.settings


def test_data_that_are_split_anew_for_other_hyperparameters_are_refused() -> None:
    def leaking(width: int = 8) -> nbtrain.Task:
        model = nn.Linear(6, 3)
        torch.rand(width)  # as a wider layer draws more
        train, valid = torch.utils.data.random_split(Noisy(), [15, 8])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return nbtrain.Task(model=model, optimizer=optimizer, train=train, valid=valid)

    made = maker(leaking, space.read({"width": [8, 16]}))
    made.make(0, {"width": 8})
    made.make(1, {"width": 8})
    with pytest.raises(DataError, match="splits its data otherwise"):
        made.make(2, {"width": 16})


def test_a_task_without_validation_is_refused() -> None:
    def blind(lr: float = 0.1) -> nbtrain.Task:
        task = build(lr)
        task.valid = None
        return task

    with pytest.raises(TaskError, match=r"Task\(valid=\) is None"):
        maker(blind, space.read({"lr": [0.1, 0.2]})).make(0, {"lr": 0.1})


def test_a_worker_that_was_killed_is_no_fault_of_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    one = member()
    one.begin(turn(), None, 1)
    monkeypatch.setattr(data.Loader, "__next__", killed)
    with pytest.raises(DataError, match="killed by signal"):
        trained(one)


def test_a_metric_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(TaskError, match=r"metric='f1' is not among .* valid_loss, accuracy"):
        score_of({"valid_loss": 1.0, "accuracy": 0.5}, "f1")
    assert score_of({"valid_loss": float("nan")}, "valid_loss") is None
