"""Zero bubble: nobody waits for the gradients of weights, so they are computed when there is nothing else to do.

A rank has a fixed order of F and B, from the paper; W fill the gaps. Where the gaps are is found by running the order
with F = B = W = 1, as the papers assume: a rank does its next F or B if that can start, else the oldest W that is due,
else it waits. An F also waits for room, as a rank holds a limited number of activations from F to W: as many as 1F1B's
worst rank.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

from megalm.api import (
    Action,
    ActionKind,
    BubbleFormula,
    Costs,
    PipelineOrder,
    PipelineSchedule,
    PipelineShape,
    loop_placement,
    v_placement,
)

F, B, W = ActionKind.F, ActionKind.B, ActionKind.W
PAPER = "Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024 (arXiv 2401.10241)"


class ZeroBubbleH1(PipelineSchedule):
    """1F1B's order of F and B, with W in the bubbles at its end; rank r holds P activations where 1F1B's holds P-r."""

    reference = PAPER + ", section 2.3"

    def objection(self, shape: PipelineShape) -> str | None:
        return None if shape.virtual == 1 else "it has one stage a rank; with two there is zb-v"

    def build(self, shape: PipelineShape) -> PipelineOrder:
        count = shape.microbatches
        ranks = []
        for rank in range(shape.ranks):
            warm_up = min(shape.ranks - 1 - rank, count)
            actions = [Action(F, rank, m) for m in range(warm_up)]
            for m in range(count):
                if warm_up + m < count:
                    actions.append(Action(F, rank, warm_up + m))
                actions.append(Action(B, rank, m))
            ranks.append(actions)
        return fill_weights(loop_placement(shape.ranks), ranks, count, room=shape.ranks)

    def formula(self, shape: PipelineShape, costs: Costs) -> BubbleFormula:
        bubble = (shape.ranks - 1) * (costs.forward + costs.backward - costs.weight)
        whole = shape.microbatches * (costs.forward + costs.backward + costs.weight) + bubble
        return BubbleFormula(
            "(P-1)(F+B-W) / (M(F+B+W) + (P-1)(F+B-W))",
            bubble / whole if whole else 0.0,
            "span",
            "equal stages, no communication cost, M >= P, W <= F",
            costs.uniform
            and not costs.stages
            and costs.comm == 0
            and shape.microbatches >= shape.ranks
            and costs.weight <= costs.forward,
        )


class ZeroBubbleV(PipelineSchedule):
    """Two stages a rank, placed forth and back, so that the last stage's B starts where the first stage's F did."""

    reference = PAPER + ", section 6"
    default_virtual: ClassVar[int] = 2

    def objection(self, shape: PipelineShape) -> str | None:
        return None if shape.virtual == 2 else "it has two stages a rank"

    def build(self, shape: PipelineShape) -> PipelineOrder:
        ranks = [_v_order(shape, rank) for rank in range(shape.ranks)]
        return fill_weights(v_placement(shape.ranks), ranks, shape.microbatches, room=2 * shape.ranks)

    def formula(self, shape: PipelineShape, costs: Costs) -> BubbleFormula:
        equal = costs.uniform and not costs.stages and costs.forward == costs.backward == costs.weight
        return BubbleFormula(
            "0",
            0.0,
            "span",
            "F = B = W, equal stages, no communication cost, M >= 2P-1, the optimizer's synchronisation not counted",
            equal and costs.comm == 0 and shape.microbatches >= 2 * shape.ranks - 1,
        )


def _v_order(shape: PipelineShape, rank: int) -> list[Action]:
    """F and B of a rank, whose stages are ``down`` and, on the way back, ``up``.

    The order is that of a pipeline which is kept full; where there are fewer microbatches, those that are not there are
    left out.
    """
    down, up = rank, 2 * shape.ranks - 1 - rank
    full = max(shape.microbatches, 2 * shape.ranks - 1)
    after = shape.ranks - rank
    kinds = [(F, down)] * (2 * after - 1)
    kinds += [(F, up), (F, down)] * rank
    kinds += [(F, up), (B, up)] * after
    steady = full - (2 * shape.ranks - 1 - rank)
    kinds += [(F, down), (B, down), (F, up), (B, up)] * steady
    # No forward is left of the stage below; those of the stage above are as many as it lags behind.
    kinds += [(B, down), (F, up), (B, up)] * (full - rank - after - steady)
    kinds += [(B, down), (B, up)] * rank
    kinds += [(B, down)] * after
    numbers: dict[tuple[ActionKind, int], int] = {}
    actions = []
    for kind, stage in kinds:
        number = numbers[kind, stage] = numbers.get((kind, stage), -1) + 1
        if number < shape.microbatches:
            actions.append(Action(kind, stage, number))
    return actions


def fill_weights(placement: tuple[int, ...], ranks: list[list[Action]], count: int, room: int) -> PipelineOrder:
    """Add W to orders of F and B. ``room``: pairs of stage and microbatch that a rank may hold from F to W."""
    last = len(placement) - 1
    ends: dict[Action, int] = {}
    todo = [deque(actions) for actions in ranks]
    due: list[deque[Action]] = [deque() for _ in ranks]
    held = [0] * len(ranks)
    filled: list[list[Action]] = [[] for _ in ranks]

    def can_start(action: Action, rank: int, now: int) -> bool:
        kind, stage, m = action
        if kind is F:
            needed = [Action(F, stage - 1, m)] if stage else []
        else:
            needed = [Action(F, stage, m)] + ([Action(B, stage + 1, m)] if stage < last else [])
        return all(ends.get(other, now + 1) <= now for other in needed) and (kind is B or held[rank] < room)

    now = 0
    while any(todo) or any(due):
        for rank, actions in enumerate(todo):
            if actions and can_start(actions[0], rank, now):
                action = actions.popleft()
                ends[action] = now + 1
                if action.kind is F:
                    held[rank] += 1
                else:
                    due[rank].append(action._replace(kind=W))
            elif due[rank]:
                action = due[rank].popleft()
                held[rank] -= 1
            else:
                continue
            filled[rank].append(action)
        now += 1
    return PipelineOrder(placement, tuple(map(tuple, filled)), count)
