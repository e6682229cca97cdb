"""Notices over a store that may go away at any time, and a watchdog that has lost it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megalm.parallel import board, watchdog
from megalm.parallel.board import Board, BoardGone, within
from megalm.parallel.flight import FlightRecord
from megalm.parallel.watchdog import Watchdog


def test_notices_are_not_held_up_by_who_waits_for_a_key() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine, other = Board(store, "a"), Board(store, "a")

    def wait() -> None:
        with pytest.raises(dist.DistStoreError):
            store.wait(["never"], timedelta(seconds=3))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    began = time.monotonic()
    assert other.read("x") is None
    mine.post("x", {"rank": 1})
    assert other.read("x") == {"rank": 1}
    assert mine.first("y")
    assert not other.first("y")
    assert Board(store, "b").read("x") is None
    assert time.monotonic() - began < 1
    waiting.join()


class Silent:
    """A store whose host has vanished: nothing comes back."""

    def __init__(self) -> None:
        self.asked = 0

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        time.sleep(1000)
        return False


def silent_board(monkeypatch: pytest.MonkeyPatch) -> tuple[Board, Silent]:
    monkeypatch.setattr(board, "PATIENCE", 0.1)
    store = Silent()
    found = Board(dist.HashStore(), "a")
    monkeypatch.setattr(found, "_store", store)
    return found, store


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found, store = silent_board(monkeypatch)
    for _ in range(3):
        with pytest.raises(BoardGone):
            found.read("x")
    assert store.asked == 1


def test_errors_come_out_of_the_other_thread() -> None:
    assert within(1.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(1.0, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(10))


class Exited(BaseException):
    pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a watchdog in this process would print; its end of the process ends the thread alone."""
    found: list[str] = []

    def leave(status: int) -> None:
        found.append(f"exit {status}")
        raise Exited

    def guarded(dog: Watchdog) -> None:
        with contextlib.suppress(Exited):
            dog._watch()

    monkeypatch.setattr(watchdog, "_print", found.append)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(Watchdog, "_guarded", guarded)
    return found


@pytest.mark.parametrize("lost", ["from the start", "on the way"])
def test_a_hang_without_a_store_is_reported_by_each_rank_alone(
    monkeypatch: pytest.MonkeyPatch, told: list[str], lost: str
) -> None:
    def connect() -> Any:
        if lost == "from the start":
            raise BoardGone
        made, _ = silent_board(monkeypatch)
        monkeypatch.setattr(made, "post", lambda key, value: None)
        return made

    flight = FlightRecord()
    dog = Watchdog(flight, rank=1, size=2, board=connect, timeout=0.3)
    dog.start()
    flight.fly(flight.line("tp", (0, 1)), "all_reduce", (), dog._thread.join)
    dog._terminate.remove()
    dog._alert.let_go()
    dog._alert.close()
    report, end = told
    assert report.startswith("megalm: a collective has not completed within 0.3 s")
    assert "store does not answer, so this is what rank 1 alone can say" in report
    assert "waits in all_reduce(), call 1 of group tp [0, 1], for 0." in report
    assert end == "exit 1"


def test_a_watchdog_that_is_stopped_says_nothing(told: list[str]) -> None:
    store = dist.HashStore()
    flight = FlightRecord()
    dog = Watchdog(flight, rank=0, size=2, board=lambda: Board(store, "w"), timeout=0.1)
    dog.start()
    dog.stop()
    assert told == []
    answer = Board(store, "w").read("answer/0")
    assert answer is not None
    assert answer["gone"] == "has ended"
