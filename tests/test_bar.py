"""One line says loss, rate, and what is left; it is drawn as often as somebody can look."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nbtrain import bar
from nbtrain.bar import BATCH_PERIOD_S, PERIOD_S, Bar, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bar, "time", SimpleNamespace(monotonic=clock))
    return clock


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.split("\r")[-1]


def make(*, done: int = 0, is_batch: bool = False, is_shown: bool = True) -> Bar:
    # Wide enough for the whole line, whatever terminal the tests run in.
    made = Bar("cifar", done, 4000, is_batch=is_batch, shown=is_shown)
    made._tqdm.dynamic_ncols = None
    made._tqdm.ncols = 200
    return made


def test_the_line_says_loss_rate_and_what_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    line = make(done=1000)
    line.show(1500, 2, 600, 0.123456, 0.0125, 50.0, 32400.0)
    text = shown(capsys)
    assert text.startswith("cifar:")
    assert "1.50k/4.00k" in text
    assert "loss 0.1235, lr 0.0125, epoch 2 ends in 12s, budget 9h00m" in text
    line.close()


def test_before_the_first_window_the_end_is_not_known(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    line = make(done=1000)
    line.show(1000, 2, 600, float("nan"), 0.1, 0.0, float("inf"))
    assert "loss -, lr 0.1, epoch 2 ends in ?, budget no limit" in shown(capsys)
    line.close()


def test_the_pace_is_that_of_the_last_half_minute() -> None:
    pace = Pace()
    assert pace.per_s == 0.0
    for now, num_seen in ((0.0, 0), (20.0, 100), (40.0, 1100), (50.0, 1600)):
        pace.add(now, num_seen)
    assert pace.per_s == 50.0


def test_back_at_an_older_checkpoint_no_speed_is_told() -> None:
    pace = Pace()
    pace.add(0.0, 1000)
    pace.add(10.0, 500)
    assert pace.per_s == 0.0


@pytest.mark.parametrize(("is_batch", "period_s"), [(False, PERIOD_S), (True, BATCH_PERIOD_S)])
def test_the_line_is_due_again_after_its_period(clock: Clock, is_batch: bool, period_s: float) -> None:
    line = make(is_batch=is_batch)
    assert line.is_due()
    line.show(1, 1, 1, 0.5, 0.1, 1.0, float("inf"))
    clock.now += period_s * 0.99
    assert not line.is_due()
    clock.now += period_s * 0.02
    assert line.is_due()
    line.close()


def test_a_line_that_is_not_wanted_draws_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_batch in (False, True):
        line = make(is_shown=False, is_batch=is_batch)
        line.show(100, 1, 5, 0.5, 0.1, 50.0, float("inf"))
        line.close()
    out = capsys.readouterr()
    assert out.out + out.err == ""


def test_where_nobody_watches_there_are_lines_and_no_bar(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    line = make(is_batch=True)
    line.show(1500, 2, 600, 0.123456, 0.0125, 50.0, 32400.0)
    line.close()
    out = capsys.readouterr()
    expected = (
        "cifar: 1500 of 4000 samples, loss 0.1235, lr 0.0125, epoch 2 ends in 12s, budget 9h00m\n"
    )
    assert (out.out, out.err) == (expected, "")


def test_a_run_without_end_has_a_line_too(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    line = Bar("endless", 0, None, is_batch=False, shown=True)
    line.show(10, 1, 5, 0.5, 0.1, 10.0, float("inf"))
    line.close()
    assert "10.0 samples" in shown(capsys)
