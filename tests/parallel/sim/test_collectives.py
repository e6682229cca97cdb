"""Every collective against its definition, and against gloo."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import SimulatedWorld, run_simulated
from megalm.testing.processes import run_processes

Tensors = dict[str, torch.Tensor]


def value(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Different on each rank, and the same wherever it is made."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(100 + rank), dtype=torch.float64)
    return (made * 8).to(dtype)


def everything(parallel: ParallelContext) -> Tensors:
    """The result of each collective of torch.distributed, by name."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out: Tensors = {}
    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX), ("product", dist.ReduceOp.PRODUCT)):
        out[f"all_reduce {name}"] = value(rank, 3, 2)
        dist.all_reduce(out[f"all_reduce {name}"], op=op)
    for name, integers in (("band", dist.ReduceOp.BAND), ("bor", dist.ReduceOp.BOR), ("bxor", dist.ReduceOp.BXOR)):
        out[f"all_reduce {name}"] = value(rank, 5, dtype=torch.int64)
        dist.all_reduce(out[f"all_reduce {name}"], op=integers)
    root = size - 1
    out["broadcast"] = value(rank, 4)
    dist.broadcast(out["broadcast"], src=root)
    reduced = value(rank, 4)
    dist.reduce(reduced, dst=root)
    if rank == root:
        out["reduce"] = reduced
    rows = [torch.empty(2, 3, dtype=torch.float64) for _ in range(size)]
    dist.all_gather(rows, value(rank, 2, 3))
    out["all_gather"] = torch.stack(rows)
    out["all_gather single"] = parallel.world.all_gather(value(rank, 2, 3))
    out["reduce_scatter single"] = parallel.world.reduce_scatter(value(rank, 2 * size, 3))
    received = [torch.empty(2, dtype=torch.float64) for _ in range(size)]
    out["all_to_all single"] = torch.empty(2 * size, dtype=torch.float64)
    dist.all_to_all_single(out["all_to_all single"], value(rank, 2 * size))
    # Rank r sends r + d + 1 rows to rank d.
    sends, gets = [rank + d + 1 for d in range(size)], [s + rank + 1 for s in range(size)]
    out["all_to_all uneven"] = torch.empty(sum(gets), 2, dtype=torch.float64)
    dist.all_to_all_single(out["all_to_all uneven"], value(rank, sum(sends), 2), gets, sends)
    gathered = [torch.empty(3, dtype=torch.float64) for _ in range(size)] if rank == 0 else None
    dist.gather(value(rank, 3), gathered, dst=0)
    if gathered is not None:
        out["gather"] = torch.stack(gathered)
    out["scatter"] = torch.empty(2, dtype=torch.float64)
    dist.scatter(out["scatter"], list(value(rank, size, 2).unbind()) if rank == 0 else None, src=0)
    out["ring"] = torch.empty(3, dtype=torch.float64)
    works = [dist.isend(value(rank, 3), (rank + 1) % size), dist.irecv(out["ring"], (rank - 1) % size)]
    for work in works:
        assert work is not None
        work.wait()
    out["batched"] = torch.empty(2, dtype=torch.float64)
    pairs = [
        dist.P2POp(dist.irecv, out["batched"], (rank + 1) % size),
        dist.P2POp(dist.isend, value(rank, 2), (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(pairs):
        work.wait()
    dist.barrier()
    del received
    return out


@pytest.mark.parametrize("size", [2, 3])
def test_every_collective_equals_gloo(size: int) -> None:
    simulated, real = run_simulated(everything, dp=size), run_processes(everything, dp=size)
    for mine, theirs in zip(simulated, real, strict=True):
        assert set(mine) == set(theirs)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-12 if size > 2 else 0, atol=0, msg=name)


def test_collectives_that_gloo_lacks() -> None:
    def rank(parallel: ParallelContext) -> Tensors:
        r, size = dist.get_rank(), dist.get_world_size()
        mean = value(r, 4)
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        received = [torch.empty(2, dtype=torch.float64) for _ in range(size)]
        dist.all_to_all(received, list(value(r, size, 2).unbind()))
        part = torch.empty(2, dtype=torch.float64)
        dist.reduce_scatter(part, list(value(r, size, 2).unbind()))
        return {"mean": mean, "all_to_all": torch.stack(received), "part": part}

    out = run_simulated(rank, dp=3)
    whole = torch.stack([value(r, 3, 2) for r in range(3)])
    for r in range(3):
        torch.testing.assert_close(out[r]["mean"], torch.stack([value(s, 4) for s in range(3)]).mean(0))
        assert torch.equal(out[r]["all_to_all"], whole[:, r])
        torch.testing.assert_close(out[r]["part"], whole.sum(0)[r])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8, torch.bool])
def test_dtypes(dtype: torch.dtype) -> None:
    def rank(parallel: ParallelContext) -> torch.Tensor:
        return parallel.world.all_gather(value(parallel.rank, 3).abs().to(dtype))

    expected = torch.cat([value(r, 3).abs().to(dtype) for r in range(2)])
    assert all(torch.equal(found, expected) for found in run_simulated(rank, tp=2))


def test_empty_tensors_and_scalars() -> None:
    def rank(parallel: ParallelContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        one = torch.tensor(float(parallel.rank))
        return parallel.tp.all_gather(torch.zeros(0, 4)), parallel.tp.reduce_scatter(torch.zeros(0, 4)), one

    for gathered, scattered, one in run_simulated(rank, tp=2):
        assert gathered.shape == scattered.shape == (0, 4)
        assert one.ndim == 0


def test_subgroups_see_only_their_ranks() -> None:
    def rank(parallel: ParallelContext) -> tuple[list[int], list[int], list[int]]:
        here = torch.tensor([parallel.rank])
        return tuple(g.all_gather(here).tolist() for g in (parallel.tp, parallel.dp, parallel.world))  # type: ignore[return-value]

    for number, (tp, dp, world) in enumerate(run_simulated(rank, tp=3, dp=2)):
        assert tp == [number // 3 * 3 + i for i in range(3)]
        assert dp == [number % 3, number % 3 + 3]
        assert world == list(range(6))


def test_json_and_groups_of_one() -> None:
    def rank(parallel: ParallelContext) -> tuple[list[object], list[object]]:
        return parallel.world.gather_json({"rank": parallel.rank}), parallel.dp.gather_json(parallel.rank)

    assert run_simulated(rank, tp=2)[1] == ([{"rank": 0}, {"rank": 1}], [1])
    assert run_simulated(rank) == [([{"rank": 0}], [0])]


def test_eager_sends_end_at_once() -> None:
    def both_send_first(parallel: ParallelContext) -> torch.Tensor:
        out, peer = torch.empty(1), 1 - parallel.rank
        dist.send(torch.ones(1) * parallel.rank, peer)
        dist.recv(out, peer)
        return out

    assert [t.item() for t in run_simulated(both_send_first, dp=2, p2p="eager")] == [1.0, 0.0]


def program(seed: int, calls: int) -> Callable[[ParallelContext], list[torch.Tensor]]:
    """Collectives drawn from a seed, each on a group drawn from it, some waited for late."""

    def rank(parallel: ParallelContext) -> list[torch.Tensor]:
        draw = random.Random(seed)
        out, works = [], []
        for call in range(calls):
            kind, axis, late = draw.choice("rgs"), draw.choice(["tp", "dp", "world"]), draw.random() < 0.5
            group = {"tp": parallel.tp, "dp": parallel.dp, "world": parallel.world}[axis]
            x = value(parallel.rank * 1000 + call, 4 * group.size)
            if kind == "g":
                out.append(group.all_gather(x))
            elif kind == "s":
                out.append(group.reduce_scatter(x))
            elif late:
                works.append(dist.all_reduce(x, async_op=True))
                out.append(x)
            else:
                out.append(group.all_reduce(x))
        for work in draw.sample(works, len(works)):
            assert work is not None
            work.wait()
        return out

    return rank


def test_drawn_programs_do_not_depend_on_the_schedule(campaign_seed: int, full: bool) -> None:
    for seed in range(campaign_seed, campaign_seed + (60 if full else 6)):
        tp, dp = random.Random(seed).choice([(2, 2), (1, 3), (4, 2), (3, 1)])
        run = program(seed, 20)
        expected = SimulatedWorld(tp=tp, dp=dp).run(run)
        for schedule in range(2):
            found = SimulatedWorld(tp=tp, dp=dp, schedule="random", seed=schedule).run(run)
            for a, b in zip(expected, found, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), f"seed {seed}, schedule {schedule}"
