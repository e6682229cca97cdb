"""The pipeline of a run: its stages, where they stand, and what each rank does in a step.

One rank is a pipeline of length one, with the plainest of orders, so that nobody has to ask whether there is a
pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

from megalm.config.settings import Settings
from megalm.errors import LayoutError, ScheduleError
from megalm.model.spec import ModelSpec
from megalm.model.stages import Stage, cut_stages, split_problems
from megalm.pipeline.choose import choose
from megalm.pipeline.forward import forward_order
from megalm.pipeline.lower import LoweredOrder, lower
from megalm.pipeline.verify import Verified, verify
from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder
from megalm.plugin.manager import PluginManager


class Pipeline:
    """A verified order and the stages that it places. Every rank builds the same one."""

    def __init__(self, name: str, order: PipelineOrder, spec: ModelSpec, split: Sequence[int] | None = None) -> None:
        """ScheduleError where the order cannot run; LayoutError, naming the key, where the model cannot be cut so."""
        if problems := split_problems(spec, order.stages, split):
            raise LayoutError("; ".join(problems))
        self.name = name
        self.verified: Verified = verify(order)
        self.stages: list[Stage] = cut_stages(spec, order.stages, split)
        self._forward: dict[int, LoweredOrder] = {}

    @property
    def order(self) -> PipelineOrder:
        """What is computed, where and in which order."""
        return self.verified.order

    @property
    def last_rank(self) -> int:
        """The pipeline rank that has the last stage, and so the loss."""
        return self.order.placement[-1]

    def stages_of(self, rank: int) -> list[Stage]:
        """Stages of a pipeline rank."""
        return [self.stages[number] for number in self.order.stages_of(rank)]

    def stages_for(self, spec: ModelSpec, rank: int) -> list[Stage]:
        """Stages of a pipeline rank of another model, which goes the same way and is cut by cost."""
        cut = cut_stages(spec, self.order.stages)
        return [cut[number] for number in self.order.stages_of(rank)]

    def forward_only(self, microbatches: int) -> LoweredOrder:
        """Forwards of any number of microbatches: each rank takes what became ready first."""
        if microbatches not in self._forward:
            self._forward[microbatches] = lower(forward_order(self.order.placement, microbatches))
        return self._forward[microbatches]


def serial_order(microbatches: int) -> PipelineOrder:
    """One rank with one stage: forward and backward of each microbatch in turn."""
    kinds = (ActionKind.F, ActionKind.BW)
    return PipelineOrder((0,), (tuple(Action(k, 0, n) for n in range(microbatches) for k in kinds),), microbatches)


def make_pipeline(
    spec: ModelSpec,
    manager: PluginManager,
    *,
    schedule: str,
    ranks: int,
    microbatches: int,
    virtual: int | None = None,
    split: Sequence[int] | None = None,
    settings: Settings | None = None,
) -> Pipeline:
    """The pipeline that a configuration asks for; ``schedule`` as ``megalm schedule`` takes it, ``settings`` its own.

    Raises PluginError for an unknown schedule or one whose plugin fails, ScheduleError for one that does not admit this
    shape, LayoutError for a model that cannot be cut so.
    """
    if ranks == 1 and virtual in (None, 1):
        return Pipeline("serial", serial_order(microbatches), spec, split)
    chosen = choose(schedule, manager, () if settings is None else settings)
    order = chosen.build(chosen.shape(ranks, microbatches, virtual))
    if (len(order.ranks), order.microbatches) != (ranks, microbatches):
        raise ScheduleError(
            f"{schedule} is for {len(order.ranks)} ranks and {order.microbatches} microbatches, but a step of this run "
            f"has {ranks} and {microbatches}"
        )
    return Pipeline(schedule, order, spec, split)
