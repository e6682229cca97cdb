"""The first thing that is wrong with a schedule: an action that is missing, repeated or misplaced, or a circle of ranks
that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalm.pipeline.dependencies import BW, B, F, Place, Places, W
from megalm.pipeline.execute import execute
from megalm.plugin.contract.pipeline import Action, Costs, PipelineOrder

FaultKind = Literal["unknown", "wrong rank", "duplicate", "missing", "order", "circle"]
_NAMES = {F: "forward", B: "input gradient", W: "weight gradients", BW: "backward"}


@dataclass(frozen=True)
class Fault:
    """The first thing that is wrong with a schedule."""

    kind: FaultKind
    rank: int
    index: int
    """In the rank's order; its length where something is missing at its end."""
    action: Action
    """The offending one; of kind ``missing`` it may be the one that is not there."""
    reason: str


def find_fault(order: PipelineOrder) -> Fault | None:
    """The first offending action in reading order, rank by rank; None for a schedule that can run."""
    for stage, rank in enumerate(order.placement):
        if not 0 <= rank < len(order.ranks):
            reason = f"stage {stage} is placed on rank {rank}, but there are {len(order.ranks)} ranks"
            return Fault("wrong rank", 0, 0, Action(F, stage, 0), reason)
    for rank in range(len(order.ranks)):
        if fault := next(_wrong_on_rank(order, rank), None):
            return fault
    return _circle(order)


def _wrong_on_rank(order: PipelineOrder, rank: int) -> Iterator[Fault]:
    first: dict[Action, int] = {}
    for index, action in reversed(list(enumerate(order.ranks[rank]))):
        first[action] = index
    done: dict[Action, int] = {}
    for index, action in enumerate(order.ranks[rank]):
        fault = _misplaced(order, rank, action) or _repeated(order, rank, action, done)
        fault = fault or _too_early(order, rank, action, done, first)
        if fault:
            yield Fault(fault[0], rank, index, action, fault[1])
            return
        done[action] = index
    for stage in order.stages_of(rank):
        for microbatch in range(order.microbatches):
            for kind in (F, B, W) if order.training else (F,):
                missing = Action(kind, stage, microbatch)
                if not _done(missing, done):
                    reason = f"{missing}, the {_NAMES[kind]} of microbatch {microbatch} on stage {stage}, is missing"
                    yield Fault("missing", rank, len(order.ranks[rank]), missing, reason)


def _misplaced(order: PipelineOrder, rank: int, action: Action) -> tuple[FaultKind, str] | None:
    kind, stage, microbatch = action
    if kind is not F and not order.training:
        return "unknown", f"{action} is of kind {kind}; this order is of forwards only"
    if not 0 <= stage < order.stages:
        return "unknown", f"{action} is of stage {stage}; the stages are 0 to {order.stages - 1}"
    if not 0 <= microbatch < order.microbatches:
        return "unknown", f"{action} is of microbatch {microbatch}; they are 0 to {order.microbatches - 1}"
    owner = order.placement[stage]
    if owner != rank:
        return "wrong rank", f"{action} is on rank {rank}, but stage {stage} belongs to rank {owner}"
    return None


def _repeated(order: PipelineOrder, rank: int, action: Action, done: dict[Action, int]) -> tuple[FaultKind, str] | None:
    kind, stage, microbatch = action
    if action in done:
        return "duplicate", f"{action} is there twice; the first is at {order.where(rank, done[action])}"
    rivals = (B, W) if kind is BW else () if kind is F else (BW,)
    for rival in (Action(other, stage, microbatch) for other in rivals):
        if rival in done:
            return "duplicate", f"{action} repeats what {rival} at {order.where(rank, done[rival])} has computed"
    return None


def _too_early(
    order: PipelineOrder, rank: int, action: Action, done: dict[Action, int], first: dict[Action, int]
) -> tuple[FaultKind, str] | None:
    kind, stage, microbatch = action
    if kind is F:
        return None
    before = Action(B if kind is W else F, stage, microbatch)
    if before in done:
        return None
    what = f"the {_NAMES[before.kind]} that it needs, {before},"
    if before in first:
        return "order", f"{action} comes before {what} at {order.where(rank, first[before])}"
    return "missing", f"{action} is there, but {what} is missing"


def _done(action: Action, done: dict[Action, int]) -> bool:
    kind, stage, microbatch = action
    return action in done or (kind in (B, W) and Action(BW, stage, microbatch) in done)


def _circle(order: PipelineOrder) -> Fault | None:
    """Ranks that wait for each other, where each action by itself is in its place."""
    stuck = {place.rank: place for place in execute(order, Costs()).stuck(order)}
    if not stuck:
        return None
    places = Places(order)
    at = stuck[min(stuck)]
    seen: list[Place] = []
    links = []
    while at not in seen:
        seen.append(at)
        action = order.ranks[at.rank][at.at]
        # What it waits for is on a rank that is stuck as well, at or before it.
        wanted = next(p for p in places.waits(action) if p.rank in stuck and p.at >= stuck[p.rank].at)
        other, head = order.ranks[wanted.rank][wanted.at], stuck[wanted.rank]
        link = f"{action} ({order.where(*at)}) waits for {other} ({order.where(*wanted)})"
        if head != wanted:
            link += f", which comes after {order.ranks[head.rank][head.at]}"
        links.append(link)
        at = head
    circle = links[seen.index(at) :]
    action = order.ranks[at.rank][at.at]
    return Fault("circle", at.rank, at.at, action, f"{action} can never run: " + "; ".join(circle))
