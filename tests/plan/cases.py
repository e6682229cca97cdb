"""A run on a layout, its plan, and the comparison of the plan with what simulated ranks say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalm.plan.comm import AlikeRanks, Planner
from megalm.plan.optimizer import PlannedOptimizer
from megalm.plan.recording import Grid
from megalm.train.prepare import Prepared

from .truth import assert_same, planned, simulated_step, step_rows

PreparedRun = Callable[..., Prepared]
CPU = torch.device("cpu")


def planner_of(prepared: Prepared, grid: Grid) -> Planner:
    teacher = None if prepared.teacher is None else prepared.teacher.spec
    train = prepared.resolved.config.train
    optimizer = PlannedOptimizer(prepared.optimizer, prepared.optimizer_settings)
    return Planner(prepared.spec, prepared.pipeline, grid, train.precision, train.adversarial, teacher, optimizer)


def plan_of(prepared: Prepared, grid: Grid) -> list[AlikeRanks]:
    return planner_of(prepared, grid).step(
        prepared.objective, lambda dp: (rows.tensors(CPU) for rows in step_rows(prepared, dp, grid.dp))
    )


def check(prepared: Prepared, grid: Grid, label: object) -> None:
    """Every item of every rank is what simulated ranks say."""
    pp = len(prepared.pipeline.order.ranks)
    truth = simulated_step(prepared, tp=grid.tp, pp=pp, dp=grid.dp, sp=grid.sp)
    assert_same(planned(plan_of(prepared, grid)), truth, label)


@dataclass(frozen=True)
class Case:
    """A run and a layout."""

    model: str
    grid: Grid
    overrides: tuple[str, ...] = ()
    pp: int = 1

    def prepare(self, prepared_run: PreparedRun) -> Prepared:
        layout = (f"parallel.tp={self.grid.tp}", f"parallel.sp={str(self.grid.sp).lower()}", f"parallel.pp={self.pp}")
        overrides = ("model.layers=1", *layout, *self.overrides)
        return prepared_run(self.model, *overrides, world_size=self.grid.size * self.pp)

    def check(self, prepared_run: PreparedRun) -> None:
        check(self.prepare(prepared_run), self.grid, self)
