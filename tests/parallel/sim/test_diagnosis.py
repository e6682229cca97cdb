"""Deadlocks and disagreements end at once, in a report that names the culprit. Each program passes when repaired."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.parallel.sim import run_simulated, scheduler
from megalm.parallel.sim.errors import DeadlockError, GroupOrderError, MismatchError, SimulationError, SimulationTimeout
from megalm.parallel.wording import find_cycle

# The names before torch 2.13 are the second.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
Program = Callable[[ParallelContext], object]
SCHEDULES = [("round_robin", 0), ("random", 1), ("random", 2)]


def failure(kind: type[BaseException], program: Program, **options: object) -> str:
    """The message of the error that the program ends in, under every schedule; of the first."""
    messages = []
    for schedule, seed in SCHEDULES:
        with pytest.raises(kind) as caught:
            run_simulated(program, schedule=schedule, seed=seed, **options)  # type: ignore[arg-type]
        assert type(caught.value) is kind
        messages.append(str(caught.value))
        left = [t.name for t in threading.enumerate() if t.name.startswith("rank ")]
        assert not left, "every rank's thread has ended"
    return messages[0]


def skips(guilty: int) -> Program:
    def sum_losses(parallel: ParallelContext) -> None:
        with phase("step 7"), phase("reduce the loss"):
            if parallel.rank != guilty:
                parallel.tp.all_reduce(torch.zeros(3, 2))

    def step(parallel: ParallelContext) -> None:
        sum_losses(parallel)

    def program(parallel: ParallelContext) -> None:
        parallel.tp.all_gather(torch.zeros(1))
        step(parallel)
        parallel.dp.all_reduce(torch.zeros(1))

    return program


def test_a_collective_that_one_rank_skips() -> None:
    started = time.monotonic()
    message = failure(DeadlockError, skips(3), tp=2, dp=2)
    assert time.monotonic() - started < 5
    assert "culprit: rank 3 has ended, but rank 2 waits for it" in message
    expected = [
        "  rank 2: waits in all_reduce(reduction sum, dtype float32, shape [3, 2]), call 2 of group tp [2, 3]",
        "      missing: rank 3; there: rank 2",
        "      during: step 7 > reduce the loss",
    ]
    lines = message.splitlines()
    start = lines.index(expected[0])
    assert lines[start : start + 3] == expected
    frames = lines[start + 3].split(" < ")
    assert [frame.split()[-1] for frame in frames] == ["sum_losses", "step", "program"]
    assert all("test_diagnosis.py:" in frame for frame in frames)
    assert "  rank 0: waits in all_reduce(reduction sum, dtype float32, shape [1]), call 1 of group dp [0, 2]" in lines
    assert "  rank 1: has ended" in lines
    run_simulated(skips(-1), tp=2, dp=2)


@pytest.mark.parametrize("guilty", [0, 1])
def test_axes_in_different_orders_form_a_cycle(guilty: int) -> None:
    def program(parallel: ParallelContext, repaired: bool = False) -> None:
        groups = [parallel.tp, parallel.dp]
        if parallel.rank in (1, 2) and not repaired:
            groups.reverse()
        for group in groups:
            group.all_reduce(torch.zeros(1 + guilty))

    message = failure(DeadlockError, program, tp=2, dp=2)
    assert "cycle: rank 0 -> rank 1 -> rank 3 -> rank 2 -> rank 0 (each waits for the next)" in message
    assert "culprit" not in message
    run_simulated(lambda parallel: program(parallel, repaired=True), tp=2, dp=2)


@pytest.mark.parametrize("first", ["send", "recv"])
def test_neighbours_that_do_the_same_first(first: str) -> None:
    def program(parallel: ParallelContext, repaired: bool = False) -> None:
        x, peer = torch.zeros(2), 1 - parallel.rank
        sends = (first == "send") != (repaired and parallel.rank == 1)
        for call in [dist.send, dist.recv] if sends else [dist.recv, dist.send]:
            call(x, peer)

    message = failure(DeadlockError, program, dp=2)
    other, way = ("recv", "to") if first == "send" else ("send", "from")
    assert "cycle: rank 0 -> rank 1 -> rank 0" in message
    assert f"rank 0: waits in {first} {way} rank 1 of float32[2], group world [0, 1]" in message
    assert f"missing: the {other} of rank 1" in message
    run_simulated(lambda parallel: program(parallel, repaired=True), dp=2)


def test_another_tag_is_named() -> None:
    def program(parallel: ParallelContext, tag: int = 5) -> None:
        if parallel.rank == 0:
            dist.send(torch.zeros(2), 1, tag=3)
        else:
            dist.recv(torch.zeros(2), 0, tag=tag)

    message = failure(DeadlockError, program, dp=2)
    assert "missing: the send of rank 0 with tag 5; it has one with tag 3" in message
    run_simulated(lambda parallel: program(parallel, 3), dp=2)


def test_a_send_that_nobody_waits_for_is_listed() -> None:
    def program(parallel: ParallelContext) -> None:
        if parallel.rank == 0:
            dist.isend(torch.zeros(4), 1)
            parallel.world.all_reduce(torch.zeros(1))

    message = failure(DeadlockError, program, dp=2)
    assert "issued, without a peer, and not being waited for:\n    rank 0: send to rank 1 of float32[4]" in message


def differ(what: str, wrong: bool) -> Program:
    def program(parallel: ParallelContext) -> None:
        odd = wrong and parallel.rank == 1
        x = torch.zeros(2 + (odd and what == "shape"))
        x = x.double() if odd and what == "dtype" else x
        if odd and what == "operation":
            dist.broadcast(x, 0)
        elif what == "root":
            dist.broadcast(x, src=int(odd))
        else:
            dist.all_reduce(x, op=dist.ReduceOp.MAX if odd and what == "reduction" else dist.ReduceOp.SUM)

    return program


@pytest.mark.parametrize(
    ("what", "spelled"),
    [
        ("shape", ("shape [2]", "shape [3]")),
        ("dtype", ("dtype float32", "dtype float64")),
        ("operation", ("all_reduce(", "broadcast(")),
        ("root", ("root 0", "root 1")),
        ("reduction", ("reduction sum", "reduction max")),
    ],
)
def test_disagreements(what: str, spelled: tuple[str, str]) -> None:
    message = failure(MismatchError, differ(what, wrong=True), dp=2)
    assert f"disagree on the {what} of call 1 in group world [0, 1]" in message
    for rank, text in enumerate(spelled):
        (line,) = [line for line in message.splitlines() if line.startswith(f"  rank {rank}: ")]
        assert text in line
    assert message.count("test_diagnosis.py:") == 2, "both call sites"
    run_simulated(differ(what, wrong=False), dp=2)


@pytest.mark.parametrize(
    ("wrong", "spelled"),
    [
        (torch.zeros(3, 4), "float32[3, 4]"),
        (torch.zeros(4, 2), "float32[4, 2]"),
        (torch.zeros(2, 4).int(), "int32[2, 4]"),
    ],
)
def test_messages_of_different_shapes_or_dtypes(wrong: torch.Tensor, spelled: str) -> None:
    def program(parallel: ParallelContext, repaired: bool = False) -> None:
        if parallel.rank == 0:
            dist.send(torch.zeros(2, 4), 1)
        else:
            dist.recv(torch.zeros(2, 4) if repaired else wrong.clone(), 0)

    message = failure(MismatchError, program, dp=2)
    assert f"rank 0 sends float32[2, 4] to rank 1, which expects {spelled}" in message
    assert message.count("test_diagnosis.py:") == 2, "both call sites"
    run_simulated(lambda parallel: program(parallel, repaired=True), dp=2)


@pytest.mark.parametrize(("sent", "expected"), [((), (1,)), ((1, 3), (3, 1, 1))])
def test_dimensions_of_one_do_not_count_in_messages(sent: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """torch's pipelining (2.11) receives a scalar into a tensor of one."""

    def program(parallel: ParallelContext) -> torch.Tensor | None:
        x = torch.arange(math.prod(sent)) + 5
        if parallel.rank == 0:
            dist.send(x.view(sent), 1)
            return None
        out = torch.zeros(expected, dtype=x.dtype)
        dist.recv(out, 0)
        assert torch.equal(out, x.view(expected))
        return out

    run_simulated(program, dp=2)


def test_uneven_all_to_all() -> None:
    def program(parallel: ParallelContext, second: int = 2) -> None:
        sizes = [1, second] if parallel.rank == 0 else [1, 1]
        dist.all_to_all_single(torch.zeros(2), torch.zeros(sum(sizes)), [1, 1], sizes)

    message = failure(MismatchError, program, dp=2)
    assert "rank 0 sends float32[2] to rank 1, which expects float32[1]" in message
    run_simulated(lambda parallel: program(parallel, 1), dp=2)


def test_groups_created_in_different_orders() -> None:
    def program(parallel: ParallelContext, repaired: bool = False) -> None:
        pairs = [[0, 1], [2, 3]]
        for pair in pairs if repaired or parallel.rank < 2 else reversed(pairs):
            dist.new_group(pair)

    message = failure(GroupOrderError, program, dp=4)
    assert re.search(r"^ranks [01] and [23] create different process groups as number \d+: every rank must", message)
    assert re.search(
        r"^  rank [01]: a group over ranks \[0, 1\]\n      at test_diagnosis.py:\d+ program", message, re.M
    )
    assert re.search(
        r"^  rank [23]: a group over ranks \[2, 3\]\n      at test_diagnosis.py:\d+ program", message, re.M
    )
    run_simulated(lambda parallel: program(parallel, repaired=True), dp=4)


def test_a_group_that_one_of_its_ranks_does_not_create() -> None:
    def program(parallel: ParallelContext, guilty: int = 1) -> None:
        if parallel.rank != guilty:
            dist.new_group([0, 1])

    message = failure(GroupOrderError, program, dp=3)
    assert message.startswith("rank 1 never created a process group over ranks [0, 1], as ranks 0, 2 did: every rank")
    assert "  rank 0: a group over ranks [0, 1]\n      at test_diagnosis.py:" in message
    run_simulated(lambda parallel: program(parallel, -1), dp=3)

    def used(parallel: ParallelContext, guilty: int = 1) -> None:
        if parallel.rank != guilty:
            group = dist.new_group([0, 1], group_desc="pair")
            if parallel.rank < 2:
                dist.all_reduce(torch.zeros(1), group=group)

    assert "the group itself was never created by rank 1" in failure(DeadlockError, used, dp=3)
    run_simulated(lambda parallel: used(parallel, -1), dp=3)


@pytest.mark.parametrize("used", [False, True])
def test_a_group_that_only_its_members_create(used: bool) -> None:
    def program(parallel: ParallelContext, mode: str = "members") -> None:
        if mode == "all" or parallel.rank < 2:
            group = dist.new_group([0, 1], use_local_synchronization=mode == "local")
            if used and parallel.rank < 2:
                dist.all_reduce(torch.zeros(1), group=group)

    message = failure(GroupOrderError, program, dp=4)
    assert message.startswith("ranks 2, 3 never created a process group over ranks [0, 1], as ranks 0, 1 did")
    assert "      at test_diagnosis.py:" in message
    run_simulated(lambda parallel: program(parallel, "all"), dp=4)
    run_simulated(lambda parallel: program(parallel, "local"), dp=4)


def test_a_key_that_nobody_sets() -> None:
    def program(parallel: ParallelContext, key: str = "b") -> bytes:
        store = dist.distributed_c10d._get_default_store()
        if parallel.rank == 0:
            store.set(key, "1")
        return store.get("a")  # type: ignore[no-any-return]

    message = failure(DeadlockError, program, dp=2)
    assert "rank 1: waits in the key-value store for" in message
    assert run_simulated(lambda parallel: program(parallel, "a"), dp=2) == [b"1", b"1"]


def test_a_group_that_another_rank_does_not_create() -> None:
    def program(parallel: ParallelContext, guilty: int = 2) -> None:
        if parallel.rank != guilty:
            dist.new_group([0, 1])
        dist.new_group([0, 1, 2])

    assert "must create all groups, also those that it is not in" in failure(GroupOrderError, program, dp=3)
    run_simulated(lambda parallel: program(parallel, -1), dp=3)


def test_a_rank_that_raises_is_named_and_the_others_end() -> None:
    ended = []

    def program(parallel: ParallelContext) -> None:
        try:
            if parallel.rank == 2:
                raise ZeroDivisionError("one over nothing")
            parallel.world.all_reduce(torch.zeros(1))
        except Exception:
            assert parallel.rank == 2, "the others are unwound by what is no Exception"
            raise
        finally:
            ended.append(parallel.rank)

    with pytest.raises(ZeroDivisionError, match="one over nothing") as caught:
        run_simulated(program, dp=3)
    assert caught.value.__notes__ == ["raised by simulated rank 2 of 3"]
    assert sorted(ended) == [0, 1, 2]
    assert "program" in [entry.name for entry in caught.traceback]


def test_a_rank_that_does_not_end() -> None:
    hold = threading.Event()

    def program(parallel: ParallelContext) -> None:
        if parallel.rank == 1:
            hold.wait(30)
        parallel.world.all_reduce(torch.zeros(1))

    with pytest.raises(SimulationTimeout) as caught:
        run_simulated(program, dp=2, timeout=0.5)
    assert "did not end within 0.5 s" in str(caught.value)
    assert "rank 1 has the turn and is here:" in str(caught.value)
    assert "hold.wait(30)" in str(caught.value)
    hold.set()
    deadline = time.monotonic() + 10
    while any(t.name.startswith("rank ") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run_simulated(lambda parallel: parallel.rank, dp=2) == [0, 1]


def test_worlds_inside_worlds_and_unknown_options_are_refused() -> None:
    with pytest.raises(SimulationError, match="cannot start a simulated world"):
        run_simulated(lambda parallel: run_simulated(lambda inner: None), dp=2)
    with pytest.raises(SimulationError, match="schedule 'fair' is not known; there are round_robin, random"):
        run_simulated(lambda parallel: None, schedule="fair")  # type: ignore[arg-type]


def test_an_error_that_the_program_catches_ends_the_run_all_the_same() -> None:
    def program(parallel: ParallelContext) -> str:
        try:
            parallel.world.all_reduce(torch.zeros(1 + parallel.rank))
        except Exception:
            return "never mind"
        return "fine"

    assert "disagree on the shape" in failure(MismatchError, program, dp=2)


def test_asking_whether_an_operation_is_complete_gives_way() -> None:
    def program(parallel: ParallelContext) -> torch.Tensor:
        x = torch.ones(2)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        while not work.is_completed():
            pass
        return x

    for schedule, seed in SCHEDULES:
        for x in run_simulated(program, dp=3, schedule=schedule, seed=seed):  # type: ignore[arg-type]
            assert torch.equal(x, torch.full((2,), 3.0))


def ask(work: dist.Work | None) -> None:
    assert work is not None
    while not work.is_completed():
        pass


@pytest.mark.parametrize("call", ["all_reduce", "irecv"])
def test_asking_for_what_a_rank_that_has_ended_would_have_to_join(call: str) -> None:
    def program(parallel: ParallelContext, guilty: int = 1) -> None:
        if parallel.rank != guilty:
            if call == "all_reduce":
                ask(dist.all_reduce(torch.zeros(2), async_op=True))
            elif parallel.rank == 0:
                ask(dist.irecv(torch.zeros(2), 1))
            else:
                dist.send(torch.zeros(2), 0)

    started = time.monotonic()
    message = failure(DeadlockError, program, dp=2)
    assert time.monotonic() - started < 5
    assert "culprit: rank 1 has ended, but rank 0 waits for it" in message
    kind = "all_reduce(" if call == "all_reduce" else "recv from rank 1"
    assert f"  rank 0: asks again and again for the end of {kind}" in message
    assert "      at test_diagnosis.py:" in message
    run_simulated(lambda parallel: program(parallel, -1), dp=2)


@pytest.mark.parametrize("other", [lambda: dist.recv(torch.zeros(1), 0), lambda: ask(dist.irecv(torch.zeros(1), 0))])
def test_ranks_that_ask_in_a_circle(other: Callable[[], object]) -> None:
    def program(parallel: ParallelContext) -> None:
        if parallel.rank:
            other()
        else:
            ask(dist.irecv(torch.zeros(1), 1))

    with pytest.raises(DeadlockError) as caught:
        run_simulated(program, dp=2)
    message = str(caught.value)
    assert "cycle: rank 0 -> rank 1 -> rank 0" in message
    assert "rank 0: asks again and again for the end of recv from rank 1" in message


def test_asking_and_then_doing_what_the_others_wait_for() -> None:
    """Asking in vain is no deadlock where the rank goes on by itself: after many times, or after some time."""

    def program(parallel: ParallelContext) -> torch.Tensor:
        x = torch.ones(2)
        if parallel.rank == 0:
            work = dist.irecv(x, 1)
            assert work is not None
            until = time.monotonic() + 0.3
            asked = 0
            while not work.is_completed() and (asked < 5000 or time.monotonic() < until):
                asked += 1
            dist.send(torch.zeros(1), 1)
            work.wait()
        else:
            dist.recv(torch.zeros(1), 0)
            dist.send(x + 4, 0)
        return x

    for schedule, seed in SCHEDULES:
        found = run_simulated(program, dp=2, schedule=schedule, seed=seed)  # type: ignore[arg-type]
        assert found[0].tolist() == [5.0, 5.0]


def test_a_rank_that_asks_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_PATIENCE", 60.0)

    def program(parallel: ParallelContext) -> None:
        if parallel.rank == 0:
            ask(dist.irecv(torch.zeros(1), 1))
        elif parallel.rank == 1:
            dist.recv(torch.zeros(1), 0)

    with pytest.raises(SimulationTimeout) as caught:
        run_simulated(program, dp=3, timeout=1.0)
    message = str(caught.value)
    assert re.search(
        r"rank 0 has the turn and is here: test_diagnosis.py:\d+ ask < test_diagnosis.py:\d+ program", message
    )
    assert "has asked last whether this is complete: recv from rank 1 of float32[1]" in message
    assert "rank 1 waits\n  in recv from rank 0" in message
    assert "rank 2 has ended" in message


def test_calls_that_are_not_simulated() -> None:
    def any_source(parallel: ParallelContext) -> None:
        if parallel.rank == 0:
            dist.recv(torch.zeros(1))
        else:
            dist.send(torch.zeros(1), 0)

    message = failure(SimulationError, any_source, dp=2)
    assert message.startswith("rank 0 receives float32[1] from any source, which is not simulated: name the source")
    assert "test_diagnosis.py:" in message
    with pytest.raises(ValueError, match="monitored_barrier is only implemented for GLOO"):
        run_simulated(lambda parallel: dist.monitored_barrier(), dp=2)


WRONG_SIZES: dict[str, Callable[[int], object]] = {
    "all_gather 2 outputs": lambda n: dist.all_gather([torch.zeros(1)] * n, torch.zeros(1)),
    "reduce_scatter 2 inputs": lambda n: dist.reduce_scatter(torch.zeros(1), [torch.zeros(1)] * n),
    "all_to_all 2 inputs": lambda n: dist.all_to_all([torch.zeros(1) for _ in range(3)], [torch.zeros(1)] * n),
    "hands over float32[2]": lambda n: all_gather_single(torch.zeros(n), torch.zeros(1)),
    "hands over float32[4] and": lambda n: reduce_scatter_single(torch.zeros(1), torch.zeros(n if n > 2 else 4)),
    "splits float32[2]": lambda n: dist.all_to_all_single(torch.zeros(n), torch.zeros(n)),
}


@pytest.mark.parametrize("what", WRONG_SIZES)
def test_lists_and_shares_of_the_wrong_size(what: str) -> None:
    def program(parallel: ParallelContext, size: int = 2) -> None:
        try:
            WRONG_SIZES[what](size)
        except SimulationError:
            if size == 3:
                raise

    message = failure(MismatchError, program, dp=3)
    assert message.startswith("rank ")
    for word in what.split():
        assert word in message.splitlines()[0]
    assert "      at test_diagnosis.py:" in message
    run_simulated(lambda parallel: program(parallel, 3), dp=3)


@pytest.mark.parametrize("axis", ["tp", "pp", "dp"])
@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_layouts_that_are_none(axis: str, size: object) -> None:
    with pytest.raises(SimulationError, match=f"^{axis} is a number of ranks, of 1 or more, not {size}$"):
        run_simulated(lambda parallel: None, **{axis: size})  # type: ignore[arg-type]


def test_cycles() -> None:
    assert find_cycle({0: [1], 1: [2], 2: []}) == []
    assert find_cycle({0: [1, 2], 1: [], 2: [3], 3: [0]}) == [0, 2, 3, 0]
    assert find_cycle({0: [1], 1: [2], 2: [3], 3: [1]}) == [1, 2, 3, 1]
    assert find_cycle({0: [1], 1: [2, 0], 2: [0]}) == [0, 1, 0]
    assert find_cycle({0: [0]}) == [0, 0]
