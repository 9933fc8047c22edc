"""A file named PAUSE or STOP is an order, once; it is gone when it is obeyed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from nbtrain.lines import Lines
from nbtrain.orders import OrderFiles, Orders


class Loop:
    """What is told of files: trains until it was asked so often whether it does."""

    def __init__(self, num_looks: int = 10**9) -> None:
        self.name, self.lines, self.heard = "tiny", Lines(shown=False), list[str]()
        self.ended = threading.Event()
        self._left = num_looks

    @property
    def state(self) -> str:
        self._left -= 1
        if self._left < 0:
            self.ended.set()
        return "stopped" if self._left < 0 else "running"

    def halt(self, reason: str) -> None:
        self.heard.append(reason)


LOOP = Loop()


def files(*folders: Path) -> OrderFiles:
    return OrderFiles(folders, LOOP)


def test_each_order_is_taken_once_from_any_of_the_folders(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    looking = files(tmp_path / "far", tmp_path / "near")
    assert looking.take() == []
    (tmp_path / "near" / "PAUSE").touch()
    (tmp_path / "near" / "stop").touch()  # another name
    assert looking.take() == [tmp_path / "near" / "PAUSE"]
    assert looking.take() == []
    assert not (tmp_path / "near" / "PAUSE").exists()


def test_a_file_that_cannot_be_removed_is_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(self)

    path = tmp_path / "STOP"
    path.touch()
    looking = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert [looking.take(), looking.take()] == [[path], []]
    path.unlink()
    assert looking.take() == []
    path.touch()
    assert looking.take() == [path]


def test_what_lies_there_from_before_is_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbtrain.orders.LOOK_EVERY_S", 0.01)
    (tmp_path / "STOP").touch()
    loop = Loop(num_looks=4)
    OrderFiles([tmp_path], loop).start()
    assert loop.ended.wait(10)
    assert loop.heard == []
    assert not (tmp_path / "STOP").exists()


def test_a_loop_that_is_gone_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbtrain.orders.LOOK_EVERY_S", 0.01)
    loop = Loop()
    looking = OrderFiles([tmp_path], loop)
    looking.start()
    thread = looking._thread
    assert thread is not None
    del loop
    thread.join(10)
    assert not thread.is_alive()


def test_orders_wait_for_a_boundary_and_are_done_at_once_where_nobody_trains() -> None:
    orders, done = Orders(), list[str]()
    orders.give("set", lambda: done.append("now"))
    orders.wait = True
    orders.give("set", lambda: done.append("later"))
    assert (done, orders.asked) == (["now"], "set")
    orders.close()
    orders.give("set", lambda: done.append("after"))
    assert (done, orders.asked) == (["now", "later", "after"], "")
