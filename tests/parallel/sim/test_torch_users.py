"""torch's own users of process groups run on simulated ones unchanged, with the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import SimulatedWorld, run_simulated

# torch warns of what its own modules call.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
BATCH = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SCHEDULES = ["round_robin", "random"]


def network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4)).double()


def trained(model: torch.nn.Module, rows: torch.Tensor, steps: int = 3) -> None:
    """Steps of Adam on the mean of squares."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    model = network()
    trained(model, BATCH)
    return [p.detach() for p in model.parameters()]


def mine(parallel: ParallelContext) -> torch.Tensor:
    return BATCH.chunk(parallel.world_size)[parallel.rank].clone()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddp(expected: list[torch.Tensor], schedule: str) -> None:
    def rank(parallel: ParallelContext) -> list[torch.Tensor]:
        model = DistributedDataParallel(network(), bucket_cap_mb=0.0005)
        trained(model, mine(parallel))
        return [p.detach() for p in model.parameters()]

    for found in run_simulated(rank, dp=4, schedule=schedule):  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fsdp2(expected: list[torch.Tensor], schedule: str) -> None:
    def rank(parallel: ParallelContext) -> list[torch.Tensor]:
        model = network()
        mesh = init_device_mesh("cpu", (parallel.world_size,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained(model, mine(parallel))
        return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]

    for found in run_simulated(rank, dp=4, schedule=schedule):  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_hybrid_sharding(expected: list[torch.Tensor]) -> None:
    """FSDP2 on two axes: shards within one, replicas over the other."""

    def rank(parallel: ParallelContext) -> list[torch.Tensor]:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        trained(model, mine(parallel))
        return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]

    for found in run_simulated(rank, dp=4):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_device_mesh() -> None:
    def rank(parallel: ParallelContext) -> tuple[list[int], list[int]]:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
        out = []
        for axis in ("a", "c"):
            group = mesh.get_group(axis)
            rows = [torch.zeros(1) for _ in range(2)]
            dist.all_gather(rows, torch.tensor([float(parallel.rank)]), group=group)
            out.append([int(row.item()) for row in rows])
        return out[0], out[1]

    world = SimulatedWorld(dp=8)
    for number, (outer, inner) in enumerate(world.run(rank)):
        assert outer == [number % 4, number % 4 + 4]
        assert inner == [number // 2 * 2, number // 2 * 2 + 1]
    assert {record.group for record in world.trace} == {"mesh_a", "mesh_c"}


def test_dtensor() -> None:
    left, right = BATCH, torch.linspace(0, 1, 24, dtype=torch.float64).view(6, 4)

    def rank(parallel: ParallelContext) -> tuple[torch.Tensor, torch.Tensor]:
        mesh = init_device_mesh("cpu", (4,))
        a = distribute_tensor(left.clone(), mesh, [Shard(1)])
        b = distribute_tensor(right.clone(), mesh, [Shard(0)])
        product = a @ b
        assert isinstance(product, DTensor)
        resharded = distribute_tensor(left.clone(), mesh, [Shard(0)]).redistribute(mesh, [Shard(1)])
        return product.redistribute(mesh, [Replicate()]).to_local(), resharded.full_tensor()

    for product, whole in run_simulated(rank, dp=4):
        torch.testing.assert_close(product, left @ right)
        assert torch.equal(whole, left)


def test_functional_collectives() -> None:
    def rank(parallel: ParallelContext) -> list[torch.Tensor]:
        group = dist.group.WORLD
        x = torch.full((4, 2), parallel.rank + 1.0)
        rows = functional.all_gather_tensor(x, 0, group)
        return [
            functional.all_reduce(x, "sum", group) + 0,
            rows + 0,
            functional.reduce_scatter_tensor(rows * 1, "sum", 0, group) + 0,
            functional.all_to_all_single(x, None, None, group) + 0,
            functional.broadcast(x, 1, group) + 0,
        ]

    for number, (summed, rows, part, swapped, copied) in enumerate(run_simulated(rank, dp=2)):
        assert (summed == 3).all()
        assert torch.equal(rows, torch.cat([torch.ones(4, 2), 2 * torch.ones(4, 2)]))
        assert (part == 2 * (number + 1)).all()
        assert torch.equal(swapped, torch.cat([torch.ones(2, 2), 2 * torch.ones(2, 2)]))
        assert (copied == 2).all()


def test_checkpoint_of_one_layout_loads_in_another(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    def sharded(ranks: int) -> torch.nn.Module:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        return model

    def save(parallel: ParallelContext) -> None:
        model = sharded(parallel.world_size)
        trained(model, mine(parallel))
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")

    def load(parallel: ParallelContext) -> list[torch.Tensor]:
        model = sharded(parallel.world_size)
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
        model.load_state_dict(state["model"])
        return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]

    run_simulated(save, dp=4)
    for found in run_simulated(load, dp=2):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_communicates_in_backward(reentrant: bool) -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor, sum_up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            return sum_up(x.clone())

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return grad, None

    def rank(parallel: ParallelContext) -> torch.Tensor:
        x = torch.ones(3, requires_grad=True)

        def block(y: torch.Tensor) -> torch.Tensor:
            return Scale.apply(y, parallel.tp.all_reduce).square()  # type: ignore[no-any-return,no-untyped-call]

        checkpoint(block, x, use_reentrant=reentrant).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad

    world = SimulatedWorld(tp=2)
    for grad in world.run(rank):
        assert torch.equal(grad, torch.full((3,), 4.0))
    assert len(world.trace) == 4, "each rank summed twice"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pipelining(schedule: str) -> None:
    """Batched sends and receives of microbatches, one forward and one backward in turn."""
    target = torch.zeros(8, 4, dtype=torch.float64)

    def rank(parallel: ParallelContext) -> list[torch.Tensor]:
        whole = network()
        stage = (whole[:2], whole[2:])[parallel.rank]
        pipeline = Schedule1F1B(
            PipelineStage(stage, parallel.rank, 2, torch.device("cpu")),
            4,
            loss_fn=lambda y, t: (y - t).square().mean(),
        )
        if parallel.rank == 0:
            pipeline.step(BATCH.clone())
        else:
            pipeline.step(target=target.clone(), losses=[])
        return [p.grad for p in stage.parameters() if p.grad is not None]

    model = network()
    model(BATCH).square().mean().backward()
    first, last = run_simulated(rank, dp=2, schedule=schedule)  # type: ignore[arg-type]
    torch.testing.assert_close([*first, *last], [p.grad for p in model.parameters()], rtol=1e-12, atol=1e-15)
