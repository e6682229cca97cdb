"""Every layout gives the loss and gradients of one rank: real gloo processes, float64, dropout on.

Layouts are the named ones and some drawn from a printed seed. Each of the classic mistakes is then made on purpose, and
must be seen by the comparison.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megalm.nn.microbatch import Microbatch
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.parity import assert_parity, differences, loss_and_gradients
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


class TestBrokenEngines:
    """Mistakes that engines make. Each must be seen in a layout that has it, and only there."""

    @pytest.fixture
    def joint(self, tmp_path: Path, data: Path, manager: PluginManager) -> Prepared:
        objective, architecture, overrides = MODELS["bert"]
        return make_run(
            tmp_path, data, objective=objective, architecture=architecture, overrides=overrides, manager=manager
        )

    def broken(self, prepared: Prepared, layout: Layout) -> list[str]:
        serial = loss_and_gradients(prepared, single_rank())
        return differences(on_layout(prepared, layout)[0], serial, rtol=RTOL)

    def test_norm_gradients_not_summed(self, joint: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ParallelContext, "token_partial", property(lambda self: ()))
        found = self.broken(joint, Layout(tp=2, sp=True))
        assert any("attention_norm.weight" in line for line in found)
        assert not any(line.startswith("loss") for line in found), "the loss alone does not show it"
        assert not self.broken(joint, Layout(tp=2))

    def test_mean_instead_of_sum(self, joint: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        import megalm.train.step as step

        summed = step.sum_counts

        def per_microbatch(objective, microbatches, parallel):  # type: ignore[no-untyped-def]
            counts = objective.counts(microbatches[0].batch)
            return {name: max(1, n * len(microbatches) * parallel.dp.size) for name, n in counts.items()}

        monkeypatch.setattr(step, "sum_counts", per_microbatch)
        serial = loss_and_gradients(joint, single_rank())
        monkeypatch.setattr(step, "sum_counts", summed)
        assert not differences(loss_and_gradients(joint, single_rank()), serial, rtol=RTOL), "one microbatch hides it"
        monkeypatch.setattr(step, "sum_counts", per_microbatch)
        found = differences(on_layout(joint, Layout(dp=2, micro_batch=2))[0], serial, rtol=RTOL)
        assert any("embedding.tokens.weight" in line for line in found)

    def test_shift_inside_the_loss(
        self, tmp_path: Path, data: Path, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The label of a shard's last token lies on the next rank."""
        prepared = make_run(tmp_path, data, overrides=DROPOUT, manager=manager)
        (objective,) = prepared.objective.parts.values()

        def shifted(self, hidden, batch, ctx):  # type: ignore[no-untyped-def]
            model, rows = ctx._model, ctx._batch
            local = rows.tensors["tokens"].reshape(-1)[slice(*rows.shard)]
            labels = torch.roll(local, -1)
            labels[-1] = -100
            whole = model.parallel.tp.all_gather(labels) if model.parallel.sp else labels
            from megalm.plugin.contract.objective import Term

            return {"causal_lm": Term(ctx.lm_loss(hidden, whole.view(rows.rows, rows.length)).sum())}

        monkeypatch.setattr(type(objective), "loss", shifted)
        found = self.broken(prepared, Layout(tp=2, sp=True))
        assert any(line.startswith("loss") for line in found)
        assert not self.broken(prepared, Layout(tp=2))

    def test_dropout_by_rank(self, joint: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        correct = Microbatch.dropout

        def by_rank(self: Microbatch, x_TF: torch.Tensor, p: float, site: str) -> torch.Tensor:
            address = self.shard_address
            if address is None:
                return x_TF
            spans = tuple(replace(s, start=0, stop=s.stop - s.start) for s in address.spans)
            return correct(replace(self, shard_address=replace(address, spans=spans)), x_TF, p, site)

        monkeypatch.setattr(Microbatch, "dropout", by_rank)
        assert self.broken(joint, Layout(tp=2, sp=True, micro_batch=1))
        assert not self.broken(joint, Layout(tp=2))

    def test_vocabulary_shard_off_by_one(self, joint: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        import megalm.model.heads as heads

        correct = heads.linear_cross_entropy

        def off(*args, first_row: int, **kwargs):  # type: ignore[no-untyped-def]
            return correct(*args, first_row=first_row + (args[3].size > 1), **kwargs)

        monkeypatch.setattr(heads, "linear_cross_entropy", off)
        assert self.broken(joint, Layout(tp=2))
        assert not self.broken(joint, Layout(dp=2, micro_batch=4))


def test_uneven_counts_are_what_the_tests_above_see(tmp_path: Path, data: Path, manager: PluginManager) -> None:
    """The microbatches that are compared really score different numbers of items."""
    objective, architecture, _ = MODELS["bert"]
    prepared = make_run(tmp_path, data, objective=objective, architecture=architecture, manager=manager)
    feed = TrainFeed(prepared.objective, prepared.train, seed=7, global_batch=8, micro_batch=1, dp_index=0, dp_size=1)
    counts = [prepared.objective.counts(rows.batch)["mlm"] for rows in feed.step(0)]
    assert len(set(counts)) > 1
    assert sum(counts) > 0
