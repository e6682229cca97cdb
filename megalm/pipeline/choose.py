"""From a name (``1f1b``, ``plugin:1f1b``, with an argument ``csv:FILE``) to a schedule and a shape that it admits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from megalm.config import argument as arguments
from megalm.config.pairs import settings_from_pairs
from megalm.config.settings import Settings
from megalm.errors import PluginError, ScheduleError
from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder, PipelineSchedule, PipelineShape
from megalm.plugin.manager import PluginManager

KIND = "pipeline_schedules"
FARTHEST = 64
"""How far from what was asked a number is looked for that is admitted."""


@dataclass(frozen=True)
class Chosen:
    """A schedule, ready to be asked for orders."""

    name: str
    """As it was asked for, with its argument."""
    schedule: PipelineSchedule

    def shape(self, ranks: int | None, microbatches: int | None, virtual: int | None) -> PipelineShape:
        """The shape asked for; what is None is the schedule's own. ScheduleError where it has none."""
        fixed = self.schedule.fixed_shape
        if fixed is not None:
            return PipelineShape(ranks or fixed.ranks, microbatches or fixed.microbatches, virtual or fixed.virtual)
        if ranks is None or microbatches is None:
            missing = "stages" if ranks is None else "microbatches"
            raise ScheduleError(f"{self.name} needs to know the number of {missing}; give --{missing} N")
        return PipelineShape(ranks, microbatches, virtual or self.schedule.default_virtual)

    def build(self, shape: PipelineShape) -> PipelineOrder:
        """The order, not verified. ScheduleError where the shape is not admitted, with the nearest that are."""
        objection = self.schedule.objection(shape)
        if objection is not None:
            near = ", ".join(map(str, nearest(self.schedule, shape)))
            hint = f"; what it admits: {near}" if near else ""
            raise ScheduleError(f"{self.name} does not admit {shape}: {objection}{hint}")
        order = _checked(self.name, self.schedule.build(shape))
        found = (len(order.ranks), order.microbatches, order.stages)
        if found != (shape.ranks, shape.microbatches, shape.stages) and self.schedule.fixed_shape is None:
            raise ScheduleError(
                f"{self.name} was asked for {shape.ranks} ranks, {shape.microbatches} microbatches and {shape.stages} "
                f"stages, and built an order of {found[0]}, {found[1]} and {found[2]}: its plugin is at fault"
            )
        return order


def _checked(name: str, order: Any) -> PipelineOrder:
    """The order that a plugin built, with kinds that it wrote as text (``"F"``); ScheduleError where it is none, or
    trains nothing, or leaves a rank without a stage."""
    if not isinstance(order, PipelineOrder):
        raise ScheduleError(f"{name}: build() must return a PipelineOrder; found {order!r}: its plugin is at fault")
    try:
        ranks = tuple(
            tuple(Action(ActionKind(kind), int(index(stage)), int(index(m))) for kind, stage, m in actions)
            for actions in order.ranks
        )
        placement = tuple(int(index(rank)) for rank in order.placement)
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            f"{name}: {error}; an action is a kind ({', '.join(ActionKind)}), a stage and a microbatch, and the "
            "placement is a rank for each stage: its plugin is at fault"
        ) from error
    if not order.training:
        raise ScheduleError(f"{name}: built an order of forwards only, which trains nothing: its plugin is at fault")
    for rank in range(len(ranks)):
        if rank not in placement:
            raise ScheduleError(f"{name}: rank {rank} has no stage: its plugin is at fault")
    return replace(order, ranks=ranks, placement=placement)


def choose(text: str, manager: PluginManager, settings: Settings | Sequence[str] = ()) -> Chosen:
    """Find a schedule by name. ``settings``: validated ones, or pairs ``key=value``.

    PluginError where it is unknown, lacks its argument, or has one that it cannot use; ConfigError with all that is
    wrong with the pairs.
    """
    name, argument = split_argument(text, manager)
    component = manager.get(KIND, name)
    cls: type[PipelineSchedule] = manager.load_class(KIND, name)
    if not argument and cls.argument_name is not None:
        raise PluginError(f'pipeline schedule "{name}" needs an argument: write {name}:{cls.argument_name}')
    if argument is not None and cls.argument_name is None:
        raise PluginError(f'pipeline schedule "{name}" takes no argument; found {argument!r} in "{text}"')
    if not isinstance(settings, Settings):
        section = ("pipeline_schedule", component.name)
        settings = settings_from_pairs(cls.Config, section, f"plugin {component.plugin}", settings)
    return Chosen(text, cls(settings, argument))


def split_argument(text: str, manager: PluginManager) -> tuple[str, str | None]:
    """Name and argument of a schedule."""
    return arguments.split_argument(text, KIND, manager)


def nearest(schedule: PipelineSchedule, shape: PipelineShape) -> list[PipelineShape]:
    """Admitted shapes that differ in one number from the one asked for, at most one above and one below for each; or,
    where there is none, the schedule's only shape."""
    found = []
    for name in ("virtual", "microbatches", "ranks"):
        for step in (-1, 1):
            found += [next(_admitted(schedule, shape, name, step), None)]
    near = [each for each in found if each is not None]
    fixed = schedule.fixed_shape
    return near or ([fixed] if fixed is not None else [])


def _admitted(schedule: PipelineSchedule, shape: PipelineShape, name: str, step: int) -> Iterator[PipelineShape]:
    value: int = getattr(shape, name)
    for distance in range(1, FARTHEST + 1):
        if (changed := value + step * distance) >= 1:
            candidate = replace(shape, **{name: changed})
            if schedule.objection(candidate) is None:
                yield candidate
