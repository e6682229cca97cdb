"""Simulated layouts give the loss and gradients of one rank, and the same bits under every schedule."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import SimulatedWorld, run_simulated
from megalm.pipeline.plan import make_pipeline
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.train.prepare import Prepared

PreparedRun = Callable[..., Prepared]
RTOL = 1e-10


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    dp: int = 1
    sp: bool = False

    def __str__(self) -> str:
        return f"tp{self.tp}{'+sp' if self.sp else ''} dp{self.dp}"

    @property
    def micro_batch(self) -> int:
        return max(1, 4 // self.dp)


NAMED = [
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(dp=2),
    Layout(tp=2, dp=2, sp=True),
    Layout(tp=4, sp=True),
]


def drawn(seed: int, count: int) -> Iterator[Layout]:
    draw = random.Random(seed)
    for _ in range(count):
        tp = draw.choice([1, 2, 3, 4, 5, 6, 8])
        dp = draw.choice([d for d in (1, 2, 4, 8) if tp * d <= 16])
        yield Layout(tp, dp, sp=tp in (2, 4, 8) and draw.random() < 0.7)


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def prepared(request: pytest.FixtureRequest, prepared_run: PreparedRun) -> Prepared:
    # Eight heads, so that eight ranks have one each.
    return prepared_run(request.param, "model.hidden_size=32", "model.heads=8")


@pytest.fixture(scope="module")
def serial(prepared: Prepared) -> dict[str, torch.Tensor]:
    return loss_and_gradients(prepared, single_rank())


def ranks(prepared: Prepared, layout: Layout, **options: object) -> list[dict[str, torch.Tensor]]:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(prepared, parallel, micro_batch=layout.micro_batch)

    return run_simulated(rank, tp=layout.tp, dp=layout.dp, sp=layout.sp, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", NAMED, ids=str)
def test_layout_equals_one_rank(prepared: Prepared, serial: dict[str, torch.Tensor], layout: Layout) -> None:
    for number, found in enumerate(ranks(prepared, layout)):
        assert_parity(found, serial, rtol=RTOL, label=f"{layout}, rank {number}")


def test_drawn_layouts(prepared: Prepared, serial: dict[str, torch.Tensor], campaign_seed: int, full: bool) -> None:
    for layout in drawn(campaign_seed, 16 if full else 2):
        for found in ranks(prepared, layout):
            assert_parity(found, serial, rtol=RTOL, label=f"{layout} (seed {campaign_seed})")


def test_sixteen_ranks(prepared: Prepared, serial: dict[str, torch.Tensor], full: bool) -> None:
    for layout in [Layout(tp=2, dp=8, sp=True), Layout(tp=8, dp=2), Layout(tp=4, dp=4, sp=True)][: 3 if full else 1]:
        for found in ranks(prepared, layout):
            assert_parity(found, serial, rtol=RTOL, label=str(layout))


def test_every_schedule_gives_the_same_bits(prepared: Prepared) -> None:
    layout = Layout(tp=2, dp=2, sp=True)
    expected = ranks(prepared, layout)
    for seed in range(2):
        for a, b in zip(expected, ranks(prepared, layout, schedule="random", seed=seed), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("grid", [(8, 1, 8), (4, 4, 4)], ids=["tp8 dp8", "tp4 pp4 dp4"])
def test_sixty_four_ranks(prepared_run: PreparedRun, grid: tuple[int, int, int], full: bool) -> None:
    if not full:
        pytest.skip("takes long; runs with the full counts")
    tp, pp, dp = grid
    prepared = prepared_run("llama", "model.hidden_size=32", "model.heads=8", "model.kv_heads=4", "model.layers=4")
    serial = loss_and_gradients(prepared, single_rank())
    pipeline = make_pipeline(prepared.spec, prepared.manager, schedule="1f1b", ranks=pp, microbatches=8 // dp)

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(prepared, parallel, micro_batch=1, pipeline=pipeline)

    found = run_simulated(rank, tp=tp, pp=pp, dp=dp, sp=True)
    for number in (0, 63):
        assert_parity(found[number], serial, rtol=RTOL)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(dp=2)], ids=str)
def test_groups_of_one_may_communicate_too(
    prepared: Prepared, serial: dict[str, torch.Tensor], layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU exercises NCCL with short-circuits off; the same code path, here."""
    monkeypatch.setenv("MEGALM_NO_SHORT_CIRCUIT", "1")
    world = SimulatedWorld(tp=layout.tp, dp=layout.dp, sp=layout.sp)
    found = world.run(lambda parallel: loss_and_gradients(prepared, parallel, micro_batch=layout.micro_batch))
    assert_parity(found[0], serial, rtol=RTOL, label=str(layout))
    assert {record.group for record in world.trace} >= {"tp", "dp"}
