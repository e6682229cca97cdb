"""What a schedule costs: when each action runs, and the bubble by both of the measures that the literature uses.

Every action begins when its rank is free and what it needs has arrived: an event-driven execution, without noise and
with links that carry any number of messages at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megalm.errors import ScheduleError
from megalm.pipeline.execute import execute
from megalm.plugin.contract.pipeline import Action, Costs, PipelineOrder


class Record(NamedTuple):
    """One action of one rank, simulated or measured, in any unit of time."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happened when. Measured records make one as well, so both have the same figures and the same drawing."""

    ranks: int
    records: tuple[Record, ...]

    @cached_property
    def begin(self) -> float:
        """When the first action starts."""
        return min((record.start for record in self.records), default=0.0)

    @property
    def makespan(self) -> float:
        """From the first action's start to the last one's end, over all ranks."""
        return max((record.end for record in self.records), default=0.0) - self.begin

    def of(self, rank: int) -> list[Record]:
        """A rank's records in order of time."""
        return self._by_rank[rank]

    @cached_property
    def _by_rank(self) -> list[list[Record]]:
        found: list[list[Record]] = [[] for _ in range(self.ranks)]
        for record in sorted(self.records, key=lambda record: record.start):
            found[record.rank].append(record)
        return found

    @property
    def work(self) -> list[float]:
        """Time that each rank computes."""
        found = [0.0] * self.ranks
        for record in self.records:
            found[record.rank] += record.end - record.start
        return found

    @property
    def spans(self) -> list[float]:
        """From each rank's first start to its own last end."""
        first, last = [float("inf")] * self.ranks, [float("-inf")] * self.ranks
        for rank, _, start, end in self.records:
            first[rank], last[rank] = min(first[rank], start), max(last[rank], end)
        return [max(0.0, z - a) for a, z in zip(first, last, strict=True)]

    @property
    def idle_fraction(self) -> float:
        """Idle time over makespan, of all ranks together: 1 - work / (ranks * makespan)."""
        whole = self.ranks * self.makespan
        return 1.0 - sum(self.work) / whole if whole else 0.0

    @property
    def span_bubble(self) -> float:
        """The zero-bubble papers' measure: of the rank with the longest span, (span - work) / span.

        It leaves out what a rank waits before its first and after its last action, since a step can begin where
        another ends. Of several longest spans the one with the least work counts.
        """
        spans, work = self.spans, self.work
        longest = max(spans, default=0.0)
        if not longest:
            return 0.0
        least = min(w for s, w in zip(spans, work, strict=True) if s >= longest * (1 - 1e-12))
        return max(0.0, (longest - least) / longest)


def simulate(order: PipelineOrder, costs: Costs) -> Timeline:
    """Run an order by its costs. ScheduleError where it cannot run to its end, or the costs are not of its shape."""
    check_costs(order, costs)
    times = execute(order, costs)
    if stuck := times.stuck(order):
        rank, index = stuck[0]
        raise ScheduleError(f"the schedule cannot run: {order.ranks[rank][index]} ({order.where(rank, index)}) waits")
    records = [
        Record(rank, action, float(times.start[rank][index]), float(times.end[rank][index]))
        for rank, index, action in order.actions()
    ]
    return Timeline(len(order.ranks), tuple(records))


def check_costs(order: PipelineOrder, costs: Costs) -> None:
    """ScheduleError where costs by stage or by rank are not as many as there are."""
    wanted: Sequence[tuple[str, int, Sequence[object] | None]] = (
        ("stage", order.stages, costs.stages),
        ("rank", len(order.ranks), costs.ranks),
    )
    for what, count, given in wanted:
        if given is not None and len(given) != count:
            raise ScheduleError(f"costs by {what}: expected {count}, one for each {what}; found {len(given)}")
