"""Objectives and heads to train on pipelines, schedules by name, and the comparison with one rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megalm.model.spec import ModelSpec
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.choose import KIND, choose
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.plugin.contract.pipeline import PipelineShape
from megalm.plugin.manager import PluginManager
from megalm.testing.head.subject import HeadSubject
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.train.prepare import Prepared

from .oracle import rows_of, valid

RTOL = 1e-10
LAYERS = 9
ROWS = 12
KINDS: dict[str, type[ObjectiveSubject]] = {"": ObjectiveSubject, "head": HeadSubject}


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

    @property
    def microbatches(self) -> int:
        return ROWS // (self.micro_batch * self.dp)

    def pipeline(self, spec: ModelSpec, manager: PluginManager) -> Pipeline:
        return make_pipeline(
            spec,
            manager,
            schedule=self.schedule,
            ranks=self.pp,
            microbatches=self.microbatches,
            virtual=self.virtual,
            split=self.split,
        )

    @property
    def grid(self) -> dict[str, Any]:
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp, "sp": self.sp}


@cache
def plugins() -> PluginManager:
    return PluginManager.for_launch(None)


@cache
def schedules() -> tuple[str, ...]:
    """Every first-party schedule that needs no argument."""
    names = sorted(plugins().registry(KIND))
    return tuple(name for name in names if plugins().load_class(KIND, name).argument_name is None)


@cache
def trained() -> tuple[str, ...]:
    """Every first-party objective and head, and two joint objectives. Those that couple rows are not among them: they
    allow few layouts, and their suites choose those."""
    single = sorted(plugins().registry("objectives"))
    heads = [f"head {name}" for name in sorted(plugins().registry("heads"))]
    return tuple(name for name in (*single, "mlm+nsp", "sop+span_mlm", *heads) if not _coupled(name))


def _coupled(name: str) -> bool:
    kind, _, word = name.rpartition(" ")
    with KINDS[kind](word, manager=plugins()) as subject:
        return subject.coupled


@contextmanager
def subjects(seed: int) -> Iterator[Callable[[str], ObjectiveSubject]]:
    """Makes what :func:`trained` names, each once."""
    with ExitStack() as stack:

        @cache
        def make(name: str) -> ObjectiveSubject:
            kind, _, word = name.rpartition(" ")
            if kind:
                return stack.enter_context(KINDS[kind](word, manager=plugins(), seed=seed))
            return stack.enter_context(ObjectiveSubject(word, manager=plugins(), seed=seed, stages=LAYERS))

        yield make


def prepared(subject: ObjectiveSubject, *, tied: bool = True, recompute: bool = False) -> Prepared:
    """Nine layers: a large vocabulary's head would take the place of layers on the last stage."""
    settings = [f"model.layers={LAYERS}", f"model.tie_embeddings={str(tied).lower()}"]
    return subject.prepared(*settings, *(['train.recompute="full"'] if recompute else []))


def serial(subject: ObjectiveSubject, run: Prepared) -> dict[str, torch.Tensor]:
    """Loss and every gradient of one rank, computed once."""
    return subject.once(("serial", id(run)), lambda: loss_and_gradients(run, single_rank()))


def check(
    subject: ObjectiveSubject, run: Prepared, case: Case, seed: int, manager: PluginManager | None = None
) -> None:
    """Loss and every gradient of every rank are those of one rank. ``manager``: knows the schedule; default: all."""
    pipeline = case.pipeline(run.spec, manager or subject.manager)

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(run, parallel, micro_batch=case.micro_batch, pipeline=pipeline)

    expected = serial(subject, run)
    found = run_simulated(rank, **case.grid, schedule="random", seed=seed)
    assert_parity(found[0], expected, rtol=RTOL, label=str(case))
    for each in found[1:]:
        assert all(torch.equal(each[name], found[0][name]) for name in found[0])


def drawn(draw: random.Random, schedule: str) -> Case:
    """Any layout that the schedule admits."""
    chosen = choose(schedule, plugins()).schedule
    while True:
        pp, virtual = draw.choice([2, 3, 4]), draw.choice([1, 2, 3])
        tp, dp = draw.choice([(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
        micro = draw.choice([m for m in (1, 2, 3, 6) if ROWS % (m * dp) == 0])
        stages = pp * virtual
        shape = PipelineShape(pp, ROWS // (micro * dp), virtual)
        if stages > LAYERS or chosen.objection(shape) is not None:
            continue
        split = None
        if draw.random() < 0.5:
            cuts = [0, *sorted(draw.sample(range(1, LAYERS), stages - 1)), LAYERS]
            split = tuple(b - a for a, b in pairwise(cuts))
        return Case(schedule, pp, virtual, tp, draw.random() < 0.5 and tp == 2, dp, micro, split)


def table(draw: random.Random, schedule: str, shape: PipelineShape, folder: Path) -> Path:
    """A CSV of the schedule's order after swaps that leave it valid."""
    order = choose(schedule, plugins()).build(shape)
    rows = rows_of(order)
    for _ in range(60):
        row = draw.choice(rows)
        i = draw.randrange(len(row) - 1)
        row[i], row[i + 1] = row[i + 1], row[i]
        if not valid(order.placement, rows, order.microbatches):
            row[i], row[i + 1] = row[i + 1], row[i]
    path = folder / f"{schedule}.csv"
    path.write_text("\n".join(",".join(row) for row in rows) + "\n", encoding="utf-8")
    return path
