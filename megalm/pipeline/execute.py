"""Running an order in the abstract: each rank takes its actions one by one, each as soon as what it needs is there.

The clock counts in fractions, so that events which are simultaneous by the costs are so here, and no schedule is told
apart from its formula by rounding.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megalm.pipeline.dependencies import Place, Places
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder


@dataclass(frozen=True)
class Times:
    """When each action of each rank begins and ends, as far as the ranks came."""

    start: list[list[Fraction]]
    end: list[list[Fraction]]
    instant: list[list[int]]
    """Among actions that end at the same moment because they cost nothing, the place in their chain; else 0."""

    def stuck(self, order: PipelineOrder) -> list[Place]:
        """For each rank that could not go on, the action that it stands before."""
        done = [len(ends) for ends in self.end]
        return [Place(rank, n) for rank, n in enumerate(done) if n < len(order.ranks[rank])]


def execute(order: PipelineOrder, costs: Costs) -> Times:
    """Run an order. Stops where no rank can go on, see :meth:`Times.stuck`; an action that nobody computes is not
    waited for."""
    duration, latency = durations(costs), exact(costs.comm)
    places = Places(order)
    ranks = len(order.ranks)
    times = Times(*([[] for _ in range(ranks)] for _ in range(3)))  # type: ignore[arg-type]
    waiting: defaultdict[Place, list[int]] = defaultdict(list)
    ready = deque(range(ranks))
    while ready:
        rank = ready.popleft()
        start, end, instants = times.start[rank], times.end[rank], times.instant[rank]
        actions = order.ranks[rank]
        while len(end) < len(actions):
            place = Place(rank, len(end))
            action = actions[place.at]
            begin, chain = (end[-1], instants[-1]) if end else (Fraction(0), 0)
            for other in places.waits(action):
                if other.at >= len(times.end[other.rank]):
                    waiting[other].append(rank)
                    break
                arrival = times.end[other.rank][other.at] + (latency if other.rank != rank else 0)
                link = times.instant[other.rank][other.at]
                begin, chain = max((begin, chain), (arrival, link))
            else:
                cost = duration(rank, action)
                start.append(begin)
                end.append(begin + cost)
                instants.append(0 if cost else chain + 1)
                ready.extend(waiting.pop(place, ()))
                continue
            break
    return times


def durations(costs: Costs) -> Callable[[int, Action], Fraction]:
    """Exact cost of an action on a rank."""
    base = (costs.forward, costs.backward, costs.weight)
    of_stage = [tuple(map(exact, stage)) for stage in costs.stages or ()]
    factor = [exact(value) for value in costs.ranks or ()]
    default = tuple(map(exact, base))

    def duration(rank: int, action: Action) -> Fraction:
        f, b, w = of_stage[action.stage] if of_stage else default
        cost = {ActionKind.F: f, ActionKind.B: b, ActionKind.W: w, ActionKind.BW: b + w}[action.kind]
        return cost * factor[rank] if factor else cost

    return duration


def exact(value: float) -> Fraction:
    """The decimal that is written, not the binary number next to it: 0.1 is a tenth."""
    return Fraction(repr(float(value)))
