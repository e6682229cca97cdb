"""The record of one process's operations."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch

from megalm.parallel.flight import KEPT, CollectiveError, FlightRecord
from megalm.parallel.phase import phase, phases


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Mark:
    """A place on a device's stream."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def flight(clock: Clock) -> FlightRecord:
    return FlightRecord(clock)


def test_an_operation_is_open_while_its_call_lasts(flight: FlightRecord, clock: Clock) -> None:
    line = flight.line("tp", (0, 1))
    assert flight.line("tp", (0, 1)) is line
    assert flight.line("dp", (0, 1)) is not line
    seen: list[dict[str, Any]] = []

    def call() -> None:
        clock.now = 5.0
        assert flight.open_since() == 2.0
        seen.append(json.loads(json.dumps(flight.told())))

    flight.fly(line, "barrier", (), lambda: None)
    clock.now = 2.0
    with phase("step 1"):
        flight.fly(line, "all_reduce", (("dtype", torch.float64), ("shape", (2, 3))), call)
    assert flight.open_since() is None
    (told,) = seen
    assert told["groups"] == [["tp", [0, 1], 2], ["dp", [0, 1], 0]]
    (opened,) = told["open"]
    assert (opened["call"], opened["age"], opened["phases"]) == (2, 3.0, ["step 1"])
    assert opened["about"] == {"dtype": "float64", "shape": "[2, 3]"}
    assert opened["frames"][0].startswith("test_flight.py:")
    assert [(item["call"], item["kind"], item["age"]) for item in told["recent"]] == [(1, "barrier", 5.0)]


def test_queued_operations_are_over_when_the_stream_has_passed_them(flight: FlightRecord, clock: Clock) -> None:
    """The time of one that waits in the queue begins when those in front of it are over."""
    line, marks = flight.line("tp", (0, 1)), [Mark() for _ in range(3)]
    for mark in marks:
        clock.now += 1
        flight.fly(line, "all_reduce", (), lambda: None, lambda mark=mark: mark)  # type: ignore[misc]
    assert flight.open_since() == 1.0
    marks[0].passed = True
    clock.now = 50.0
    assert flight.open_since() == 50.0
    clock.now = 60.0
    assert flight.open_since() == 50.0
    assert [item["queued"] for item in flight.told()["open"]] == [True, True]
    marks[1].passed = marks[2].passed = True
    assert flight.open_since() is None


def test_a_device_that_failed_is_no_end_of_an_operation(flight: FlightRecord) -> None:
    class Broken:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    flight.fly(flight.line("tp", (0, 1)), "all_reduce", (), lambda: None, Broken)
    assert flight.open_since() is not None


def test_failures(flight: FlightRecord) -> None:
    line = flight.line("tp", (0, 1))

    def closed() -> None:
        raise RuntimeError("connection closed")

    with pytest.raises(CollectiveError, match=r"all_gather\(shape \[3\]\), call 1 of group tp \[0, 1\], failed: conn"):
        flight.fly(line, "all_gather", (("shape", (3,)),), closed)
    (opened,) = flight.told()["open"]
    assert opened["error"] == "connection closed"
    assert "test_failures" in opened["frames"][0]

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flight.fly(line, "all_gather", (), interrupted)
    assert len(flight.told()["open"]) == 1


def test_the_past_is_remembered_up_to_a_point(flight: FlightRecord) -> None:
    line = flight.line("tp", (0, 1))
    for _ in range(KEPT + 5):
        flight.fly(line, "all_reduce", (), lambda: None)
    assert [item["call"] for item in flight.told()["recent"]] == list(range(6, KEPT + 6))


def test_threads_of_backward_work_under_the_labels_of_who_called_it(flight: FlightRecord) -> None:
    line = flight.line("tp", (0, 1))

    def other_thread() -> None:
        assert phases() == ()
        flight.fly(line, "all_reduce", (), lambda: None)

    with phase("step 4"), phase("backward"):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert flight.told()["recent"][0]["phases"] == ["step 4", "backward"]
    assert flight.told()["phases"] == []


def test_labels_are_those_of_a_thread() -> None:
    with phase("outer"):
        with phase("inner"):
            assert phases() == ("outer", "inner")
        found: list[tuple[str, ...]] = []
        home = threading.get_ident()
        thread = threading.Thread(target=lambda: found.extend([phases(), phases(home)]))
        thread.start()
        thread.join()
        assert found == [(), ("outer",)]
    assert phases() == ()
