"""What the checks of a pipeline schedule examine: the schedule, and shapes and costs to try it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from megalm.errors import PluginError
from megalm.pipeline.choose import Chosen, choose
from megalm.plugin.contract.pipeline import Costs, PipelineOrder, PipelineShape
from megalm.plugin.manager import PluginManager
from megalm.testing.check import CheckFailed

RANKS, MICROBATCHES, VIRTUAL = 4, 6, 3
FULL_RANKS, FULL_MICROBATCHES, FULL_VIRTUAL = 8, 20, 4


class ScheduleSubject:
    """A schedule by the name that users give it, with its argument if it takes one (``csv:FILE``)."""

    def __init__(
        self,
        name: str,
        *,
        manager: PluginManager | None = None,
        settings: Sequence[str] = (),
        full: bool = False,
        seed: int = 0,
    ) -> None:
        if settings:
            raise PluginError(f"settings of pipeline schedules cannot be given here; found {', '.join(settings)}")
        self.spec = name
        self.manager = manager or PluginManager.for_launch()
        self.full = full
        self.seed = seed
        self.chosen: Chosen = choose(name, self.manager)

    @property
    def name(self) -> str:
        """The component, without an argument."""
        argument = self.chosen.schedule.argument
        return self.spec if argument is None else self.spec.removesuffix(f":{argument}")

    def close(self) -> None:
        """Nothing is held."""

    def draws(self, what: str) -> Random:
        """Draws for one purpose, the same whenever it is asked for."""
        return Random(f"{self.seed}/{what}")

    def shapes(self) -> Iterator[PipelineShape]:
        """All small shapes, admitted or not; in the long form, larger ones as well."""
        ranks, microbatches, virtual = RANKS, MICROBATCHES, VIRTUAL
        if self.full:
            ranks, microbatches, virtual = FULL_RANKS, FULL_MICROBATCHES, FULL_VIRTUAL
        fixed = self.chosen.schedule.fixed_shape
        if fixed is not None:
            yield fixed
        for p in range(1, ranks + 1):
            for m in range(1, microbatches + 1):
                for v in range(1, virtual + 1):
                    if (shape := PipelineShape(p, m, v)) != fixed:
                        yield shape

    def admitted(self) -> list[PipelineShape]:
        """The shapes that the schedule admits. CheckFailed where there is none."""
        found = [shape for shape in self.shapes() if self.chosen.schedule.objection(shape) is None]
        if not found:
            raise CheckFailed(f"{self.spec} admits no shape of up to {RANKS} ranks and {MICROBATCHES} microbatches")
        return found

    def costs(self, draw: Random, order: PipelineOrder) -> Costs:
        """Random costs, by stage and by rank too, some of them nothing."""

        def cost() -> float:
            return (0.0, 1.0, round(draw.uniform(0.1, 4), 2))[draw.randrange(3)]

        return Costs(
            forward=cost(),
            backward=cost(),
            weight=cost(),
            comm=cost(),
            stages=draw.choice((None, tuple((cost(), cost(), cost()) for _ in range(order.stages)))),
            ranks=draw.choice((None, tuple(cost() + 0.5 for _ in order.ranks))),
        )
