"""What an action waits for: the one definition that verification, simulation and lowering share.

F(s, m) needs F(s-1, m). B(s, m) and BW(s, m) need F(s, m), and the B or BW of (s+1, m). W(s, m) needs B(s, m). Besides,
a rank does one thing at a time, in its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder

F, B, W, BW = ActionKind.F, ActionKind.B, ActionKind.W, ActionKind.BW

Result = Literal["output", "input gradient"]


class Place(NamedTuple):
    """Where an action stands: a rank, and a position in its order."""

    rank: int
    at: int


def needs(action: Action, stages: int) -> Iterator[tuple[Result, int]]:
    """What an action uses, as (result, stage), all of its own microbatch, in a pipeline of so many stages."""
    kind, stage, _ = action
    if kind is F:
        if stage > 0:
            yield "output", stage - 1
    elif kind is W:
        yield "input gradient", stage
    else:
        yield "output", stage
        if stage < stages - 1:
            yield "input gradient", stage + 1


class Places:
    """Where each forward and each input gradient of an order is computed. The first counts where one is there twice."""

    def __init__(self, order: PipelineOrder) -> None:
        self.order = order
        self._of: dict[tuple[Result, int, int], Place] = {}
        for rank, index, (kind, stage, microbatch) in order.actions():
            if kind is not W:
                result: Result = "output" if kind is F else "input gradient"
                self._of.setdefault((result, stage, microbatch), Place(rank, index))

    def get(self, result: Result, stage: int, microbatch: int) -> Place | None:
        """Who computes it; None where nobody does."""
        return self._of.get((result, stage, microbatch))

    def waits(self, action: Action) -> Iterator[Place]:
        """The places of all that an action uses and somebody computes."""
        for result, stage in needs(action, self.order.stages):
            place = self._of.get((result, stage, action.microbatch))
            if place is not None:
                yield place
