"""What a step of the engine says, operation by operation, against closed formulas."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.model.language_model import LanguageModel
from megalm.nn.module import materialise
from megalm.optim.gradients import finish_gradients, global_norm
from megalm.optim.weights import Weights
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.parallel.sim import SimulatedWorld, Volume
from megalm.parallel.sim.errors import SimulationError
from megalm.parallel.sim.trace import comm_volume
from megalm.train.feed import TrainFeed
from megalm.train.prepare import Prepared
from megalm.train.step import forward_backward

PreparedRun = Callable[..., Prepared]
BYTES = 8  # float64, int64
LENGTH, GLOBAL_BATCH = 16, 8


def step(prepared: Prepared, parallel: ParallelContext, micro_batch: int) -> int:
    """One step without the optimizer; the number of elements that this rank holds."""
    seed = prepared.resolved.config.run.seed
    model = LanguageModel(prepared.spec, parallel)
    materialise(model, parallel, seed, torch.float64)
    weights = Weights(model, parallel, torch.float64)
    feed = TrainFeed(
        prepared.objective,
        prepared.train,
        seed=seed,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        dp_index=parallel.dp.index,
        dp_size=parallel.dp.size,
    )
    with phase("microbatches"):
        forward_backward(model, prepared.objective, feed.step(0), seed=seed, step=0)
    with phase("gradients"):
        finish_gradients(weights)
    with phase("norm"):
        global_norm(weights)
    return sum(p.numel() for p in model.parameters())


def volumes(world: SimulatedWorld, *fields: str) -> dict[tuple[Any, ...], Volume]:
    """As ``comm_volume(by=fields)``, where phase means the outermost label: that of :func:`step`, not the engine's."""
    records = [replace(record, phase=record.phase.split(" > ")[0]) for record in world.trace]
    return comm_volume(records, fields)


@dataclass(frozen=True)
class Case:
    """A GPT-2 of ``layers`` layers and ``width`` features on a layout."""

    tp: int
    dp: int
    sp: bool
    layers: int
    width: int
    micro_batch: int

    @property
    def microbatches(self) -> int:
        return GLOBAL_BATCH // self.dp // self.micro_batch

    @property
    def hidden(self) -> int:
        """Bytes of the activations of all tokens of a microbatch."""
        return self.micro_batch * LENGTH * self.width * BYTES

    def expected(self, held: int) -> dict[tuple[str, str, str], tuple[int, int]]:
        """(phase, axis, operation) -> (calls, payload) of each rank, which holds ``held`` elements."""
        m, layers, t = self.microbatches, self.layers, self.micro_batch * LENGTH
        out: dict[tuple[str, str, str], tuple[int, int]] = {}
        statistics = (2 * m, m * (t + 2 * t) * BYTES)  # the maxima; sums and target logits
        if self.tp > 1 and self.sp:
            # 4 + 4 a layer; the embedding scatters, its gradient gathers; the loss gathers, its gradient scatters.
            each = m * (4 * layers + 2)
            out["microbatches", "tp", "all_gather"] = (each, each * self.hidden)
            out["microbatches", "tp", "reduce_scatter"] = (each, each * self.hidden)
            out["microbatches", "tp", "all_reduce"] = statistics
            # Two norms and two row biases a layer, the last norm, positions.
            partial = layers * (2 * 2 + 2) * self.width + 2 * self.width + LENGTH * self.width
            out["gradients", "tp", "all_reduce"] = (1, partial * BYTES)
        elif self.tp > 1:
            # 4 a layer; the embedding's sum; the gradient of the loss.
            each = m * (4 * layers + 2)
            out["microbatches", "tp", "all_reduce"] = (each + statistics[0], each * self.hidden + statistics[1])
        if self.tp > 1:
            out["norm", "tp", "all_reduce"] = (1, BYTES)
        if self.dp > 1:
            out["microbatches", "dp", "all_reduce"] = (2, 2 * BYTES)  # count and sum of the one term
            out["gradients", "dp", "all_reduce"] = (1, held * BYTES)
        return out


NAMED = [
    Case(tp=2, dp=1, sp=False, layers=2, width=24, micro_batch=4),
    Case(tp=2, dp=1, sp=True, layers=2, width=24, micro_batch=4),
    Case(tp=2, dp=2, sp=True, layers=1, width=32, micro_batch=2),
    Case(tp=1, dp=4, sp=False, layers=1, width=16, micro_batch=1),
]


def drawn(seed: int) -> Case:
    draw = random.Random(seed)
    tp, dp = draw.choice([(4, 1), (4, 2), (2, 4), (8, 1)])
    return Case(
        tp, dp, draw.random() < 0.6, draw.randint(1, 3), 8 * draw.randint(1, 4), draw.choice([1, GLOBAL_BATCH // dp])
    )


def check(case: Case, prepared_run: PreparedRun) -> None:
    prepared = prepared_run("gpt2", f"model.layers={case.layers}", f"model.hidden_size={case.width}", "model.heads=8")
    world = SimulatedWorld(tp=case.tp, dp=case.dp, sp=case.sp)
    held = world.run(lambda parallel: step(prepared, parallel, case.micro_batch))
    found = volumes(world, "rank", "phase", "group", "operation")
    for rank in range(world.size):
        mine = {key[1:]: (v.calls, v.payload) for key, v in found.items() if key[0] == rank}
        assert mine == case.expected(held[rank]), f"rank {rank} of {case}"


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_a_step_of_gpt2(case: Case, prepared_run: PreparedRun) -> None:
    check(case, prepared_run)


def test_drawn_steps_of_gpt2(prepared_run: PreparedRun, campaign_seed: int, full: bool) -> None:
    for seed in range(campaign_seed, campaign_seed + (20 if full else 2)):
        check(drawn(seed), prepared_run)


@pytest.mark.parametrize("model", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("sp", [False, True])
def test_a_layer_more(model: str, sp: bool, prepared_run: PreparedRun) -> None:
    """A layer and microbatch: 4 all-reduces; 4 all-gathers and 4 reduce-scatters under SP, and as many bytes sent."""

    def of(layers: int) -> dict[tuple[str, ...], Volume]:
        world = SimulatedWorld(tp=2, sp=sp)
        prepared = prepared_run(model, f"model.layers={layers}")
        world.run(lambda parallel: step(prepared, parallel, 4))
        return volumes(world, "phase", "operation")

    few, many = of(1), of(2)
    more = {
        operation: tuple(
            getattr(volume, field) - (getattr(few[label, operation], field) if (label, operation) in few else 0)
            for field in ("calls", "payload", "wire")
        )
        for (label, operation), volume in many.items()
        if label == "microbatches"
    }
    hidden, ranks, microbatches = 4 * LENGTH * 24 * BYTES, 2, 2
    each = 4 * ranks * microbatches
    if sp:
        scattered = (each, each * hidden, each * hidden / 2)
        assert more == {"all_gather": scattered, "reduce_scatter": scattered, "all_reduce": (0, 0, 0)}
    else:
        assert more == {"all_reduce": (each, each * hidden, each * hidden)}


def test_every_kind_of_operation() -> None:
    """Payload and wire of each, for three ranks and four bytes an element."""

    def program(parallel: ParallelContext) -> None:
        rank, group = dist.get_rank(), parallel.world
        group.all_reduce(torch.zeros(6))
        group.all_gather(torch.zeros(2))
        group.reduce_scatter(torch.zeros(6))
        group.broadcast(torch.zeros(6), 1)
        dist.all_to_all_single(torch.zeros(6), torch.zeros(6))
        dist.gather(torch.zeros(2), [torch.zeros(2) for _ in range(3)] if rank == 0 else None, dst=0)
        dist.scatter(torch.zeros(2), [torch.zeros(2) for _ in range(3)] if rank == 0 else None, src=0)
        dist.barrier()
        if rank == 0:
            dist.send(torch.zeros(6), 2)
        if rank == 2:
            dist.recv(torch.zeros(6), 0)

    world = SimulatedWorld(dp=3)
    world.run(program)
    payload = {(k[0], k[1]): (v.payload, round(v.wire, 9)) for k, v in world.comm_volume(("rank", "operation")).items()}
    for rank in range(3):
        assert payload[rank, "all_reduce"] == (24, 32)
        for kind in ("all_gather", "reduce_scatter", "broadcast", "all_to_all"):
            assert payload[rank, kind] == (24, 16), kind
        assert payload[rank, "gather"] == (8, 0 if rank == 0 else 8)
        assert payload[rank, "scatter"] == ((24, 16) if rank == 0 else (8, 0))
        assert payload[rank, "barrier"] == (0, 0)
    assert payload[0, "send"] == (24, 24)
    assert payload[2, "recv"] == (24, 0)
    assert [r.peer for r in world.trace if r.operation == "send"] == [2]


def test_ranks_of_one_program_say_the_same(prepared_run: PreparedRun) -> None:
    prepared = prepared_run("bert")
    world = SimulatedWorld(tp=2, sp=True)
    world.run(lambda parallel: step(prepared, parallel, 2))
    said = [[record.said for record in world.trace if record.rank == rank] for rank in range(2)]
    assert said[0] == said[1]
    assert len(said[0]) > 20


def test_a_block_of_runs_has_one_trace() -> None:
    world = SimulatedWorld(dp=2)

    def say(parallel: ParallelContext) -> None:
        parallel.dp.all_reduce(torch.ones(3))

    with world:
        world.run(say)
        world.run(say)
        assert len(world.trace) == 4
    assert world.comm_volume(by=("rank",)) == {(0,): Volume(2, 24, 24.0), (1,): Volume(2, 24, 24.0)}
    world.run(say)
    assert len(world.trace) == 2


@pytest.mark.parametrize("by", [("rnk",), ("rank", "rnk"), "rank"])
def test_sums_by_a_field_that_records_do_not_have(by: tuple[str, ...]) -> None:
    world = SimulatedWorld(tp=2)
    world.run(lambda parallel: parallel.tp.all_reduce(torch.zeros(1)))
    with pytest.raises(SimulationError, match=r"cannot be summed by .*a record has the fields rank, number"):
        world.comm_volume(by=by)
