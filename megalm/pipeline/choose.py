"""From a name (``1f1b``, ``plugin:1f1b``, with an argument ``csv:FILE``) to a schedule and a shape that it admits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from megalm.config import argument as arguments
from megalm.config.pairs import settings_from_pairs
from megalm.config.settings import Settings
from megalm.errors import MegalmError, PluginError, ScheduleError
from megalm.plugin.blame import describe
from megalm.plugin.component import PluginInfo
from megalm.plugin.contract.pipeline import (
    Action,
    ActionKind,
    BubbleFormula,
    Costs,
    PipelineOrder,
    PipelineSchedule,
    PipelineShape,
)
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
    plugin: PluginInfo | None = None
    """Who is named where the schedule's own code fails."""

    def shape(self, ranks: int | None, microbatches: int | None, virtual: int | None) -> PipelineShape:
        """The shape asked for; what is None is the schedule's own. ScheduleError where it has none."""
        fixed = self.fixed_shape
        if fixed is not None:
            return PipelineShape(ranks or fixed.ranks, microbatches or fixed.microbatches, virtual or fixed.virtual)
        if ranks is None or microbatches is None:
            missing = "stages" if ranks is None else "microbatches"
            raise ScheduleError(f"{self.name} needs to know the number of {missing}; give --{missing} N")
        return PipelineShape(ranks, microbatches, virtual or self.schedule.default_virtual)

    def build(self, shape: PipelineShape) -> PipelineOrder:
        """The order, not verified. ScheduleError where the shape is not admitted, with the nearest that are.

        PluginError where the schedule's own code fails, here as in all that follows.
        """
        objection = self.objection(shape)
        if objection is not None:
            near = ", ".join(map(str, nearest(self, shape)))
            hint = f"; what it admits: {near}" if near else ""
            raise ScheduleError(f"{self.name} does not admit {shape}: {objection}{hint}")
        with self._blamed(f"build({shape})"):
            order = _checked(self.name, self.schedule.build(shape))
        found = (len(order.ranks), order.microbatches, order.stages)
        if found != (shape.ranks, shape.microbatches, shape.stages) and self.fixed_shape is None:
            raise ScheduleError(
                f"{self.name} was asked for {shape.ranks} ranks, {shape.microbatches} microbatches and {shape.stages} "
                f"stages, and built an order of {found[0]}, {found[1]} and {found[2]}: its plugin is at fault"
            )
        return order

    def objection(self, shape: PipelineShape) -> str | None:
        """Why the shape is not admitted; None if it is."""
        with self._blamed(f"objection({shape})"):
            return self.schedule.objection(shape)

    def formula(self, shape: PipelineShape, costs: Costs) -> BubbleFormula | None:
        """What the literature says of its bubble."""
        with self._blamed(f"formula({shape})"):
            return self.schedule.formula(shape, costs)

    @property
    def fixed_shape(self) -> PipelineShape | None:
        """The only shape that it has, if it has only one."""
        with self._blamed("fixed_shape"):
            return self.schedule.fixed_shape

    def _blamed(self, call: str) -> AbstractContextManager[None]:
        return _blamed(self.name, self.plugin, call)


@contextmanager
def _blamed(name: str, plugin: PluginInfo | None, call: str) -> Iterator[None]:
    """A PluginError that names the plugin for any error but one of megalm's, which is a message to the user already."""
    try:
        yield
    except MegalmError:
        raise
    except Exception as error:
        owner = "" if plugin is None else f" of plugin {plugin}"
        raise PluginError(f'pipeline schedule "{name}"{owner} failed in {call}: {describe(error)}') from error


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

    PluginError where it is unknown, lacks its argument, has one that it cannot use, or fails; ConfigError with all that
    is wrong with the pairs.
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
    with _blamed(text, component.plugin, "__init__"):
        schedule = cls(settings, argument)
    return Chosen(text, schedule, component.plugin)


def split_argument(text: str, manager: PluginManager) -> tuple[str, str | None]:
    """Name and argument of a schedule."""
    return arguments.split_argument(text, KIND, manager)


def nearest(chosen: Chosen, shape: PipelineShape) -> list[PipelineShape]:
    """Admitted shapes that differ in one number from the one asked for, at most one above and one below for each; or,
    where there is none, the schedule's only shape."""
    found = []
    for name in ("virtual", "microbatches", "ranks"):
        for step in (-1, 1):
            found += [next(_admitted(chosen, shape, name, step), None)]
    near = [each for each in found if each is not None]
    fixed = chosen.fixed_shape
    return near or ([fixed] if fixed is not None else [])


def _admitted(chosen: Chosen, shape: PipelineShape, name: str, step: int) -> Iterator[PipelineShape]:
    value: int = getattr(shape, name)
    for distance in range(1, FARTHEST + 1):
        if (changed := value + step * distance) >= 1:
            candidate = replace(shape, **{name: changed})
            if chosen.objection(candidate) is None:
                yield candidate
