"""Plans of pipelines, item by item, against what simulated ranks say, and by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megalm.plan.comm as comm
from megalm.errors import ConfigError
from megalm.pipeline.choose import KIND, choose
from megalm.plan.entries import Entry, total
from megalm.plan.recording import Grid
from megalm.plugin.contract.pipeline import PipelineShape
from megalm.plugin.manager import PluginManager
from megalm.train.feed import Rows, evaluation_rows
from megalm.train.prepare import Prepared

from .cases import CPU, Case, PreparedRun, check, plan_of, planner_of
from .test_comm import FGM, FREELB, HIDDEN, SCORES, ThirdParty
from .truth import assert_same, planned, simulated_evaluation, simulated_step

ONE, TWO = "train.micro_batch=1", "train.micro_batch=2"


def run(schedule: str, *more: str) -> tuple[str, ...]:
    return (f'parallel.pp_schedule="{schedule}"', *more)


TAUGHT = "train.objective=causal_lm+distill"
NAMED = [
    Case("gpt2", Grid(2, 1), ("finetune.method=lora", "model.layers=2", "train.micro_batch=2"), pp=2),
    Case("gpt2", Grid(), run("gpipe", "model.layers=3", TWO), 2),
    Case("gpt2", Grid(2, 2, True), run("1f1b", "model.layers=4", ONE, "train.precision=bfloat16"), 2),
    Case("gpt2", Grid(2), run("1f1b", "model.layers=5", "parallel.pp_split=[1,1,3]", "train.recompute=full", TWO), 3),
    Case("llama", Grid(2, 1, True), run("interleaved", "model.layers=4", "model.kv_heads=2", TWO), 2),
    Case("llama", Grid(3, 1), run("zb-h1", "model.layers=4", "model.vocab_size=301", ONE), 4),
    Case("llama", Grid(2, 2), run("zb-v", "model.layers=4", "model.tie_embeddings=true", TWO), 2),
    Case("bert", Grid(2, 1, True), run("zb-h1", "model.layers=3", ONE, "model.tie_embeddings=true"), 3),
    Case("bert", Grid(1, 2), run("interleaved", "parallel.pp_virtual=3", "model.layers=6", ONE), 2),
    Case("bert", Grid(2, 1, True), run("zb-v", "model.layers=4", "train.recompute=full", TWO), 2),
    Case(
        "bert",
        Grid(2, 1, True),
        run("zb-v", "train.objective=rtd", "objective.rtd.generator_width=0.5", "model.layers=4", TWO),
        2,
    ),
    Case("bert", Grid(2, 1, True), run("zb-v", FGM, "model.layers=4", TWO), 2),
    Case("gpt2", Grid(1, 2), run("1f1b", FREELB, "model.layers=3", ONE), 3),
    Case("gpt2", Grid(2), run("gpipe", "parallel.pp_virtual=2", "model.layers=2", TWO), 1),
    Case("gpt2", Grid(2, 1, True), run("interleaved", TAUGHT, "model.layers=4", TWO), 2),
    Case("gpt2", Grid(2, 2), run("1f1b", TAUGHT, FGM, "model.layers=3", TWO), 2),
    Case("bert", Grid(2), run("zb-v", "train.objective=distill+mlm", *HIDDEN, "model.layers=6", ONE), 3),
    Case("bert", Grid(1, 2), run("1f1b", "train.objective=distill+mlm+nsp", "train.recompute=full", ONE), 1),
]



@pytest.mark.parametrize("case", NAMED, ids=str)
def test_a_plan_is_what_simulated_ranks_say(case: Case, prepared_run: PreparedRun) -> None:
    case.check(prepared_run)


def first_party(manager: PluginManager) -> list[str]:
    """Every schedule of megalm's own that needs no argument."""
    found = sorted(manager.registry(KIND))
    return [name for name in found if manager.load_class(KIND, name).argument_name is None]


def drawn(draw: random.Random, schedule: str, manager: PluginManager) -> Case:
    """Any layout with this schedule, of up to twelve ranks."""
    chosen = choose(schedule, manager).schedule
    while True:
        pp, dp, tp = draw.choice([2, 3, 4]), draw.choice([1, 1, 2, 4]), draw.choice([1, 1, 2, 3, 4, 6])
        virtual, micro = draw.choice([1, 2, 3]), draw.choice([1, 2, 4, 8])
        if pp * dp * tp > 12 or 8 % (micro * dp):
            continue
        if chosen.objection(PipelineShape(pp, 8 // (micro * dp), virtual)) is None:
            break
    model, stages = draw.choice(["gpt2", "llama", "bert"]), pp * virtual
    layers = stages + draw.randrange(3)
    flags = ("model.tie_embeddings", "model.lm_head_transform", "model.lm_head_bias", "model.qkv_bias", "model.gated")
    overrides = [f"{flag}={str(draw.random() < 0.5).lower()}" for flag in flags]
    overrides += [
        f"parallel.pp_virtual={virtual}",
        f"model.layers={layers}",
        f"model.kv_heads={draw.choice([1, 2, 3, 6])}",
        f"model.ffn_size={draw.randint(8, 60)}",
        f"model.vocab_size={draw.randint(262, 330)}",
        f"model.norm_placement={draw.choice(['pre', 'post'])}",
        f"model.dropout={draw.choice([0, 0.1])}",
        f"train.micro_batch={micro}",
        f"train.precision={draw.choice(['float32', 'float64', 'bfloat16'])}",
        f"train.recompute={draw.choice(['none', 'full'])}",
    ]
    if draw.random() < 0.5:
        cuts = [0, *sorted(draw.sample(range(1, layers), stages - 1)), layers]
        overrides.append(f"parallel.pp_split={[b - a for a, b in itertools.pairwise(cuts)]}")
    if model == "bert":
        overrides.append(f"train.objective={draw.choice(['mlm', 'nsp', 'mlm+nsp'])}")
    sp = draw.random() < 0.5 and 16 % tp == 0
    return Case(model, Grid(tp, dp, sp), run(schedule, *overrides), pp)


def test_drawn_layouts(prepared_run: PreparedRun, manager: PluginManager, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    for schedule in first_party(manager) * (20 if full else 1):
        drawn(draw, schedule, manager).check(prepared_run)


def test_a_table_of_ones_own(prepared_run: PreparedRun, manager: PluginManager, tmp_path: Path) -> None:
    """Two stages of a rank may talk to each other and to others in any order."""
    order = choose("zb-v", manager).build(PipelineShape(2, 4, 2))
    table = tmp_path / "mine.csv"
    table.write_text("\n".join(",".join(map(str, row)) for row in order.ranks) + "\n")
    Case("gpt2", Grid(2), run(f"csv:{table}", "model.layers=4", TWO), 2).check(prepared_run)


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
def test_any_objective_is_asked(score: Any, prepared_run: PreparedRun) -> None:
    """Where no gradient reaches the last stage, the others still go backward, and it is told to nobody else."""
    case = Case("gpt2", Grid(2, 2, True), run("zb-h1", ONE, "model.layers=2"), 2)
    prepared = case.prepare(prepared_run)
    check(replace(prepared, objective=ThirdParty(prepared, score)), case.grid, case)


@pytest.mark.parametrize(("samples", "at_once"), [(7, 4), (8, 4), (11, 1)])
@pytest.mark.parametrize("case", [NAMED[1], NAMED[5], NAMED[7], NAMED[-2]], ids=str)
def test_an_evaluation(
    case: Case, samples: int, at_once: int, prepared_run: PreparedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that are not full, ranks with one batch less, and more of them than go through at once."""
    monkeypatch.setattr("megalm.train.step.AT_ONCE", at_once)
    prepared, grid = case.prepare(prepared_run), case.grid

    def rows(dp: int) -> Iterator[Rows]:
        micro = prepared.resolved.config.train.micro_batch
        return evaluation_rows(
            prepared.objective,
            prepared.validation,
            seed=7,
            samples=samples,
            micro_batch=micro,
            dp_index=dp,
            dp_size=grid.dp,
        )

    planner = planner_of(prepared, grid)
    found = planner.evaluation(prepared.objective, lambda dp: (each.tensors(CPU) for each in rows(dp)), at_once=at_once)
    truth = simulated_evaluation(prepared, rows, tp=grid.tp, pp=case.pp, dp=grid.dp, sp=grid.sp)
    assert_same(planned(found), truth, case)


def by_hand(prepared: Prepared, grid: Grid) -> dict[int, dict[tuple[str, str], int]]:
    """(item, operation) -> messages, of each rank; all of the size that a microbatch's hidden vectors have."""
    hidden = 2 * 16 * 24 * 8 // (grid.tp if grid.sharded else 1)
    out: dict[int, dict[tuple[str, str], int]] = {}
    for (rank, item, axis, operation), (calls, payload, wire) in planned(plan_of(prepared, grid)).items():
        if operation in ("send", "recv"):
            assert (axis, payload, wire) == ("pp", calls * hidden, calls * hidden * (operation == "send"))
            out.setdefault(rank, {})[item.split(" between")[0], operation] = calls
    return out


def test_messages_by_hand(prepared_run: PreparedRun) -> None:
    m, grid = 4, Grid(2, sp=True)
    forward_out, forward_in = ("hidden vectors", "send"), ("hidden vectors", "recv")
    back_out, back_in = ("gradients", "send"), ("gradients", "recv")

    line = by_hand(Case("gpt2", grid, run("1f1b", TWO, "model.layers=3"), 3).prepare(prepared_run), grid)
    first, middle, last = line[0], line[2], line[4]
    assert first == {forward_out: m, back_in: m}
    assert middle == {forward_out: m, forward_in: m, back_out: m, back_in: m}
    assert last == {forward_in: m, back_out: m}
    assert all(line[rank] == line[rank + 1] for rank in (0, 2, 4))

    # Stages 0 1 2 3 go round: the last of a round sends to the first rank.
    round_about = by_hand(Case("gpt2", grid, run("interleaved", TWO, "model.layers=4"), 2).prepare(prepared_run), grid)
    assert round_about[0] == {forward_out: 2 * m, forward_in: m, back_out: m, back_in: 2 * m}
    assert round_about[2] == {forward_out: m, forward_in: 2 * m, back_out: 2 * m, back_in: m}

    # Stages 0 3 on the first rank and 1 2 on the second, which hands over in memory.
    folded = by_hand(Case("gpt2", grid, run("zb-v", TWO, "model.layers=4"), 2).prepare(prepared_run), grid)
    assert folded[0] == folded[2] == {forward_out: m, forward_in: m, back_out: m, back_in: m}


def test_a_tied_embedding_is_summed_over_the_ends(prepared_run: PreparedRun) -> None:
    tied, name = "model.tie_embeddings=true", ("tied embedding at both ends", "ends", "all_reduce")
    sizes = ("model.layers=3", "model.vocab_size=263", TWO, tied)
    found = planned(plan_of(Case("llama", Grid(2), run("1f1b", *sizes), 3).prepare(prepared_run), Grid(2)))
    rows = {0: 132, 1: 131, 4: 132, 5: 131}
    summed = {key[0]: value for key, value in found.items() if key[1:] == name}
    assert summed == {rank: (1, n * 24 * 8, n * 24 * 8.0) for rank, n in rows.items()}
    folded = Case("llama", Grid(2), run("zb-v", *sizes[1:], "model.layers=6"), 3)
    assert not any("tied" in key[1] for key in planned(plan_of(folded.prepare(prepared_run), Grid(2))))


def test_what_is_left_out_is_seen(prepared_run: PreparedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison finds one message, one all-reduce, one rank or one direction that a plan has not."""
    case = Case("llama", Grid(2), run("zb-h1", TWO, "model.layers=3", "model.tie_embeddings=true"), 3)
    prepared = case.prepare(prepared_run)
    truth = simulated_step(prepared, tp=2, pp=3, dp=1, sp=False)
    plan = planned(plan_of(prepared, case.grid))
    assert_same(plan, truth, case)
    for key in plan:
        with pytest.raises(AssertionError, match=r"1 item\(s\) differ"):
            assert_same({k: v for k, v in plan.items() if k != key}, truth, case)

    complete = comm.message_entries

    def without_the_first(lowered: Any, place: int, *arguments: Any, **keywords: Any) -> Iterator[Entry]:
        for number, each in enumerate(complete(lowered, place, *arguments, **keywords)):
            if (place, number) != (1, 0):
                yield each

    monkeypatch.setattr(comm, "message_entries", without_the_first)
    with pytest.raises(AssertionError, match=r"2 item\(s\) differ.*hidden vectors between stages', 'pp', 'recv'"):
        assert_same(planned(plan_of(prepared, case.grid)), truth, case)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_a_thousand_ranks(schedule: str, prepared_run: PreparedRun) -> None:
    """Sixteen stages or more, eight of data, eight of tensors; what is sent is received."""
    sizes = ("model.layers=40", "model.heads=16", "model.hidden_size=32", "train.global_batch=256", "model.kv_heads=8")
    case = Case("llama", Grid(8, 8, True), run(schedule, *sizes, ONE), 16)
    found = plan_of(case.prepare(prepared_run), case.grid)
    assert sorted(rank for each in found for rank in each.ranks) == list(range(1024))
    sent, received = (
        sum(e.volume.payload * len(each.ranks) for each in found for e in each.entries if e.operation == way)
        for way in ("send", "recv")
    )
    stages = 16 if schedule == "1f1b" else 31
    # 32 microbatches cross 15 borders forwards and backwards; a V has 32 stages and one border inside a rank.
    assert sent == received == 64 * 32 * 2 * (stages - 1) * (16 // 8) * 32 * 8
    assert all(total(each.entries).calls for each in found)


def test_what_a_schedule_does_not_admit_is_refused_by_name(prepared_run: PreparedRun) -> None:
    case = Case("gpt2", Grid(), run("zb-v", "parallel.pp_virtual=3", "model.layers=6"), 2)
    with pytest.raises(ConfigError, match=r"parallel\.pp_schedule: zb-v does not admit P=2, M=1, V=3"):
        case.prepare(prepared_run)


SPLITS = [
    ("gpipe", "[1]", "parallel.pp_split: it is for 1 stage, but the pipeline has 2 stages"),
    ("gpipe", "[1, 4]", "parallel.pp_split: the sum of [1, 4] is 5, but model.layers is 2"),
    ("zb-v", "[1, 1]", "parallel.pp_split: it is for 2 stages, but the pipeline has 4 stages"),
    ("interleaved", None, "parallel.pp: the pipeline has 4 stages, but model.layers is 2"),
]


@pytest.mark.parametrize(("schedule", "split", "message"), SPLITS)
def test_a_model_that_cannot_be_cut_so(
    prepared_run: PreparedRun, schedule: str, split: str | None, message: str
) -> None:
    """The key that is wrong is named, and no other."""
    more = () if split is None else (f"parallel.pp_split={split}",)
    with pytest.raises(ConfigError) as error:
        Case("gpt2", Grid(), run(schedule, "model.layers=2", *more), 2).prepare(prepared_run)
    assert error.value.problems == [message]
