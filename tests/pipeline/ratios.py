"""How far schedules are from the best orders, as a table that the tests print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Ratio(NamedTuple):
    """A schedule's makespan beside the least of any order with its placement and kinds of action."""

    schedule: str
    ranks: int
    microbatches: int
    cost: tuple[int, int, int]
    makespan: int
    least: int
    drawn: bool
    """The costs were drawn."""

    @property
    def value(self) -> float:
        return self.makespan / self.least

    def __str__(self) -> str:
        where = f"P={self.ranks} M={self.microbatches} F,B,W={','.join(map(str, self.cost))}"
        return f"{self.schedule} {where}: {self.makespan} of {self.least}, {self.value:.3f}"


def lines(found: Iterable[Ratio], *, each: bool) -> Iterator[str]:
    """A table for each of the fixed costs, and of drawn ones the worst of each schedule, or all (``each``)."""
    every = sorted(set(found))
    for cost in dict.fromkeys(ratio.cost for ratio in every if not ratio.drawn):
        mine = {(r.schedule, r.ranks, r.microbatches): r.value for r in every if r.cost == cost and not r.drawn}
        shapes = sorted({key[1:] for key in mine})
        head = "".join(f"  P{p} M{m}" for p, m in shapes)
        yield f"{'F,B,W = ' + ','.join(map(str, cost)):14}{head}"
        for name in dict.fromkeys(key[0] for key in mine):
            cells = (mine.get((name, *shape)) for shape in shapes)
            yield f"{name:14}" + "".join("      -" if cell is None else f"{cell:7.3f}" for cell in cells)
    drawn = [ratio for ratio in every if ratio.drawn]
    for name in dict.fromkeys(ratio.schedule for ratio in drawn):
        mine_drawn = [ratio for ratio in drawn if ratio.schedule == name]
        worst = max(mine_drawn, key=lambda ratio: ratio.value)
        mean = sum(ratio.value for ratio in mine_drawn) / len(mine_drawn)
        yield f"{name}: {len(mine_drawn)} drawn costs, mean {mean:.3f}; the worst is {worst}"
    if each:
        yield from map(str, drawn)
