"""Every layout gives the loss and gradients of one rank: real gloo processes, float64, dropout on.

Layouts are the named ones and some drawn from a printed seed. That the comparison sees the classic mistakes is shown in
tests/testing/test_gallery.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.testing.processes import run_processes
from megalm.testing.runs import make_run, make_store
from megalm.train.feed import TrainFeed
from megalm.train.prepare import Prepared

pytestmark = pytest.mark.dist
RTOL = 1e-9
DROPOUT = ["model.dropout=0.2"]
MODELS = {
    "gpt2": ("causal_lm", "gpt2", [*DROPOUT, "model.attention_dropout=0.1"]),
    "gqa": ("causal_lm", "llama", [*DROPOUT, "model.kv_heads=2"]),
    "gqa-3-tied": ("causal_lm", "llama", [*DROPOUT, "model.kv_heads=3", "model.tie_embeddings=true"]),
    "bert": ("mlm+nsp", "bert", [*DROPOUT, "model.attention_dropout=0.1"]),
    "bert-pre-untied": ("mlm+nsp", "bert", [*DROPOUT, "model.norm_placement='pre'", "model.tie_embeddings=false"]),
    "mlm-no-transform": ("mlm", "bert", [*DROPOUT, "model.lm_head_transform=false", "model.vocab_size=269"]),
}


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    dp: int = 1
    sp: bool = False
    micro_batch: int = 8

    def __str__(self) -> str:
        return f"tp{self.tp}{'+sp' if self.sp else ''} dp{self.dp} mb{self.micro_batch}"


NAMED = [
    Layout(tp=2, micro_batch=8),
    Layout(tp=2, sp=True, micro_batch=4),
    Layout(dp=2, micro_batch=2),
    Layout(tp=2, dp=2, micro_batch=4),
    Layout(tp=2, dp=2, sp=True, micro_batch=1),
    Layout(tp=4, sp=True, micro_batch=8),
]


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("store"), manager=manager)


@pytest.fixture(scope="module", params=MODELS)
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: Path, manager: PluginManager
) -> Prepared:
    objective, architecture, overrides = MODELS[request.param]
    folder = tmp_path_factory.mktemp("run")
    return make_run(
        folder, data, objective=objective, architecture=architecture, overrides=overrides, manager=manager
    )


@pytest.fixture(scope="module")
def serial(prepared: Prepared) -> dict[str, torch.Tensor]:
    return loss_and_gradients(prepared, single_rank())


def on_layout(prepared: Prepared, layout: Layout) -> list[dict[str, torch.Tensor]]:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(prepared, parallel, micro_batch=layout.micro_batch)

    return run_processes(rank, tp=layout.tp, dp=layout.dp, sp=layout.sp)


def drawn_layouts(seed: int, count: int) -> Iterator[Layout]:
    draw = random.Random(seed)
    for _ in range(count):
        tp, dp = draw.choice([(1, 4), (3, 1), (3, 2), (4, 1), (5, 1), (6, 1), (2, 4), (4, 2), (1, 8)])
        sp = tp in (2, 4) and draw.random() < 0.7
        yield Layout(tp, dp, sp, draw.choice([m for m in (1, 2, 4, 8) if 8 % (m * dp) == 0]))


@pytest.mark.parametrize("layout", NAMED, ids=str)
def test_layout_equals_one_rank(prepared: Prepared, serial: dict[str, torch.Tensor], layout: Layout) -> None:
    for rank, found in enumerate(on_layout(prepared, layout)):
        assert_parity(found, serial, rtol=RTOL, label=f"{layout}, rank {rank}")


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_equals_one_microbatch(
    prepared: Prepared, serial: dict[str, torch.Tensor], micro_batch: int
) -> None:
    assert_parity(loss_and_gradients(prepared, single_rank(), micro_batch=micro_batch), serial, rtol=RTOL)


def test_drawn_layouts(prepared: Prepared, serial: dict[str, torch.Tensor], campaign_seed: int, full: bool) -> None:
    for layout in drawn_layouts(campaign_seed, 12 if full else 2):
        for found in on_layout(prepared, layout):
            assert_parity(found, serial, rtol=RTOL, label=f"{layout} (seed {campaign_seed})")


def test_uneven_counts_are_what_the_tests_above_see(tmp_path: Path, data: Path, manager: PluginManager) -> None:
    """The microbatches that are compared really score different numbers of items."""
    objective, architecture, _ = MODELS["bert"]
    prepared = make_run(tmp_path, data, objective=objective, architecture=architecture, manager=manager)
    feed = TrainFeed(prepared.objective, prepared.train, seed=7, global_batch=8, micro_batch=1, dp_index=0, dp_size=1)
    counts = [prepared.objective.counts(rows.batch)["mlm"] for rows in feed.step(0)]
    assert len(set(counts)) > 1
    assert sum(counts) > 0
