"""The prefetching loader: order, bounds, errors, shutdown."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest

from megalm.data.loader import Loader


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("megalm-rows")]


@pytest.fixture(autouse=True)
def none_left():
    yield
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()


@pytest.mark.parametrize("workers", range(5))
def test_items_come_in_order_whatever_the_workers(workers: int, campaign_seed: int) -> None:
    pause = random.Random(campaign_seed)

    def build(n: int) -> int:
        time.sleep(pause.random() * 1e-3)
        return n * n

    with Loader(build, workers=workers, ahead=3) as loader:
        assert [loader.take(n) for n in range(40, 100)] == [n * n for n in range(40, 100)]
        assert [loader.take(n) for n in (7, 8, 3, 3, 90, 4)] == [49, 64, 9, 9, 8100, 16]


def test_it_builds_ahead_and_no_further() -> None:
    built: list[int] = []
    with Loader(lambda n: built.append(n) or n, workers=2, ahead=5) as loader:
        loader.take(0)
        deadline = time.monotonic() + 5
        while len(built) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(built) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_an_error_comes_where_its_item_would(workers: int) -> None:
    def build(n: int) -> int:
        if n == 5:
            raise LookupError("row 5 is bad")
        return n

    with Loader(build, workers=workers, ahead=8) as loader:
        assert [loader.take(n) for n in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(LookupError, match="row 5 is bad") as caught:
            loader.take(5)
        assert 'raise LookupError("row 5 is bad")' in "".join(traceback.format_exception(caught.value))
        assert not alive()


def test_a_loader_let_go_ends_its_threads() -> None:
    loader = Loader(lambda n: n, workers=3, ahead=2)
    loader.take(0)
    assert len(alive()) == 3
    del loader
    gc.collect()


def test_a_closed_loader_says_so() -> None:
    loader = Loader(lambda n: n, workers=1, ahead=2)
    loader.take(0)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.take(1)


def test_what_it_cannot_do() -> None:
    for workers, ahead in ((-1, 1), (65, 1), (1, 0)):
        with pytest.raises(ValueError, match="workers"):
            Loader(lambda n: n, workers=workers, ahead=ahead)


@pytest.mark.parametrize("slow", ["build", "use"])
def test_an_interrupt_ends_the_process(slow: str) -> None:
    """Whether it comes while a row is waited for or while another is used; threads that build never hold it up."""
    code = f"""
import time
from megalm.data.loader import Loader
def build(n):
    if {slow!r} == "build" and n: time.sleep(1000)
    return n
loader = Loader(build, workers=2, ahead=4)
loader.take(0)
print("ready", flush=True)
loader.take(1)
time.sleep(1000)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
