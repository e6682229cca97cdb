"""Layouts to prove things under: a few at once, or all up to a number of ranks.

The full set has every tensor-parallel size with every data-parallel size, with and without sequence parallelism: sizes
that divide nothing evenly too, since shards may be uneven. Which microbatch each layout gets is drawn from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ROWS = 12
"""A step has at least this many rows: it divides by 1, 2, 3, 4, 6 and 12."""
MICROBATCHES = 3
"""A layout that is drawn cuts each rank's rows in at most so many."""


@dataclass(frozen=True)
class RankLayout:
    """How ranks and rows are arranged: tp * dp ranks, and microbatches of a step of ``global_batch`` rows."""

    tp: int = 1
    dp: int = 1
    sp: bool = False
    micro_batch: int = ROWS
    global_batch: int = ROWS

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.tp * self.dp

    @property
    def cell(self) -> int:
        """Rows that one microbatch of every data-parallel rank holds together."""
        return self.micro_batch * self.dp

    @property
    def axes(self) -> str:
        """How ranks are arranged, in words."""
        return f"tp{self.tp}{'+sp' if self.sp else ''} dp{self.dp}"

    def __str__(self) -> str:
        return f"{self.axes}, {self.global_batch} rows in microbatches of {self.micro_batch}"


def quick_layouts(seed: int, sequence_length: int) -> list[RankLayout]:
    """Each kind of layout once, and one of up to six ranks drawn from the seed."""
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
    return list(_every(random.Random(seed), sequence_length, ranks))


def _every(draw: random.Random, sequence_length: int, ranks: int) -> Iterator[RankLayout]:
    for tp in range(1, ranks + 1):
        for dp in range(1, ranks // tp + 1):
            for sp in (False, True):
                if (tp, dp) == (1, 1) or (sp and (tp == 1 or sequence_length % tp)):
                    continue
                global_batch = -(-ROWS // dp) * dp
                share = global_batch // dp
                sizes = [n for n in range(1, share + 1) if share % n == 0 and share // n <= MICROBATCHES]
                micro_batch = draw.choice(sizes)
                yield RankLayout(tp, dp, sp, micro_batch, global_batch)
