"""The first signal only leaves a word; what it would have done is done when everything is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import in_fresh_process

from nbtrain.interrupts import Interrupts

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[object]]:
    """Give the handlers as they are, and put them back whatever a test leaves behind."""
    before = [signal.getsignal(number) for number in NUMBERS]
    yield list(before)
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def now() -> list[object]:
    return [signal.getsignal(number) for number in NUMBERS]


def test_without_a_signal_nothing_happens_and_the_handlers_are_back(handlers: list[object]) -> None:
    with Interrupts() as interrupts:
        assert now() != handlers
        assert interrupts.asked is None
    assert now() == handlers


def test_an_interrupt_is_a_word_first_and_a_keyboard_interrupt_at_the_end(
    handlers: list[object],
) -> None:
    said: list[str | None] = []

    def run() -> None:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            said.append(interrupts.asked)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert said == ["interrupt"]
    assert now() == handlers


def test_a_second_interrupt_acts_at_once_unless_it_is_the_same_press(
    handlers: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([10.0, 10.4, 10.8])
    noted: list[str | None] = []
    monkeypatch.setattr("nbtrain.interrupts.time", SimpleNamespace(monotonic=lambda: next(times)))

    def run() -> None:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            noted.append(interrupts.asked)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second press was only noted")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert noted == ["interrupt"]
    assert now() == handlers


def test_an_error_on_the_way_out_is_not_replaced(handlers: list[object]) -> None:
    def run() -> None:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert now() == handlers


def test_a_termination_is_delivered_to_who_waited_for_it_before() -> None:
    got: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked == "terminate"
        assert got == []
    assert got == [signal.SIGTERM]


def test_an_interrupt_after_a_termination_acts_at_once_and_the_termination_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbtrain.interrupts.ONE_PRESS_S", -1.0)
    got: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))

    def run() -> None:
        with Interrupts():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the interrupt was only noted")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert got == [signal.SIGTERM]


def be_terminated(saved: Path) -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        saved.write_text(str(interrupts.asked))
    saved.write_text("went on")


def test_a_termination_ends_the_process_after_it_has_saved(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    assert in_fresh_process(be_terminated, saved) == -signal.SIGTERM
    assert saved.read_text() == "terminate"


def test_one_object_serves_many_runs(handlers: list[object]) -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts:
        signal.raise_signal(signal.SIGINT)
    with interrupts:
        assert interrupts.asked is None
    assert now() == handlers


def test_in_another_thread_it_leaves_the_handlers_alone(handlers: list[object]) -> None:
    inside: list[object] = []
    interrupts = Interrupts()
    with interrupts:
        pass

    def work() -> None:
        with interrupts:
            inside.extend([*now(), interrupts.asked])
        inside.append("left")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [*handlers, None, "left"]


def test_a_handler_from_outside_python_is_replaced_by_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = signal.signal

    def of_c(number: int, handler: Any) -> None:
        real(number, handler)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", of_c)
        with Interrupts():
            pass
    assert now() == [signal.SIG_DFL, signal.SIG_DFL]
