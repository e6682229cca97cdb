"""Memory that is touched at the wrong time, or by the wrong rank. Each program passes when repaired."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import SimulatedWorld, run_simulated
from megalm.parallel.sim.errors import ForeignThreadError, RaceError, SharedStorageError, UnawaitedError
from megalm.testing.parity import loss_and_gradients

# The name before torch 2.13 is the second.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
Program = Callable[[ParallelContext], object]


def failure(kind: type[BaseException], program: Program, **options: object) -> str:
    """The message, after the program has failed under three schedules."""
    for schedule, seed in [("random", 1), ("random", 2), ("round_robin", 0)]:
        with pytest.raises(kind) as caught:
            run_simulated(program, schedule=schedule, seed=seed, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_an_output_read_early_is_not_the_result_on_any_rank(dtype: torch.dtype) -> None:
    def program(parallel: ParallelContext, early: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.ones(3, dtype=dtype)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        if early:
            seen = x + 1
        work.wait()
        if not early:
            seen = x + 1
        return seen, x

    for schedule in ("round_robin", "random"):
        for seen, x in run_simulated(program, tp=2, schedule=schedule):  # type: ignore[arg-type]
            assert torch.equal(x, torch.full((3,), 2, dtype=dtype))
            wrong = seen.isnan() if dtype.is_floating_point else seen == torch.iinfo(dtype).min
            assert wrong.all()
    for seen, _ in run_simulated(lambda parallel: program(parallel, early=False), tp=2):
        assert torch.equal(seen, torch.full((3,), 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_computed_from_an_output_read_early_name_it(dtype: torch.dtype) -> None:
    """At the next operation, whatever lies between: here a norm, products, and another precision."""

    def program(parallel: ParallelContext, early: bool = True) -> None:
        parallel.tp.all_reduce(torch.zeros(2))
        x = torch.ones(6, 4, dtype=dtype)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        if not early or parallel.rank == 0:
            work.wait()
        y = torch.nn.functional.layer_norm(x * 3 + 1, (4,)) @ torch.ones(4, 5, dtype=dtype)
        y = (y.relu() - 2).to(torch.float32 if dtype == torch.float64 else torch.float64)
        work.wait()
        parallel.tp.all_gather(y.sum()[None])

    message = failure(RaceError, program, tp=2)
    assert message.startswith("rank 1 hands to all_gather(")
    assert "an output that it read before waiting for its operation: all_reduce in group world, issued at" in message
    assert message.count("test_memory.py:") >= 2
    run_simulated(lambda parallel: program(parallel, early=False), tp=2)


def test_a_nan_of_the_program_is_no_race() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    found = run_simulated(lambda parallel: parallel.tp.all_reduce(nan.clone()), tp=2)
    assert found[0].isnan().tolist() == [True, False]


def test_an_output_passed_on_early() -> None:
    def program(parallel: ParallelContext, early: bool = True) -> None:
        rows = torch.empty(2, 3)
        work = all_gather_single(rows, torch.ones(1, 3), async_op=True)
        assert work is not None
        if not early:
            work.wait()
        parallel.tp.all_reduce(rows[1])
        work.wait()

    message = failure(RaceError, program, tp=2)
    assert "the output of an operation that it has not waited for: all_gather(" in message
    assert message.count("test_memory.py:") == 2
    run_simulated(lambda parallel: program(parallel, early=False), tp=2)


def test_an_input_changed_before_the_wait() -> None:
    def program(parallel: ParallelContext, wait_first: bool = False) -> None:
        x, rows = torch.ones(1, 3), torch.empty(2, 3)
        work = all_gather_single(rows, x, async_op=True)
        assert work is not None
        if wait_first:
            work.wait()
        if parallel.rank == 1:
            x.mul_(2)
        work.wait()

    message = failure(RaceError, program, tp=2)
    assert message.startswith("rank 1 changed input 0 (float32[1, 3]) of all_gather(")
    run_simulated(lambda parallel: program(parallel, wait_first=True), tp=2)


def test_an_output_written_before_the_wait() -> None:
    def program(parallel: ParallelContext, wait_first: bool = False) -> None:
        x = torch.ones(3, dtype=torch.int32)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        if wait_first:
            work.wait()
        x.zero_()
        work.wait()

    assert "changed output 0 (int32[3]) of all_reduce(" in failure(RaceError, program, tp=2)
    run_simulated(lambda parallel: program(parallel, wait_first=True), tp=2)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "add": lambda x: x.add_(1),
    "times one": lambda x: x.mul_(1),
    "negate": lambda x: x.neg_(),
    "absolute": lambda x: x.abs_(),
    "one element": lambda x: x[..., :1].fill_(7),
    "zero": lambda x: x.zero_(),
}


def written_early(dtype: torch.dtype, write: Callable[[torch.Tensor], object], where: str) -> Callable[[bool], Program]:
    """A program that writes what an operation is still to write; one that waits first, if asked to."""

    def program(parallel: ParallelContext, wait_first: bool) -> None:
        x = torch.ones(8, dtype=dtype)
        target = {"whole": x, "slice": x[:4], "through base": x[:4], "received": x}[where]
        work: dist.Work | None
        if where == "received":
            work = dist.irecv(x, 0) if parallel.rank else dist.isend(x, 1)
        else:
            work = dist.all_reduce(target, async_op=True)
        assert work is not None
        if wait_first:
            work.wait()
        if where != "received" or parallel.rank == 1:
            write(x if where == "through base" else target)
        work.wait()

    return lambda wait_first: lambda parallel: program(parallel, wait_first)


@pytest.mark.parametrize("where", ["whole", "slice", "through base", "received"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_arithmetic_on_an_output_before_the_wait(dtype: torch.dtype, write: str, where: str) -> None:
    """NaN + 1 is NaN: the bits of the NaN must tell."""
    if dtype.is_complex and write == "absolute":
        pytest.skip("not defined in place")
    make = written_early(dtype, WRITES[write], where)
    with pytest.raises(RaceError, match=r"changed output 0 \(.*before waiting for it"):
        run_simulated(make(False), dp=2)
    run_simulated(make(True), dp=2)


@pytest.mark.parametrize(
    ("dtype", "write"),
    [
        (torch.float32, lambda x: x.clamp_(-1, 1)),
        (torch.bfloat16, lambda x: x.relu_()),
        (torch.int64, lambda x: x.mul_(1)),
        (torch.bool, lambda x: x.logical_or_(torch.ones(8, dtype=torch.bool))),
        (torch.bool, lambda x: x.logical_not_()),
        (torch.bool, lambda x: x.zero_()),
    ],
)
def test_a_write_that_leaves_the_bits_as_they_are(dtype: torch.dtype, write: Callable[[torch.Tensor], object]) -> None:
    """Seen where the output is a memory of its own."""
    make = written_early(dtype, write, "received")
    with pytest.raises(RaceError, match="rank 1 changed output 0"):
        run_simulated(make(False), dp=2)
    run_simulated(make(True), dp=2)


def test_writes_that_no_version_counter_sees() -> None:
    def through_numpy(parallel: ParallelContext, wait_first: bool = False) -> None:
        x = torch.ones(3)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        if wait_first:
            work.wait()
        x.numpy()[0] = 5
        work.wait()

    def inferring(parallel: ParallelContext, wait_first: bool = False) -> None:
        with torch.inference_mode():
            x, rows = torch.ones(1, 3), torch.empty(2, 3)
            work = all_gather_single(rows, x, async_op=True)
            assert work is not None
            if wait_first:
                work.wait()
            x.add_(1)
            work.wait()

    assert "changed output 0" in failure(RaceError, through_numpy, tp=2)
    assert "changed input 0" in failure(RaceError, inferring, tp=2)
    run_simulated(lambda parallel: through_numpy(parallel, wait_first=True), tp=2)
    run_simulated(lambda parallel: inferring(parallel, wait_first=True), tp=2)


def test_two_operations_that_write_the_same_memory() -> None:
    def program(parallel: ParallelContext, wait_first: bool = False) -> None:
        if parallel.rank == 0:
            for _ in range(2):
                dist.send(torch.ones(3), 1)
            return
        x = torch.ones(3)
        works = [dist.irecv(x, 0)]
        if wait_first:
            works.pop().wait()  # type: ignore[union-attr]
        works.append(dist.irecv(x, 0))
        for work in works:
            assert work is not None
            work.wait()

    message = failure(RaceError, program, dp=2)
    assert "the output of an operation that it has not waited for: recv from rank 0" in message
    run_simulated(lambda parallel: program(parallel, wait_first=True), dp=2)


def test_neighbours_of_an_output_may_be_written() -> None:
    def program(parallel: ParallelContext) -> torch.Tensor:
        buffer = torch.ones(8)
        work = dist.all_reduce(buffer[:4], async_op=True)
        assert work is not None
        buffer[4:].add_(2)
        work.wait()
        return buffer

    assert run_simulated(program, tp=2)[1].tolist() == [2.0] * 4 + [3.0] * 4


def test_neighbouring_slices_of_one_buffer_are_apart() -> None:
    """Gradient buckets in one flat buffer share torch's version counter, but no bytes."""

    def program(parallel: ParallelContext) -> torch.Tensor:
        buffer = torch.arange(8.0)
        works = [dist.all_reduce(half, async_op=True) for half in buffer.chunk(2)]
        for work in works:
            assert work is not None
            work.wait()
        return buffer

    assert torch.equal(run_simulated(program, tp=2)[1], 2 * torch.arange(8.0))


def test_a_gather_into_the_buffer_that_holds_the_input() -> None:
    def program(parallel: ParallelContext) -> torch.Tensor:
        rows = torch.zeros(2, 3)
        rows[parallel.rank] = parallel.rank + 1
        all_gather_single(rows.view(-1), rows[parallel.rank])
        return rows

    for rows in run_simulated(program, tp=2):
        assert torch.equal(rows, torch.tensor([[1.0] * 3, [2.0] * 3]))


@pytest.mark.parametrize("call", ["all_reduce", "broadcast", "all_gather"])
@pytest.mark.parametrize("schedule", ["round_robin", "random"])
def test_memory_that_ranks_share(call: str, schedule: str) -> None:
    shared = torch.zeros(2, 3)

    def program(parallel: ParallelContext, own: bool = False) -> None:
        x = shared.clone() if own else shared
        if call == "all_reduce":
            parallel.tp.all_reduce(x)
        elif call == "broadcast":
            parallel.tp.broadcast(x)
        else:
            all_gather_single(x, torch.zeros(1, 3))

    run_simulated(lambda parallel: program(parallel, own=True), tp=2)
    with pytest.raises(SharedStorageError, match=r"^ranks [01] and [01] hand the same memory") as caught:
        run_simulated(program, tp=2, schedule=schedule)  # type: ignore[arg-type]
    assert str(caught.value).count("test_memory.py:") == 2


def test_memory_shared_by_ranks_that_never_meet() -> None:
    shared = torch.zeros(3)

    def program(parallel: ParallelContext, own: bool = False) -> None:
        use = not own and parallel.tp.index == 0
        parallel.tp.all_reduce(shared if use else torch.zeros(3))

    run_simulated(lambda parallel: program(parallel, own=True), tp=2, dp=2)
    with pytest.raises(SharedStorageError, match="ranks 0 and 2"):
        run_simulated(program, tp=2, dp=2)


def test_constants_may_be_shared() -> None:
    constant = torch.arange(4.0)
    found = run_simulated(lambda parallel: parallel.tp.all_gather(constant), tp=2)
    assert torch.equal(found[0], torch.cat([constant, constant]))


def test_memory_is_freed_and_taken_anew() -> None:
    """Addresses come back on other ranks; that is no sharing. And nothing keeps tensors alive."""

    def program(parallel: ParallelContext) -> int:
        for _ in range(200):
            parallel.tp.all_reduce(torch.zeros(1000))
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (1000,))

    assert max(run_simulated(program, tp=2)) < 10


def test_operations_never_waited_for() -> None:
    def program(parallel: ParallelContext, wait: bool = False) -> None:
        work = dist.all_reduce(torch.zeros(3), async_op=True)
        assert work is not None
        if wait or parallel.rank == 0:
            work.wait()

    message = failure(UnawaitedError, program, tp=2)
    assert (
        "  rank 1: all_reduce(reduction sum, dtype float32, shape [3]), call 1 of group world [0, 1], never waited"
        in message
    )
    assert "  rank 0:" not in message
    run_simulated(lambda parallel: program(parallel, wait=True), tp=2)


@pytest.mark.parametrize("p2p", ["rendezvous", "eager"])
def test_a_send_that_nobody_receives(p2p: str) -> None:
    def program(parallel: ParallelContext, receive: bool = False) -> None:
        work = dist.isend(torch.zeros(3), 1) if parallel.rank == 0 else None
        if work is not None and (receive or p2p == "eager"):
            work.wait()
        if parallel.rank == 1 and receive:
            dist.recv(torch.zeros(3), 0)

    message = failure(UnawaitedError, program, dp=2, p2p=p2p)
    assert "rank 0: send to rank 1 of float32[3], group world [0, 1], never met by its peers" in message
    run_simulated(lambda parallel: program(parallel, receive=True), dp=2, p2p=p2p)  # type: ignore[arg-type]


def test_a_thread_that_is_no_rank() -> None:
    def program(parallel: ParallelContext, own: bool = False) -> None:
        def work() -> None:
            parallel.tp.all_reduce(torch.zeros(1))

        if own:
            work()
            return

        def swallow() -> None:
            try:
                work()
            except Exception:
                raised.append(parallel.rank)

        thread = threading.Thread(target=swallow, name="loader")
        thread.start()
        thread.join()

    raised: list[int] = []
    message = failure(ForeignThreadError, program, tp=2)
    assert "thread 'loader' is no rank of this simulated world, and may not communicate" in message
    assert raised
    run_simulated(lambda parallel: program(parallel, own=True), tp=2)


@pytest.mark.parametrize("starts_first", [False, True])
def test_a_foreign_thread_and_the_default_group(starts_first: bool) -> None:
    """torch finds no default group there; its own error would stay in the thread."""
    caught: list[BaseException] = []
    jobs: queue.Queue[Callable[[], object] | None] = queue.Queue()

    def work() -> None:
        while job := jobs.get():
            try:
                job()
            except BaseException as error:
                caught.append(error)
            jobs.task_done()

    def program(parallel: ParallelContext, call: Callable[[], object]) -> None:
        if parallel.rank == 1:
            if not starts_first:
                threading.Thread(target=work, name="loader").start()
            jobs.put(call)
            jobs.join()

    if starts_first:
        threading.Thread(target=work, name="loader").start()
    try:
        with pytest.raises(ForeignThreadError, match=r"thread 'loader' is no rank .*may not use the default") as error:
            run_simulated(lambda parallel: program(parallel, lambda: dist.all_reduce(torch.ones(2))), dp=2)
        assert "test_memory.py:" in str(error.value)
        assert caught == [error.value]
        jobs.put(None)
        jobs = queue.Queue()
        if starts_first:
            threading.Thread(target=work, name="loader").start()
        run_simulated(lambda parallel: program(parallel, dist.is_initialized), dp=2)
    finally:
        jobs.put(None)


def test_a_thread_of_the_caller_may_use_a_group_of_its_own() -> None:
    go, gone, found = threading.Event(), threading.Event(), []

    def own() -> None:
        go.wait(30)
        x = torch.ones(2)
        dist.all_reduce(x)
        found.append((dist.get_world_size(), x.tolist()))
        gone.set()

    def program(parallel: ParallelContext) -> None:
        go.set()
        assert gone.wait(30)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        thread = threading.Thread(target=own)
        thread.start()
        run_simulated(program, dp=2)
        thread.join()
    finally:
        dist.destroy_process_group()
    assert found == [(1, [1.0, 1.0])]


def test_a_group_kept_in_a_global() -> None:
    kept: list[ParallelContext] = []

    def program(parallel: ParallelContext, own: bool = False) -> None:
        if not kept:
            kept.append(parallel)
        (parallel if own else kept[0]).tp.all_reduce(torch.zeros(1))

    with pytest.raises(ForeignThreadError, match="rank 1 uses a process group or an operation that belongs to rank 0"):
        run_simulated(program, tp=2)
    run_simulated(lambda parallel: program(parallel, own=True), tp=2)


def test_generators_and_settings_of_a_rank_are_its_own() -> None:
    def program(parallel: ParallelContext) -> tuple[list[float], bool]:
        drawn = []
        for _ in range(3):
            drawn.append(torch.rand(()).item())
            parallel.world.all_reduce(torch.zeros(1))
        # On a GPU, backward on threads of autograd's own would communicate from there.
        assert not torch._C._is_multithreading_enabled()
        return drawn, torch.is_grad_enabled()

    torch.manual_seed(5)
    expected = [torch.rand(()).item() for _ in range(4)]
    torch.manual_seed(5)
    with torch.no_grad():
        found = run_simulated(program, dp=3, schedule="random")
    assert found == [(expected[:3], False)] * 3
    assert torch.rand(()).item() == expected[0], "the caller's generator has not moved"
    assert torch.is_grad_enabled()


def test_the_engine_leaves_nothing_behind(prepared_run: Callable[..., object]) -> None:
    """No operation unawaited, no memory shared: the checks above are on in every run of the engine."""
    prepared = prepared_run("gpt2")
    world = SimulatedWorld(tp=2, dp=2, sp=True)
    world.run(lambda parallel: loss_and_gradients(prepared, parallel, micro_batch=2))  # type: ignore[arg-type]
    assert len(world.trace) > 100
