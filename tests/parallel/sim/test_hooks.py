"""The canary: what simulated groups need of torch's private parts is there; and what they change is put back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megalm.parallel.sim import run_simulated
from megalm.parallel.sim.errors import HooksError
from megalm.parallel.sim.torch_hooks import broken_hooks


def test_this_torch_has_all_that_is_needed() -> None:
    assert broken_hooks() == []


def test_a_hook_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._distributed_c10d, "_set_thread_isolation_mode")
    monkeypatch.delattr(c10d._World, "pg_names")
    (state, isolation) = broken_hooks()
    assert state == f"torch {torch.__version__}: distributed_c10d._World has no pg_names"
    assert isolation.startswith(
        f"torch {torch.__version__}: torch._C._distributed_c10d has no _set_thread_isolation_mode"
    )
    with pytest.raises(HooksError, match="_World has no pg_names"):
        run_simulated(lambda parallel: None)


def test_state_that_torch_adds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10d._World, "novelty", property(lambda self: 1), raising=False)
    (line,) = broken_hooks()
    assert "has a new property novelty" in line


def test_state_under_another_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10d, "_world", object())
    (line,) = broken_hooks()
    assert "distributed_c10d._world is not a _World" in line


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    def rank(parallel: object) -> int:
        if fails and dist.get_rank() == 1:
            raise ValueError("on purpose")
        return dist.get_world_size()

    world, hook, threads = c10d._world, sys.excepthook, torch.get_num_threads()
    if fails:
        with pytest.raises(ValueError, match="on purpose"):
            run_simulated(rank, dp=2)
    else:
        assert run_simulated(rank, dp=2) == [2, 2]
    assert c10d._world is world
    assert sys.excepthook is hook
    assert torch.get_num_threads() == threads
    assert not dist.is_initialized()
    assert run_simulated(rank, dp=1) == [1]


def test_a_real_group_of_the_caller_is_left_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert run_simulated(lambda parallel: (dist.get_rank(), dist.get_world_size()), dp=2) == [(0, 2), (1, 2)]
        assert dist.get_world_size() == 1
        x = torch.ones(2)
        dist.all_reduce(x)
        assert torch.equal(x, torch.ones(2))
    finally:
        dist.destroy_process_group()


FAKE_TENSORS = """
import os
import threading
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megalm.parallel.sim import run_simulated

def rank(parallel):
    with FakeTensorMode():
        return tuple(torch.empty(2, 3).t().shape)

def runs():
    for _ in range(2):
        assert run_simulated(rank, dp=2) == [(3, 2)] * 2

def backward():
    torch.ones(2, requires_grad=True).sum().backward()

{start}
runs()
backward()
if not (child := os.fork()):
    try:
        backward()
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
print("alive")
"""


@pytest.mark.parametrize("start", ["runs()", "t = threading.Thread(target=runs); t.start(); t.join()"])
def test_fake_tensors_in_one_world_after_another(start: str) -> None:
    """What torch keeps for a process must not end with the thread of a rank; torch 2.11 for CUDA crashed.

    Nor may the process lose the ability to fork, as real ranks in tests need.
    """
    ran = subprocess.run(
        [sys.executable, "-c", FAKE_TENSORS.format(start=start)], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (0, "alive\n"), ran.stderr
