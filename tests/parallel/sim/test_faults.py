"""Faults on purpose, and what programs and reports make of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import Fault, SimulatedWorld, run_simulated
from megalm.parallel.sim.errors import DeadlockError, InjectedFault, SimulationError


def program(parallel: ParallelContext) -> list[float]:
    out = []
    for number in range(3):
        x = torch.tensor([1.0 + number + parallel.rank])
        parallel.world.all_gather(x)
        out.append(parallel.world.all_reduce(x).item())
    return out


CORRECT = [[3.0, 5.0, 7.0]] * 2


def test_raise() -> None:
    with pytest.raises(
        InjectedFault, match=r"rank 1 fails, as asked, at its operation 4: all_reduce\(reduction sum"
    ) as caught:
        run_simulated(program, dp=2, faults=[Fault("raise", rank=1, at=4)])
    assert caught.value.__notes__ == ["raised by simulated rank 1 of 2"]


def test_nan_at_an_operation_of_one_kind() -> None:
    found = run_simulated(program, dp=2, faults=[Fault("nan", rank=0, at=2, operation="all_reduce")])
    for values in found:
        assert values[0] == 3.0
        assert values[1] != values[1]
        assert values[2] == 7.0


def test_delay_changes_the_order_and_not_the_values() -> None:
    plain, late = SimulatedWorld(dp=2), SimulatedWorld(dp=2, faults=[Fault("delay", rank=0, at=1)])
    assert plain.run(program) == late.run(program) == CORRECT
    assert [r.rank for r in plain.trace][:2] == [0, 1]
    assert [r.rank for r in late.trace][:2] == [1, 0]


def test_drop_leaves_the_others_waiting() -> None:
    with pytest.raises(DeadlockError) as caught:
        run_simulated(program, dp=2, faults=[Fault("drop", rank=1, at=3)])
    message = str(caught.value)
    assert "culprit: rank 1 was dropped, as asked, at its operation 3: all_gather(" in message
    assert "but rank 0 waits for it" in message


def test_drop_that_nobody_notices_is_an_error_all_the_same() -> None:
    def one_way(parallel: ParallelContext) -> None:
        if parallel.rank == 0:
            dist.send(torch.zeros(1), 1)
        else:
            dist.recv(torch.zeros(1), 0)
            dist.send(torch.zeros(1), 0)

    with pytest.raises(InjectedFault, match="rank 1 was dropped, as asked, at its operation 2: send to rank 0"):
        run_simulated(one_way, dp=2, faults=[Fault("drop", rank=1, at=2)])


def test_a_fault_that_never_comes() -> None:
    with pytest.raises(InjectedFault, match="rank 1 has only 6 such operations"):
        run_simulated(program, dp=2, faults=[Fault("raise", rank=1, at=7)])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"kind": "zap"}, "fault 'zap' is not known; there are raise, nan, delay, drop"),
        ({"at": 0}, "a fault's at is a whole number from 1, not 0"),
        ({"at": 1.5}, "a fault's at is a whole number from 1, not 1.5"),
        ({"rank": -1}, "a fault's rank is a whole number from 0, not -1"),
        ({"operation": "allreduce"}, "there is no such operation, but all_reduce, "),
        ({"rank": 2}, "is for a rank that is not there: the ranks are 0 to 1"),
    ],
)
def test_faults_that_could_never_happen(what: dict[str, object], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        run_simulated(program, dp=2, faults=[Fault(**{"kind": "nan", "rank": 1, **what})])  # type: ignore[arg-type]


def test_nothing_to_spoil() -> None:
    with pytest.raises(InjectedFault, match="this sends nothing: barrier"):
        run_simulated(lambda parallel: dist.barrier(), dp=2, faults=[Fault("nan", rank=1)])


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int32])
def test_spoilt_values_of_any_dtype(dtype: torch.dtype) -> None:
    def gather(parallel: ParallelContext) -> torch.Tensor:
        return parallel.world.all_gather(torch.ones(2, dtype=dtype))

    found = run_simulated(gather, dp=2, faults=[Fault("nan", rank=0)])[1]
    assert (found != 1).tolist() == [True, False, False, False]


def test_a_delayed_rank_goes_on_while_others_ask() -> None:
    def ask(parallel: ParallelContext) -> None:
        work = dist.all_reduce(torch.zeros(1), async_op=True)
        assert work is not None
        while not work.is_completed():
            pass

    run_simulated(ask, dp=3, timeout=20, faults=[Fault("delay", rank=0)])
