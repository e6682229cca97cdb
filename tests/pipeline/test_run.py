"""Pipelines that compute: loss and every gradient equal one rank's, and the memory held is what the verifier said."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import megalm.testing.parity as parity
import megalm.train.step as step_module
from megalm.errors import ScheduleError
from megalm.model.spec import ModelSpec
from megalm.parallel.comm import Group
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import SimulatedWorld, run_simulated
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder
from megalm.plugin.manager import PluginManager
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.testing.processes import run_processes
from megalm.train.stages import TrainingStages

RTOL = 1e-10
LAYERS = 9
F, B, W, BW = ActionKind.F, ActionKind.B, ActionKind.W, ActionKind.BW


@dataclass(frozen=True)
class Case:
    """A schedule on a layout; twelve rows, microbatches of ``micro_batch``."""

    schedule: str
    pp: int
    virtual: int | None = None
    tp: int = 1
    sp: bool = False
    dp: int = 1
    micro_batch: int = 2
    split: tuple[int, ...] | None = None

    def __str__(self) -> str:
        layout = f"tp{self.tp}{'+sp' * self.sp} dp{self.dp}"
        return f"{self.schedule} pp{self.pp} v{self.virtual} {layout} mb{self.micro_batch} {self.split or ''}"

    def pipeline(self, spec: ModelSpec, manager: PluginManager) -> Pipeline:
        return make_pipeline(
            spec,
            manager,
            schedule=self.schedule,
            ranks=self.pp,
            microbatches=12 // (self.micro_batch * self.dp),
            virtual=self.virtual,
            split=self.split,
        )

    @property
    def grid(self) -> dict[str, Any]:
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp, "sp": self.sp}


NAMED = [
    *(Case(name, 2) for name in ("gpipe", "1f1b", "zb-h1")),
    *(Case(name, 4, micro_batch=1) for name in ("gpipe", "1f1b", "zb-h1")),
    Case("interleaved", 2, 2),
    Case("interleaved", 4, 2, micro_batch=1),
    Case("zb-v", 2, 2),
    Case("zb-v", 4, 2, micro_batch=1),
    *(Case(name, 2, tp=2, sp=True, dp=2, micro_batch=1) for name in ("1f1b", "zb-h1")),
    Case("zb-v", 2, 2, tp=2, dp=2, micro_batch=1),
    Case("1f1b", 3, split=(1, 6, 2)),
    Case("interleaved", 2, 2, split=(1, 1, 1, 6), tp=2, sp=True),
]
OBJECTIVES = {
    "causal_lm tied": ("causal_lm", []),
    "causal_lm untied": ("causal_lm", ["model.tie_embeddings=false", 'train.recompute="full"']),
    "mlm+nsp": ("mlm+nsp", []),
    "mlm": ("mlm", []),
    "nsp": ("nsp", []),
}


@pytest.fixture(scope="module", params=OBJECTIVES)
def subject(request: pytest.FixtureRequest, campaign_seed: int) -> Iterator[ObjectiveSubject]:
    name, settings = OBJECTIVES[request.param]
    # A large vocabulary's head would take the place of layers on the last stage.
    with ObjectiveSubject(name, settings=[f"model.layers={LAYERS}", *settings], seed=campaign_seed) as made:
        yield made


@pytest.fixture(scope="module")
def serial(subject: ObjectiveSubject) -> dict[str, torch.Tensor]:
    return loss_and_gradients(subject.prepared(), single_rank())


def check(subject: ObjectiveSubject, serial: dict[str, torch.Tensor], case: Case, seed: int) -> None:
    prepared = subject.prepared()
    pipeline = case.pipeline(prepared.spec, subject.manager)

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(prepared, parallel, micro_batch=case.micro_batch, pipeline=pipeline)

    found = run_simulated(rank, **case.grid, schedule="random", seed=seed)
    assert_parity(found[0], serial, rtol=RTOL, label=str(case))
    for each in found[1:]:
        assert all(torch.equal(each[name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_a_pipeline_equals_one_rank(
    subject: ObjectiveSubject, serial: dict[str, torch.Tensor], case: Case, full: bool, campaign_seed: int
) -> None:
    # Every case with the first objective, and some of them with each of the others.
    first = subject.name == "causal_lm" and subject.prepared().spec.cfg.tie_embeddings
    if not full and not first and random.Random(f"{campaign_seed} {subject.name} {case}").random() < 0.8:
        pytest.skip("runs with the full counts")
    check(subject, serial, case, campaign_seed)


def test_drawn_pipelines(
    subject: ObjectiveSubject, serial: dict[str, torch.Tensor], full: bool, campaign_seed: int
) -> None:
    draw, done = random.Random(campaign_seed), 0
    while done < (20 if full else 1):
        pp = draw.choice([2, 3, 4])
        tp, dp = draw.choice([(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
        name = draw.choice(["gpipe", "1f1b", "zb-h1", "interleaved", "zb-v"])
        case = Case(
            name,
            pp,
            draw.choice([2, 3]) if name == "interleaved" else None,
            tp,
            draw.random() < 0.5 and tp == 2,
            dp,
            draw.choice([m for m in (1, 2, 3, 6) if 12 % (m * dp) == 0]),
        )
        try:
            case.pipeline(subject.prepared().spec, subject.manager)
        except ScheduleError:
            continue  # what a schedule does not admit is refused by name
        check(subject, serial, case, campaign_seed)
        done += 1


@pytest.mark.parametrize("case", [c for c in NAMED if c.tp == 1], ids=str)
def test_memory_held_is_what_was_verified(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with ObjectiveSubject("causal_lm", settings=[f"model.layers={LAYERS}"]) as subject:
        prepared = subject.prepared()
        pipeline = case.pipeline(prepared.spec, subject.manager)
        peaks: dict[int, tuple[int, int]] = {}
        made: dict[int, TrainingStages] = {}

        def keep(model: Any, *arguments: Any) -> TrainingStages:
            return made.setdefault(model.parallel.rank, TrainingStages(model, *arguments))

        monkeypatch.setattr(step_module, "TrainingStages", keep)

        def rank(parallel: ParallelContext) -> None:
            loss_and_gradients(prepared, parallel, micro_batch=case.micro_batch, pipeline=pipeline)
            stages = made[parallel.rank]
            peaks[parallel.pp.index] = stages.peak_activations, stages.peak_until_weights

        run_simulated(rank, **case.grid)
        expected = {n: (p.activations, p.until_weights) for n, p in enumerate(pipeline.verified.peaks)}
        assert peaks == expected


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


@pytest.mark.parametrize("case", [Case("1f1b", 2, tp=2, sp=True), Case("zb-v", 2, 2)], ids=str)
def test_on_gloo_processes(subject: ObjectiveSubject, serial: dict[str, torch.Tensor], case: Case) -> None:
    prepared = subject.prepared()
    pipeline = case.pipeline(prepared.spec, subject.manager)

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(prepared, parallel, micro_batch=case.micro_batch, pipeline=pipeline)

    for found in run_processes(rank, **case.grid):
        assert_parity(found, serial, rtol=RTOL, label=str(case))


class TestBroken:
    """Mistakes of pipelines, each seen."""

    @pytest.fixture
    def tied(self, campaign_seed: int) -> Iterator[ObjectiveSubject]:
        with ObjectiveSubject("causal_lm", settings=[f"model.layers={LAYERS}"], seed=campaign_seed) as made:
            yield made

    def differs(self, subject: ObjectiveSubject, case: Case) -> str:
        prepared = subject.prepared()
        with pytest.raises(AssertionError) as caught:
            check(subject, loss_and_gradients(prepared, single_rank()), case, 0)
        return str(caught.value)

    def test_the_tied_embedding_not_summed(self, tied: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch) -> None:
        correct = Group.all_reduce
        monkeypatch.setattr(
            Group, "all_reduce", lambda self, x, op="sum": x if self.axis == "ends" else correct(self, x, op)
        )
        found = [line.split(":")[0].strip() for line in self.differs(tied, Case("1f1b", 2)).splitlines()[1:]]
        assert set(found) == {"backbone.embedding.tokens.weight", "grad_norm"}

    def test_the_norm_of_one_stage(self, tied: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch) -> None:
        correct = parity.global_norm

        def of_this_rank(weights: Any) -> torch.Tensor:
            whole, weights.parallel = weights.parallel, single_rank()
            try:
                return correct(weights)
            finally:
                weights.parallel = whole

        monkeypatch.setattr(parity, "global_norm", of_this_rank)
        assert "grad_norm: differs" in self.differs(tied, Case("1f1b", 2))

    def test_weights_never_computed(self, tied: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TrainingStages, "weights", lambda *arguments: None)
        assert "mlp.down.weight" in self.differs(tied, Case("zb-h1", 2))


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
        with pytest.raises(ScheduleError, match="4 stages, but the model only 2 layers"):
            make(schedule="1f1b", ranks=4)
        with pytest.raises(ScheduleError, match=r"pp_split has 1 \+ 2 = 3 layers, model.layers is 2"):
            make(schedule="1f1b", ranks=2, split=(1, 2))
        with pytest.raises(ScheduleError, match="pp_split names 3 stages, but the pipeline has 2"):
            make(schedule="1f1b", ranks=2, split=(1, 1, 1))
