"""Layouts to prove things under: a few at once, or all up to a number of ranks.

The full set has every tensor-parallel size with every data-parallel size, with and without sequence parallelism: sizes
that divide nothing evenly too, since shards may be uneven. Which microbatch each layout gets is drawn from the seed.
With pipelines there are too many to try all: those are drawn, some for each schedule (:mod:`megalm.testing.pipelines`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megalm.errors import ScheduleError

ROWS = 12
"""A step has at least this many rows: it divides by 1, 2, 3, 4, 6 and 12."""
MICROBATCHES = 3
"""A layout that is drawn cuts each rank's rows in at most so many."""


@dataclass(frozen=True)
class RankLayout:
    """How ranks and rows are arranged: tp * pp * dp ranks, and microbatches of a step of ``global_batch`` rows."""

    tp: int = 1
    dp: int = 1
    sp: bool = False
    micro_batch: int = ROWS
    global_batch: int = ROWS
    pp: int = 1
    schedule: str | None = None
    """Of the pipeline, as ``parallel.pp_schedule`` names it."""
    virtual: int | None = None
    """Stages of each pipeline rank; default: the schedule's own."""
    split: tuple[int, ...] | None = None
    """Layers of each stage; default: cut by cost."""

    def __post_init__(self) -> None:
        if self.pp > 1 and self.schedule is None:
            raise ScheduleError(f"a layout with pp={self.pp} needs a pipeline schedule; give schedule=NAME")

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.dp

    @property
    def cell(self) -> int:
        """Rows that one microbatch of every data-parallel rank holds together."""
        return self.micro_batch * self.dp

    @property
    def microbatches(self) -> int:
        """Microbatches of a step on each data-parallel rank."""
        return self.global_batch // self.cell

    @property
    def world(self) -> dict[str, Any]:
        """What :func:`megalm.parallel.sim.run_simulated` calls it."""
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp, "sp": self.sp}

    @property
    def axes(self) -> str:
        """How ranks are arranged, in words."""
        sizes = f"tp{self.tp}{'+sp' if self.sp else ''} " + (f"pp{self.pp} " if self.pp > 1 else "") + f"dp{self.dp}"
        if self.schedule is None:
            return sizes
        stages = f", stages of {'+'.join(map(str, self.split))} layers" if self.split else ""
        virtual = f" with {self.virtual} stages a rank" if (self.virtual or 1) > 1 else ""
        return f"{sizes}, schedule {self.schedule}{virtual}{stages}"

    def __str__(self) -> str:
        return f"{self.axes}, {self.global_batch} rows in microbatches of {self.micro_batch}"


def quick_layouts(seed: int, sequence_length: int) -> list[RankLayout]:
    """Each kind of layout without a pipeline once, and one of up to six ranks drawn from the seed."""
    draw = random.Random(seed)
    even = sequence_length % 2 == 0
    named = [
        RankLayout(tp=2, micro_batch=6),
        RankLayout(tp=2, sp=even, micro_batch=12),
        RankLayout(tp=3, micro_batch=6),
        RankLayout(dp=3, micro_batch=4),
        RankLayout(tp=2, dp=2, sp=even, micro_batch=3),
    ]
    more = [layout for layout in full_layouts(seed, sequence_length, ranks=6) if layout not in named]
    return [*named, draw.choice(more)]


def full_layouts(seed: int, sequence_length: int, ranks: int = 16) -> list[RankLayout]:
    """Every (tp, dp, sp) of up to ``ranks`` ranks that divides a row's tokens where it shards them."""
    draw = random.Random(seed)
    grids = [grid for grid in every_grid(sequence_length, ranks) if grid.ranks > 1]
    return [replace(grid, micro_batch=draw.choice(cuts(grid, MICROBATCHES))) for grid in grids]


def every_grid(sequence_length: int, ranks: int) -> Iterator[RankLayout]:
    """Every (tp, dp, sp) without a pipeline, each with as few rows as dp allows."""
    for tp in range(1, ranks + 1):
        for dp in range(1, ranks // tp + 1):
            for sp in (False, True):
                if not sp or (tp > 1 and sequence_length % tp == 0):
                    yield RankLayout(tp, dp, sp, global_batch=-(-ROWS // dp) * dp)


def cuts(grid: RankLayout, most: int) -> list[int]:
    """Sizes of microbatches that cut each rank's rows into at most so many."""
    share = grid.global_batch // grid.dp
    return [n for n in range(1, share + 1) if share % n == 0 and share // n <= most]
