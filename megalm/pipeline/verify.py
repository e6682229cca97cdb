"""Whether a schedule can run, found out before anything does.

Three questions, in this order; the first thing that is wrong is named with its place.

1. *Each action once, in its place.* Every stage computes F, then B, then W of every microbatch, each exactly once, on
   the rank that owns the stage; BW is both B and W.
2. *No circle.* Each rank takes its actions in order, each as soon as what it needs is there; all come to the end.
3. *No deadlock.* The lowered lists come to the end when every exchange blocks its rank until all of its transfers are
   done (rendezvous, in order). Whatever executes the lists less strictly then comes to the end as well.

What a rank holds follows from its order alone, whatever the actions cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from megalm.errors import ScheduleError
from megalm.pipeline.deadlock import find_deadlock
from megalm.pipeline.dependencies import BW, B, F, W
from megalm.pipeline.faults import find_fault
from megalm.pipeline.lower import Exchange, LoweredOrder, Message, Step, inputs, lower
from megalm.plugin.contract.pipeline import Action, Costs, PipelineOrder


@dataclass(frozen=True)
class RankPeaks:
    """The most that a rank holds at a moment."""

    activations: int
    """(stage, microbatch) pairs of which F has begun and B or BW has not ended: all that F saved for backward."""
    until_weights: int
    """Pairs of which F has begun and W or BW has not ended: of those past B, what W still needs (the inputs of the
    weights' layers and the gradients of their outputs). Equal to ``activations`` where no backward is split."""
    inbox: int
    """Messages that the rank has begun to receive and that no action has used: buffers, if posted as lowered."""
    outbox: int
    """Messages that the rank has sent, or is sending, and whose use nothing has answered yet
    (:attr:`megalm.pipeline.lower.LoweredOrder.answers`): their buffers are kept until then."""


@dataclass(frozen=True)
class Verified:
    """A schedule that can run."""

    lowered: LoweredOrder
    peaks: tuple[RankPeaks, ...]
    """By rank."""

    @property
    def order(self) -> PipelineOrder:
        return self.lowered.order


def verify(order: PipelineOrder, costs: Costs | None = None) -> Verified:
    """Prove that a schedule runs. ``costs``: nominal ones for :func:`megalm.pipeline.lower.lower`.

    Raises ScheduleError that names the first offending action, its place and the reason.
    """
    if fault := find_fault(order):
        raise ScheduleError(f"{order.where(fault.rank, fault.index)}: {fault.reason}")
    lowered = lower(order, costs)
    if problem := find_deadlock(lowered):
        raise ScheduleError(problem)
    return Verified(lowered, peaks(lowered))


def peaks(lowered: LoweredOrder) -> tuple[RankPeaks, ...]:
    """What each rank holds at most, see :class:`RankPeaks`."""
    return tuple(map(partial(_peaks, lowered.order), lowered.steps, lowered.answers))


def _peaks(order: PipelineOrder, steps: tuple[Step, ...], answers: Mapping[Message, tuple[Message, ...]]) -> RankPeaks:
    held, saved, inbox, outbox = set[tuple[int, int]](), set[tuple[int, int]](), 0, 0
    most = [0, 0, 0, 0]
    for step in steps:
        if isinstance(step, Exchange):
            received = sum(transfer.direction == "recv" for transfer in step.transfers)
            inbox += received
            outbox += len(step.transfers) - received
        else:
            key = (step.stage, step.microbatch)
            if step.kind is F:
                held.add(key)
                saved.add(key)
        most = [max(pair) for pair in zip(most, (len(held), len(saved), inbox, outbox), strict=True)]
        if isinstance(step, Action):
            used = inputs(order, step)
            inbox -= len(used)
            outbox -= sum(len(answers[message]) for message in used)
            if step.kind in (B, BW) or not order.training:
                held.discard(key)
            if step.kind in (W, BW) or not order.training:
                saved.discard(key)
    return RankPeaks(*most)
