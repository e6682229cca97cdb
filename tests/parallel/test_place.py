"""What can be seen of another process."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from megalm.parallel.place import Fate, fate, own_place, spell_place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")


def soon(place: dict[str, object], expected: Fate | None) -> bool:
    deadline = time.monotonic() + 5
    while fate(place) != expected and time.monotonic() < deadline:
        time.sleep(0.005)
    return fate(place) == expected


def test_a_process_and_its_end() -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(100)
        os._exit(0)
    place = {**own_place(), "process": pid}
    assert soon(place, None)
    os.kill(pid, signal.SIGSTOP)
    assert soon(place, "suspended")
    os.kill(pid, signal.SIGKILL)
    assert soon(place, "gone"), "a process whose parent has not asked for its status yet"
    os.waitpid(pid, 0)
    assert fate(place) == "gone"
    assert fate({**place, "host": "elsewhere"}) is None
    assert fate({**place, "space": "pid:[1]"}) is None
    assert fate(None) is None
    assert spell_place({**place, "host": "node4"}) == f"process {pid} on node4"
