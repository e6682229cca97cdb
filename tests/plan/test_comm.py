"""A plan's numbers against those of simulated ranks, which really compute, and against closed formulas by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalm.ops import linear_cross_entropy
from megalm.plan.comm import AlikeRanks, largest
from megalm.plan.entries import total
from megalm.plan.recording import Grid
from megalm.plugin.contract.objective import LossContext, Term
from megalm.train.feed import Rows, evaluation_rows
from megalm.train.prepare import Prepared
from megalm.train.step import AT_ONCE

from .cases import CPU, Case, PreparedRun, check, plan_of, planner_of
from .truth import assert_same, planned, simulated_evaluation

ACCUMULATE = "train.micro_batch=2"
FGM = 'train.adversarial={method="fgm", epsilon=0.5}'
FREELB = 'train.adversarial={method="freelb", epsilon=0.5, step_size=0.1, steps=4}'
LARGEST = 'train.adversarial={method="freelb", epsilon=0.5, step_size=0.1, steps=2, norm="linf"}'
REPLACED = Case("bert", Grid(2, 2), ("train.objective=rtd", "objective.rtd.generator_width=0.5", ACCUMULATE))
HIDDEN = ("objective.distill.hidden_weight=0.5", "objective.distill.teacher_hidden_size=36")
NAMED = [
    Case("gpt2", Grid(2, 1), ("model.layers=3", ACCUMULATE)),
    Case("gpt2", Grid(2, 2, True), (ACCUMULATE, "model.dropout=0.2", "model.attention_dropout=0.1")),
    Case("gpt2", Grid(1, 4), ("train.micro_batch=1",)),
    Case("gpt2", Grid(1, 1, True)),
    Case("gpt2", Grid(4, 1), ("model.tie_embeddings=false", "model.lm_head_bias=true", "train.precision=float32")),
    Case("gpt2", Grid(2, 1, True), ("model.lm_head_transform=true", "train.precision=bfloat16")),
    Case("llama", Grid(2, 2), ("model.kv_heads=3", "train.micro_batch=4", "train.precision=bfloat16")),
    Case("llama", Grid(3, 1), ("model.kv_heads=2", "model.qkv_bias=true")),
    Case("llama", Grid(4, 1, True), ("model.kv_heads=2",)),
    Case("llama", Grid(4, 2, True), ("model.kv_heads=3", "model.tie_embeddings=true", "train.micro_batch=4")),
    Case("llama", Grid(5, 1), ("model.kv_heads=1", "model.vocab_size=303")),
    Case("llama", Grid(6, 1), ("model.kv_heads=2", "model.head_dim=4")),
    Case("bert", Grid(2, 2), (ACCUMULATE,)),
    Case("bert", Grid(2, 2, True), ("train.micro_batch=1", "train.precision=bfloat16")),
    Case("bert", Grid(4, 1, True), ("model.lm_head_transform=false", "model.embedding_norm=false")),
    Case("bert", Grid(3, 1), ("train.objective=mlm", "objective.mlm.mask_prob=0.02", "train.micro_batch=1")),
    Case("bert", Grid(2, 1, True), ("train.objective=nsp", "train.precision=float32")),
    Case("bert", Grid(2, 2, True), ("train.objective=span_mlm", ACCUMULATE)),
    Case("bert", Grid(3, 1), ("train.objective=sop+span_mlm", "train.precision=float32")),
    Case("bert", Grid(2, 2), ("train.objective=contrastive", "train.micro_batch=4", "train.cell=8")),
    Case("gpt2", Grid(2, 2, True), ("train.objective=denoise", ACCUMULATE)),
    REPLACED,
    Case("bert", Grid(2, 1, True), ("train.objective=rtd+sop", "objective.rtd.generator_width=0.5", ACCUMULATE)),
    Case("gpt2", Grid(2, 1, True), ("train.recompute=full", "model.dropout=0", ACCUMULATE)),
    Case("gpt2", Grid(2, 2), ("train.objective=causal_lm+distill", "train.precision=bfloat16", ACCUMULATE)),
    Case("bert", Grid(3, 1), ("train.objective=distill+mlm", "train.micro_batch=1", "objective.mlm.mask_prob=0.02")),
    Case("bert", Grid(2, 2, True), ("train.objective=distill+mlm+nsp", "model.lm_head_transform=false", ACCUMULATE)),
    Case("bert", Grid(2, 2, True), ("train.objective=distill+mlm", *HIDDEN, ACCUMULATE)),
    Case("gpt2", Grid(2, 2), ("train.recompute=full", "model.dropout=0.1", ACCUMULATE)),
    Case("llama", Grid(3, 1), ("train.recompute=full", "model.gated=true", "model.norm_placement=post")),
    Case("bert", Grid(2, 1, True), ("train.recompute=full", "train.precision=bfloat16")),
    Case("gpt2", Grid(2, 2), ("finetune.method=lora", "model.layers=2", ACCUMULATE)),
    Case("llama", Grid(3, 1), ("finetune.method=lora", "finetune.lora_targets=['out','down']", "model.kv_heads=2")),
    Case("gpt2", Grid(2, 1, True), ("finetune.method=adapter", "finetune.adapter_size=5", "model.layers=2")),
    Case("bert", Grid(2, 1, True), ("finetune.method=frozen", "finetune.frozen_layers=1", "model.layers=3")),
    Case("bert", Grid(2, 2), ("finetune.method=frozen", ACCUMULATE)),
    Case("llama", Grid(4, 2, True), ("train.optimizer=lamb", "model.kv_heads=3", "train.micro_batch=4")),
    Case("gpt2", Grid(2, 1), ("train.optimizer=lamb", "finetune.method=lora", "model.layers=2"), pp=2),
    Case("bert", Grid(2, 2, True), (FGM, ACCUMULATE)),
    Case("bert", Grid(2, 1, True), (FREELB, "train.micro_batch=4", "train.recompute=full")),
    Case("gpt2", Grid(2, 1, True), (LARGEST, "train.precision=bfloat16", ACCUMULATE)),
    Case("llama", Grid(2, 2), (FREELB, ACCUMULATE)),
    Case("bert", Grid(2, 1), (FGM, "train.objective=rtd", "objective.rtd.generator_width=0.5")),
    Case("bert", Grid(2, 1, True), (FGM, "finetune.method=frozen", "finetune.frozen_layers=1", "model.layers=3")),
    Case("bert", Grid(2, 1, True), (FREELB, "finetune.method=frozen", "train.recompute=full")),
    Case(
        "bert",
        Grid(2, 1),
        ("finetune.method=frozen", "finetune.frozen_layers=2", "model.layers=3", "train.recompute=full"),
    ),
]


def drawn(seed: int) -> Case:
    """Any layout of up to 8 ranks."""
    draw = random.Random(seed)
    model = draw.choice(["gpt2", "llama", "bert"])
    tp = draw.choice([1, 2, 3, 4, 5, 6])
    dp = draw.choice([n for n in (1, 2, 4) if n * tp <= 8])
    sp = draw.random() < 0.5 and 16 % tp == 0
    heads = draw.choice([6, 8])
    flags = ("model.tie_embeddings", "model.lm_head_transform", "model.lm_head_bias", "model.gated", "model.qkv_bias")
    overrides = [f"{flag}={str(draw.random() < 0.5).lower()}" for flag in flags]
    overrides += [
        f"model.layers={draw.randint(1, 3)}",
        f"model.heads={heads}",
        f"model.hidden_size={heads * 2 * draw.randint(1, 4)}",
        f"model.kv_heads={draw.choice([k for k in range(1, heads + 1) if heads % k == 0])}",
        f"model.ffn_size={draw.randint(8, 60)}",
        f"model.vocab_size={draw.randint(262, 330)}",
        f"model.norm={draw.choice(['layer_norm', 'rms_norm'])}",
        f"model.position={draw.choice(['learned', 'rope', 'none'])}",
        f"train.micro_batch={draw.choice([m for m in (1, 2, 4, 8) if 8 % (m * dp) == 0])}",
        f"train.precision={draw.choice(['float32', 'float64', 'bfloat16'])}",
        f"train.recompute={draw.choice(['none', 'full'])}",
        f"model.dropout={draw.choice([0, 0.1])}",
        f"train.optimizer={draw.choice(['adamw', 'lamb', 'lion', 'sgd'])}",
    ]
    if model == "bert":
        overrides.append(f"train.objective={draw.choice(['mlm', 'nsp', 'mlm+nsp'])}")
    return Case(model, Grid(tp, dp, sp), tuple(overrides))


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_a_plan_is_what_simulated_ranks_say(case: Case, prepared_run: PreparedRun) -> None:
    case.check(prepared_run)


def test_drawn_layouts(prepared_run: PreparedRun, campaign_seed: int, full: bool) -> None:
    for seed in range(campaign_seed, campaign_seed + (100 if full else 6)):
        drawn(seed).check(prepared_run)


def items(each: AlikeRanks) -> dict[tuple[str, str, str], tuple[int, int]]:
    return {(e.item, e.axis, e.operation): (e.volume.calls, e.volume.payload) for e in each.entries}


def test_megatrons_formulas(prepared_run: PreparedRun) -> None:
    """A layer and microbatch: 4 all-reduces of b*s*h under TP; 4 all-gathers and 4 reduce-scatters under TP + SP."""
    layers, b, s, h, m = 3, 2, 16, 24, 4
    hidden = b * s * h * 8
    tokens = b * s * 8
    plain, sharded = (
        plan_of(
            Case("gpt2", Grid(4, 1, sp), (f"model.layers={layers}", ACCUMULATE)).prepare(prepared_run), Grid(4, 1, sp)
        )
        for sp in (False, True)
    )
    assert [each.ranks for each in (*plain, *sharded)] == [(0, 1, 2, 3)] * 2
    half = 2 * layers * m
    common = {
        ("loss statistics", "tp", "all_reduce"): (2 * m, m * 3 * tokens),
        ("gradient norm", "tp", "all_reduce"): (1, 8),
    }
    assert items(plain[0]) == common | {
        ("embedding", "tp", "all_reduce"): (m, m * hidden),
        ("attention", "tp", "all_reduce"): (half, half * hidden),
        ("mlp", "tp", "all_reduce"): (half, half * hidden),
        ("loss gradient", "tp", "all_reduce"): (m, m * hidden),
    }
    # Two norms and two row biases a layer, the last norm, positions: what each rank sees of its own tokens only.
    partial = layers * (2 * 2 + 2) * h + 2 * h + s * h
    both = ("all_gather", "reduce_scatter")
    assert items(sharded[0]) == common | {
        **{("embedding", "tp", kind): (m, m * hidden) for kind in both},
        **{("attention", "tp", kind): (half, half * hidden) for kind in both},
        **{("mlp", "tp", kind): (half, half * hidden) for kind in both},
        ("hidden vectors for the loss", "tp", "all_gather"): (m, m * hidden),
        ("loss gradient", "tp", "reduce_scatter"): (m, m * hidden),
        ("gradients of token shards", "tp", "all_reduce"): (1, partial * 8),
    }
    wires = [sum(e.volume.wire for e in each[0].entries if e.item in ("attention", "mlp")) for each in (plain, sharded)]
    assert wires[0] == wires[1] == 4 * layers * m * hidden * 2 * 3 / 4


def test_shared_rows_and_uneven_ranks_by_hand(prepared_run: PreparedRun) -> None:
    """Six query heads on four ranks; three of them read each of two key/value heads, so the second rank has both."""
    sizes = ("model.kv_heads=2", "model.ffn_size=64", "model.vocab_size=262", "train.micro_batch=4")
    case = Case("llama", Grid(4, 2), sizes)
    found = plan_of(case.prepare(prepared_run), case.grid)
    h, d, vocab = 24, 4, (66, 66, 65, 65)
    queries, keys = (2, 2, 1, 1), (1, 2, 1, 1)
    for each in found:
        for rank in each.ranks:
            t = rank % 4
            held = 2 * vocab[t] * h + (queries[t] + 2 * keys[t]) * d * h + queries[t] * d * h + 3 * 16 * h + 3 * h
            assert items(each)["data-parallel gradients", "dp", "all_reduce"] == (1, held * 8)
            assert items(each)["rows that ranks share", "tp", "all_reduce"] == (2, 2 * 2 * d * h * 8)
            assert items(each)["counts and loss sums", "dp", "all_reduce"] == (2, 16)
    assert sorted(rank for each in found for rank in each.ranks) == list(range(8))
    assert len(found) > 1
    assert total(largest(found).entries).wire == max(total(each.entries).wire for each in found)


def test_the_loss_in_chunks(prepared_run: PreparedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 8 * 131 * 50)
    monkeypatch.setattr(linear_cross_entropy, "FEWEST_TOKENS", 1)
    case = Case("gpt2", Grid(2, 1), ("model.vocab_size=262",))
    case.check(prepared_run)
    statistics = items(plan_of(case.prepare(prepared_run), case.grid)[0])["loss statistics", "tp", "all_reduce"]
    assert statistics[0] == 2 * 3
    # Chunks of the vocabulary say what they have to say together.
    monkeypatch.setattr(linear_cross_entropy, "FEWEST_TOKENS", 1000)
    case.check(prepared_run)
    statistics = items(plan_of(case.prepare(prepared_run), case.grid)[0])["loss statistics", "tp", "all_reduce"]
    assert statistics[0] == 2


def test_gradients_in_several_messages(prepared_run: PreparedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.optim.gradients._BUCKET_ELEMENTS", 1000)
    for grid in (Grid(2, 2, True), Grid(1, 2)):
        case = Case("gpt2", grid, ("train.micro_batch=4",))
        case.check(prepared_run)
        found = items(plan_of(case.prepare(prepared_run), grid)[0])
        assert found["data-parallel gradients", "dp", "all_reduce"][0] > 3


class ThirdParty:
    """An objective as plugins may write one; ``weights``, ``counts`` and checks are those of the run's own."""

    def __init__(self, prepared: Prepared, score: Callable[[Any, Any, LossContext], torch.Tensor | None]) -> None:
        self._own = prepared.objective
        self._score = score
        self.members = (self,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        scored = self._score(hidden, batch, ctx)
        return {} if scored is None else {name: Term(scored) for name in self._own.weights}

    def check_terms(self, *_: Any) -> None: ...


def pool_against_full(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
    mask = batch["labels"] % 2 == 0
    whole = ctx.full_sequence(hidden)
    return F.cosine_similarity(ctx.pool(hidden, mask), whole[:, 3], dim=-1).sum() + whole[mask].square().mean()


def two_losses_one_detached(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
    scored = batch["labels"] > 100
    return ctx.lm_loss(hidden, batch["labels"]).detach().sum() + ctx.lm_loss(hidden, batch["labels"], scored).sum()


def no_gradient(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
    return ctx.lm_loss(hidden, batch["labels"]).sum().detach()


def only_the_head_learns(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
    return ctx.lm_loss(hidden.detach(), batch["labels"]).sum()


def nothing_scored(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
    return ctx.lm_loss(hidden, batch["labels"], torch.zeros_like(batch["labels"], dtype=torch.bool)).sum()


def sometimes_nothing(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor | None:
    return ctx.take(hidden, batch["labels"][:, :2] % 16).sum() if int(batch["labels"].sum()) % 2 else None


SCORES = (
    pool_against_full,
    two_losses_one_detached,
    no_gradient,
    only_the_head_learns,
    nothing_scored,
    sometimes_nothing,
)


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("transform", ["false", "true"])
def test_any_objective_is_asked(score: Any, sp: bool, transform: str, prepared_run: PreparedRun) -> None:
    case = Case("gpt2", Grid(2, 2, sp), ("train.micro_batch=1", f"model.lm_head_transform={transform}"))
    prepared = case.prepare(prepared_run)
    other = replace(prepared, objective=ThirdParty(prepared, score))
    check(other, case.grid, case)


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_of_a_cell(tp: int, prepared_run: PreparedRun) -> None:
    """In-batch negatives: what ctx.gather brings together, and its gradient."""

    def contrast(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
        mine = ctx.pick(hidden, 0)
        rows, first = ctx.gather(mine)
        return F.cross_entropy(mine @ rows.t(), torch.arange(len(mine)) + first, reduction="sum")

    case = Case("gpt2", Grid(tp, 2), ("train.micro_batch=4",))
    prepared = case.prepare(prepared_run)
    coupled = replace(prepared, spec=replace(prepared.spec, coupling="cell"), objective=ThirdParty(prepared, contrast))
    check(coupled, case.grid, case)
    found = plan_of(coupled, case.grid)
    assert items(found[0])["rows of a cell", "dp", "all_gather"] == (1, 8 * 24 * 8)
    assert items(found[0])["gradient of a cell's rows", "dp", "reduce_scatter"] == (1, 8 * 24 * 8)


def test_modules_of_an_objective_have_the_true_width(prepared_run: PreparedRun) -> None:
    """A module may be built for the hidden size alone, and be larger than it."""

    def build(hidden_size: int, ctx: Any) -> torch.nn.Module:
        assert hidden_size == 24
        module: torch.nn.Module = ctx.linear(hidden_size // 12, 3 * hidden_size)
        return module

    def scored(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
        picked = ctx.pick(hidden, 1)
        return ctx.module("probe")(picked.view(len(picked), 12, -1)).sum() + ctx.lm_loss(hidden, batch["labels"]).sum()

    case = Case("gpt2", Grid(2, 2, True), ("train.micro_batch=2",))
    prepared = case.prepare(prepared_run)
    spec = replace(prepared.spec, modules={"probe": build})
    owning = replace(prepared, spec=spec, objective=ThirdParty(prepared, scored))
    check(owning, case.grid, case)


def test_communication_that_depends_on_hidden_values_is_refused(prepared_run: PreparedRun) -> None:
    def fickle(hidden: Any, batch: Any, ctx: LossContext) -> torch.Tensor:
        return sum((ctx.pick(hidden, 0).sum() for _ in range(hidden.shape[-1])), torch.zeros(()))

    case = Case("gpt2", Grid(2, 1, True))
    prepared = case.prepare(prepared_run)
    with pytest.raises(Exception, match="communicates 4 or 8 times, depending on the values of hidden vectors"):
        plan_of(replace(prepared, objective=ThirdParty(prepared, fickle)), case.grid)


@pytest.mark.parametrize("case", [NAMED[1], NAMED[9], NAMED[12], REPLACED], ids=str)
def test_an_evaluation(case: Case, prepared_run: PreparedRun) -> None:
    prepared, grid = case.prepare(prepared_run), case.grid

    def rows(dp: int) -> Iterator[Rows]:
        micro = prepared.resolved.config.train.micro_batch
        return evaluation_rows(
            prepared.objective,
            prepared.validation,
            seed=7,
            samples=7,
            micro_batch=micro,
            dp_index=dp,
            dp_size=grid.dp,
        )

    planner = planner_of(prepared, grid)
    found = planner.evaluation(prepared.objective, lambda dp: (each.tensors(CPU) for each in rows(dp)), at_once=AT_ONCE)
    truth = simulated_evaluation(prepared, rows, tp=grid.tp, pp=case.pp, dp=grid.dp, sp=grid.sp)
    assert_same(planned(found), truth, case)
