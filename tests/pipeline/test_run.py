"""Pipelines that compute: what they hold, what they say, when weights move, and mistakes that are seen.

That loss and gradients equal one rank's is in test_equal.py.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import megalm.testing.parity as parity
import megalm.train.step as step_module
from megalm.errors import LayoutError
from megalm.model.language_model import LanguageModel
from megalm.ops.linear import _collecting
from megalm.parallel.comm import Group
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import SimulatedWorld, run_simulated
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder, PipelineShape
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.testing.processes import run_processes
from megalm.train.prepare import Prepared
from megalm.train.stages import TrainingStages

from .cases import LAYERS, RTOL, Case, check, drawn, plugins, prepared, schedules, serial, subjects, table

Make = Callable[[str], ObjectiveSubject]
F, B, W, BW = ActionKind.F, ActionKind.B, ActionKind.W, ActionKind.BW


@pytest.fixture(scope="module")
def make(campaign_seed: int) -> Iterator[Callable[[str], ObjectiveSubject]]:
    with subjects(campaign_seed) as made:
        yield made


class Alive:
    """Counts what a rank's forwards keep, by the life of the objects themselves and not by the engine's books.

    A forward leaves a mark in the graph that backward walks, which dies with it, and where a backward is split its
    weight gradients are an object that dies after W.
    """

    def __init__(self) -> None:
        self.graphs: set[object] = set()
        self.pairs: Counter[object] = Counter()
        self.peaks = (0, 0)

    def begin(self, pair: object, mark: object, later: object | None) -> None:
        self.graphs.add(pair)
        weakref.finalize(mark, self.graphs.discard, pair)
        for each in (mark, later):
            if each is not None:
                self.pairs[pair] += 1
                weakref.finalize(each, self.ends, pair)
        self.peaks = max(self.peaks[0], len(self.graphs)), max(self.peaks[1], len(self.pairs))

    def ends(self, pair: object) -> None:
        self.pairs[pair] -= 1
        if not self.pairs[pair]:
            del self.pairs[pair]


class Mark:
    """What the graph of a forward holds."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mark: Mark) -> torch.Tensor:
        ctx.mark = mark
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def measured(run: Prepared, case: Case, pipeline: Pipeline, patch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """What simulated ranks hold at most between F and the end of B, and of W; by pipeline rank."""
    watched: dict[int, Alive] = {}
    forward = LanguageModel.forward

    def marked(self: LanguageModel, batch: Any, stage: int = 0, x: torch.Tensor | None = None) -> torch.Tensor:
        mark = Mark()
        hidden: torch.Tensor = Marked.apply(forward(self, batch, stage, x), mark)
        watched.setdefault(self.parallel.rank, Alive()).begin((stage, id(batch)), mark, _collecting.get())
        return hidden

    patch.setattr(LanguageModel, "forward", marked)

    def rank(parallel: ParallelContext) -> int:
        loss_and_gradients(run, parallel, micro_batch=case.micro_batch, pipeline=pipeline)
        alive = watched[parallel.rank]
        assert not alive.graphs
        assert not alive.pairs
        return parallel.pp.index

    places = run_simulated(rank, **case.grid)
    found: dict[int, set[tuple[int, int]]] = {}
    for number, place in enumerate(places):
        found.setdefault(place, set()).add(watched[number].peaks)
    return {place: peaks for place, (peaks,) in found.items()}


def verified(pipeline: Pipeline) -> dict[int, tuple[int, int]]:
    return {n: (peak.activations, peak.until_weights) for n, peak in enumerate(pipeline.verified.peaks)}


NAMED = [
    *(Case(name, 4, micro_batch=1) for name in schedules()),
    Case("zb-v", 2, tp=2, dp=2, micro_batch=1),
    Case("gpipe", 2, 3),
    Case("interleaved", 2, 2, split=(1, 1, 1, 6)),
]


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_memory_held_is_what_was_verified(case: Case, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(make("causal_lm"))
    pipeline = case.pipeline(run.spec, plugins())
    assert measured(run, case, pipeline, monkeypatch) == verified(pipeline)


@pytest.mark.parametrize("number", range(8))
def test_memory_held_by_drawn_pipelines(
    number: int, make: Make, full: bool, campaign_seed: int, tmp_path: Path
) -> None:
    """Any shape of every schedule, and tables that nobody designed."""
    if number and not full:
        pytest.skip("runs with the full counts")
    draw = random.Random(f"{campaign_seed} {number}")
    cases = [drawn(draw, schedule) for schedule in (schedules() if full else draw.sample(schedules(), 2))]
    designed, virtual = draw.choice([("zb-v", 2), ("interleaved", 2), ("zb-h1", 1)])
    cases.append(Case(f"csv:{table(draw, designed, PipelineShape(3, 6, virtual), tmp_path)}", 3))
    for case in cases:
        run = prepared(make("causal_lm"), recompute=draw.random() < 0.3)
        pipeline = case.pipeline(run.spec, plugins())
        with pytest.MonkeyPatch.context() as patch:
            assert measured(run, case, pipeline, patch) == verified(pipeline), case


def test_memory_that_is_kept_too_long_is_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that forgets to let a forward go holds more than was verified."""
    kept: list[object] = []
    backward = TrainingStages.backward

    def hoarding(self: TrainingStages, stage: int, microbatch: int, grad: Any) -> torch.Tensor | None:
        kept.append(self._saved[stage, microbatch].out)
        return backward(self, stage, microbatch, grad)

    monkeypatch.setattr(TrainingStages, "backward", hoarding)
    case, run = Case("1f1b", 2), prepared(make("causal_lm"))
    with pytest.raises(AssertionError, match="graphs"):
        measured(run, case, case.pipeline(run.spec, plugins()), monkeypatch)


@pytest.mark.parametrize("schedule", schedules())
def test_bfloat16(schedule: str, make: Make) -> None:
    """Gradients that come late, or in another order, are those of one rank but for bfloat16's rounding."""
    subject = make("causal_lm")
    run = subject.prepared("model.layers=9", "model.dropout=0", dtype="bfloat16")
    case = Case(schedule, 2)
    pipeline = case.pipeline(run.spec, plugins())

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(run, parallel, micro_batch=case.micro_batch, pipeline=pipeline)

    expected = loss_and_gradients(run, single_rank(), micro_batch=case.micro_batch)
    assert_parity(run_simulated(rank, **case.grid)[0], expected, rtol=2e-2)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "gpipe"])
def test_buffers_of_sends_are_given_back(schedule: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the verifier says, counted by the life of the tensors; twice as many microbatches hold no more at a time."""
    run = prepared(make("causal_lm"))
    correct = Group.exchange
    alive: Counter[tuple[int, int]] = Counter()
    most: Counter[tuple[int, int]] = Counter()
    peaks: dict[int, list[int]] = {}
    for micro_batch in (1, 2):
        case = Case(schedule, 3, micro_batch=micro_batch)

        def watched(self: Group, messages: Any, count: int = case.microbatches) -> Any:
            key = (count, self.index)
            for message in messages:
                if message.direction == "send":
                    alive[key] += 1
                    weakref.finalize(message.tensor, alive.subtract, [key])
            most[key] = max(most[key], alive[key])
            return correct(self, messages)

        monkeypatch.setattr(Group, "exchange", watched)
        pipeline = case.pipeline(run.spec, plugins())
        run_simulated(
            lambda parallel, m=micro_batch, p=pipeline: loss_and_gradients(run, parallel, micro_batch=m, pipeline=p),
            **case.grid,
        )
        peaks[case.microbatches] = [most[case.microbatches, place] for place in range(3)]
        assert not any(alive.values())
        assert peaks[case.microbatches] == [peak.outbox for peak in pipeline.verified.peaks]
    assert (peaks[12] == peaks[6]) == (schedule != "gpipe"), peaks


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v"])
def test_recomputation_in_a_thread_of_autograd(schedule: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA's backward runs, and computes layers again: nothing of the thread that trains is known there."""
    correct = torch.autograd.backward

    def elsewhere(*arguments: Any) -> None:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(correct, *arguments).result()

    subject = make("causal_lm")
    run = prepared(subject, recompute=True)
    serial(subject, run)
    monkeypatch.setattr(torch.autograd, "backward", elsewhere)
    check(subject, run, Case(schedule, 2), 0)


def test_weight_gradients_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """After B no weight of a linear layer has moved; after W all have."""
    with ObjectiveSubject("causal_lm") as subject:
        prepared = subject.prepared()
        order = PipelineOrder((0,), ((Action(F, 0, 0), Action(B, 0, 0), Action(W, 0, 0)),), 1)
        seen: list[set[str]] = []

        class Watched(TrainingStages):
            def look(self) -> None:
                seen.append({n for n, p in self.model.named_parameters() if p.grad is not None and p.grad.any()})

            def backward(self, *arguments: Any) -> torch.Tensor | None:
                out = super().backward(*arguments)
                self.look()
                return out

            def weights(self, *arguments: Any) -> None:
                super().weights(*arguments)
                self.look()

        monkeypatch.setattr(step_module, "TrainingStages", Watched)
        pipeline = Pipeline("by hand", order, prepared.spec)
        found = loss_and_gradients(prepared, single_rank(), micro_batch=12, pipeline=pipeline)
        after_b, after_w = seen
        late = {name for name in after_w if ".attention.qkv." in name or ".mlp." in name or ".attention.out." in name}
        assert late
        assert after_w - after_b == {name for name in late if "norm" not in name}
        assert_parity(found, loss_and_gradients(prepared, single_rank()), rtol=RTOL)


@pytest.mark.parametrize("name", ["causal_lm", "mlm+nsp"])
@pytest.mark.parametrize("case", [Case("1f1b", 2, tp=2, sp=True), Case("zb-v", 2, 2)], ids=str)
def test_on_gloo_processes(name: str, case: Case, make: Make) -> None:
    subject = make(name)
    run = prepared(subject)
    pipeline = case.pipeline(run.spec, plugins())

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(run, parallel, micro_batch=case.micro_batch, pipeline=pipeline)

    for found in run_processes(rank, **case.grid):
        assert_parity(found, serial(subject, run), rtol=RTOL, label=str(case))


class TestBroken:
    """Mistakes of pipelines, each seen."""

    def differs(self, make: Make, case: Case) -> str:
        subject = make("causal_lm")
        run = prepared(subject)
        with pytest.raises(AssertionError) as caught:
            check(subject, run, case, 0)
        return str(caught.value)

    def test_the_tied_embedding_not_summed(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        correct = Group.all_reduce
        monkeypatch.setattr(
            Group, "all_reduce", lambda self, x, op="sum": x if self.axis == "ends" else correct(self, x, op)
        )
        found = [line.split(":")[0].strip() for line in self.differs(make, Case("1f1b", 2)).splitlines()[1:]]
        assert set(found) == {"backbone.embedding.tokens.weight", "grad_norm"}

    def test_the_norm_of_one_stage(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        correct = parity.global_norm

        def of_this_rank(weights: Any) -> torch.Tensor:
            whole, weights.parallel = weights.parallel, single_rank()
            try:
                return correct(weights)
            finally:
                weights.parallel = whole

        monkeypatch.setattr(parity, "global_norm", of_this_rank)
        assert "grad_norm: differs" in self.differs(make, Case("1f1b", 2))

    def test_weights_never_computed(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TrainingStages, "weights", lambda *arguments: None)
        assert "mlp.down.weight" in self.differs(make, Case("zb-h1", 2))


def test_messages_are_those_of_the_lowered_order(campaign_seed: int) -> None:
    case = Case("zb-v", 2, 2, tp=2)
    with ObjectiveSubject("causal_lm", settings=[f"model.layers={LAYERS}"], seed=campaign_seed) as subject:
        prepared = subject.prepared()
        pipeline = case.pipeline(prepared.spec, subject.manager)
        world = SimulatedWorld(**case.grid)
        world.run(lambda parallel: loss_and_gradients(prepared, parallel, micro_batch=2, pipeline=pipeline))
        hidden = 2 * subject.sequence_length * 32 * 8
        for rank in range(world.size):
            sent = [r for r in world.trace if r.rank == rank and r.operation == "send"]
            transfers = [
                transfer
                for exchange in pipeline.verified.lowered.exchanges(rank // 2)
                for transfer in exchange.transfers
                if transfer.direction == "send"
            ]
            assert len(sent) == len(transfers) > 0
            assert {record.payload for record in sent} == {hidden}


def test_what_cannot_be(campaign_seed: int, tmp_path: Path) -> None:
    with ObjectiveSubject("causal_lm", seed=campaign_seed) as subject:
        spec, manager = subject.prepared().spec, subject.manager
        make: Callable[..., Pipeline] = lambda **k: make_pipeline(spec, manager, **{"microbatches": 4, **k})  # noqa: E731
        with pytest.raises(LayoutError, match=r"^parallel\.pp: the pipeline has 4 stages, but model\.layers is 2$"):
            make(schedule="1f1b", ranks=4)
        with pytest.raises(LayoutError, match=r"pp_split: the sum of \[1, 2\] is 3, but model.layers is 2"):
            make(schedule="1f1b", ranks=2, split=(1, 2))
        with pytest.raises(LayoutError, match="pp_split: it is for 3 stages, but the pipeline has 2 stages"):
            make(schedule="1f1b", ranks=2, split=(1, 1, 1))
