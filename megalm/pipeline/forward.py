"""Forwards alone, for evaluation: an order for any placement and any number of microbatches.

An evaluation may have fewer microbatches than a step, which a schedule for training need not admit. Nothing is held for
a backward, so there is one thing to get right: that no rank waits where it could work. Each rank does what came first.
"""

from __future__ import annotations

import heapq

from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder


def forward_order(placement: tuple[int, ...], microbatches: int) -> PipelineOrder:
    """Each rank takes the forward that became ready first, and of several the one nearest to the model's end."""
    ranks = max(placement) + 1
    actions: list[list[Action]] = [[] for _ in range(ranks)]
    # Per rank: (ready at, stage from the end, microbatch), by moments of one forward each.
    ready: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for microbatch in range(microbatches):
        heapq.heappush(ready[placement[0]], (microbatch, 0, microbatch))
    now = 0
    while any(ready):
        done = []
        for rank, waiting in enumerate(ready):
            if waiting and waiting[0][0] <= now:
                _, minus_stage, microbatch = heapq.heappop(waiting)
                actions[rank].append(Action(ActionKind.F, -minus_stage, microbatch))
                done.append((1 - minus_stage, microbatch))
        now += 1
        for stage, microbatch in done:
            if stage < len(placement):
                heapq.heappush(ready[placement[stage]], (now, -stage, microbatch))
    return PipelineOrder(placement, tuple(map(tuple, actions)), microbatches, training=False)
