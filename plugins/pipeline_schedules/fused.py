"""Schedules whose backward is one action: GPipe, 1F1B, and 1F1B with several stages on a rank."""

from __future__ import annotations

from itertools import chain, pairwise
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
)

F, BW = ActionKind.F, ActionKind.BW


class GPipe(PipelineSchedule):
    """All forwards, then all backwards. With V > 1 stage by stage, which is breadth-first pipeline parallelism."""

    reference = "Huang et al., GPipe, NeurIPS 2019; for V > 1 Lamy-Poirier, Breadth-First Pipeline Parallelism, 2022"

    def build(self, shape: PipelineShape) -> PipelineOrder:
        numbers = range(shape.microbatches)
        ranks = []
        for rank in range(shape.ranks):
            stages = range(rank, shape.stages, shape.ranks)
            forward = [Action(F, stage, m) for stage in stages for m in numbers]
            backward = [Action(BW, stage, m) for stage in reversed(stages) for m in numbers]
            ranks.append((*forward, *backward))
        return PipelineOrder(loop_placement(shape.ranks, shape.virtual), tuple(ranks), shape.microbatches)

    def formula(self, shape: PipelineShape, costs: Costs) -> BubbleFormula:
        return _fused_bubble(shape, costs)


class OneForwardOneBackward(PipelineSchedule):
    """After a warm-up of P-1-r forwards, rank r does a forward and a backward by turns."""

    reference = "Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training (PipeDream-Flush), ICML 2021"

    def objection(self, shape: PipelineShape) -> str | None:
        return None if shape.virtual == 1 else "it has one stage a rank; with several it is called interleaved"

    def build(self, shape: PipelineShape) -> PipelineOrder:
        numbers = range(shape.microbatches)
        ranks = []
        for rank in range(shape.ranks):
            forward = [Action(F, rank, m) for m in numbers]
            backward = [Action(BW, rank, m) for m in numbers]
            ranks.append(one_by_one(forward, backward, shape.ranks - 1 - rank))
        return PipelineOrder(loop_placement(shape.ranks), tuple(ranks), shape.microbatches)

    def formula(self, shape: PipelineShape, costs: Costs) -> BubbleFormula:
        return _fused_bubble(shape, costs)


class Interleaved(PipelineSchedule):
    """Stages go round the ranks; microbatches go through them in groups of at least P.

    Groups of exactly P, where M is a multiple of P, give Megatron-LM's order. Else the groups are as equal as they can
    be, and larger than P: no rank then waits for a microbatch to come round, at the price of a longer warm-up.
    """

    reference = "Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters, SC 2021"
    default_virtual: ClassVar[int] = 2

    def objection(self, shape: PipelineShape) -> str | None:
        return None if shape.virtual > 1 else "it needs several stages a rank; with one it is called 1f1b"

    def build(self, shape: PipelineShape) -> PipelineOrder:
        groups = _groups(shape)
        warm_up = (shape.virtual - 1) * max(map(len, groups))
        ranks = []
        for rank in range(shape.ranks):
            stages = range(rank, shape.stages, shape.ranks)
            forward = [Action(F, stage, m) for group in groups for stage in stages for m in group]
            backward = [Action(BW, stage, m) for group in groups for stage in reversed(stages) for m in group]
            ranks.append(one_by_one(forward, backward, warm_up + 2 * (shape.ranks - 1 - rank)))
        return PipelineOrder(loop_placement(shape.ranks, shape.virtual), tuple(ranks), shape.microbatches)

    def formula(self, shape: PipelineShape, costs: Costs) -> BubbleFormula:
        premises = "equal stages, no communication cost, M a multiple of P"
        holds = costs.uniform and costs.comm == 0 and shape.microbatches % shape.ranks == 0
        return BubbleFormula("(P-1)/(V*M+P-1)", _fill_and_drain(shape), "idle", premises, holds)


def one_by_one(forward: list[Action], backward: list[Action], warm_up: int) -> tuple[Action, ...]:
    """``warm_up`` forwards, then a forward and a backward by turns, then what is left of the backwards."""
    warm_up = min(warm_up, len(forward))
    turns = chain.from_iterable(zip(forward[warm_up:], backward, strict=False))
    return (*forward[:warm_up], *turns, *backward[len(forward) - warm_up :])


def _groups(shape: PipelineShape) -> list[range]:
    """Microbatches in groups of P or more, as equal as they can be; one group where there are fewer than P."""
    count = max(1, shape.microbatches // shape.ranks)
    cuts = [shape.microbatches * i // count for i in range(count + 1)]
    return [range(first, last) for first, last in pairwise(cuts)]


def _fused_bubble(shape: PipelineShape, costs: Costs) -> BubbleFormula:
    """Of GPipe and 1F1B: every rank idles while the pipeline fills and drains, P-1 times a stage's F and BW."""
    text = "(P-1)/(M+P-1)" if shape.virtual == 1 else "(P-1)/(V*M+P-1)"
    holds = costs.uniform and costs.comm == 0 and shape.microbatches >= shape.ranks
    premises = "equal stages, no communication cost, M >= P"
    return BubbleFormula(text, _fill_and_drain(shape), "idle", premises, holds)


def _fill_and_drain(shape: PipelineShape) -> float:
    return (shape.ranks - 1) / (shape.virtual * shape.microbatches + shape.ranks - 1)
