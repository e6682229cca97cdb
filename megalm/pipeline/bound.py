"""A time that no order of the same actions can beat, beside which a makespan tells how much an order leaves."""

from __future__ import annotations

from fractions import Fraction

from megalm.pipeline.execute import durations, exact
from megalm.pipeline.simulate import check_costs
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder


def lower_bound(order: PipelineOrder, costs: Costs) -> float:
    """The larger of two times: one microbatch's way through all stages and back, and for each rank the way of the first
    microbatch to it, its work, and the way from its last action to the end. Memory is not limited."""
    check_costs(order, costs)
    if not any(order.ranks):
        return 0.0
    cost, comm = durations(costs), exact(costs.comm)

    def step(kind: ActionKind, stage: int) -> Fraction:
        return cost(order.placement[stage], Action(kind, stage, 0))

    def hops(stages: int) -> Fraction:
        """Communication on the way over the first ``stages`` stages."""
        pairs = zip(order.placement[: stages - 1], order.placement[1:stages], strict=True)
        return comm * sum(here != there for here, there in pairs)

    fused = order.training and all(a.kind is not ActionKind.B for _, _, a in order.actions())
    back = ActionKind.BW if fused else ActionKind.B
    count = order.stages
    reach = [sum((step(ActionKind.F, s) for s in range(stage)), hops(stage + 1)) for stage in range(count)]
    leave = [sum((step(back, s) for s in range(stage)), hops(stage + 1)) for stage in range(count)]
    whole = reach[-1] + step(ActionKind.F, count - 1)
    if order.training:
        whole += step(back, count - 1) + leave[-1] + (Fraction(0) if fused else step(ActionKind.W, 0))
    best = whole
    for rank, actions in enumerate(order.ranks):
        if stages := order.stages_of(rank):
            tail = min(leave[stage] for stage in stages) if fused else Fraction(0)
            best = max(best, reach[stages[0]] + sum((cost(rank, a) for a in actions), Fraction(0)) + tail)
    return float(best)
