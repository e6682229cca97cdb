"""Pipeline schedules as data: what a plugin returns, and all that the engine asks of it.

A schedule is two tables: which rank owns each stage, and what each rank does in which order. It holds neither times nor
communication. Times follow from costs, sends and receives are lowered from the orders (``megalm.pipeline.lower``), and
the same tables are verified, drawn, costed and executed. So an author writes a pure function and nothing else.

Nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple

from megalm.config.settings import Settings
from megalm.errors import ScheduleError


class ActionKind(StrEnum):
    """What a stage computes for a microbatch."""

    F = "F"
    """Forward."""
    B = "B"
    """Gradient of the stage's input, which the stage before it waits for."""
    W = "W"
    """Gradients of the stage's weights, for which nobody waits."""
    BW = "BW"
    """Both gradients at once; what it sends is ready at its end."""


class Action(NamedTuple):
    """One computation. As text ``2BW7``: stage 2, kind BW, microbatch 7."""

    kind: ActionKind
    stage: int
    """Of all stages, from 0, in the order of the model's layers."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


@dataclass(frozen=True)
class PipelineShape:
    """What a schedule is asked for. ScheduleError where a number is below 1."""

    ranks: int
    """Pipeline ranks, P."""
    microbatches: int
    """Microbatches of a step, M."""
    virtual: int = 1
    """Stages of each rank, V."""

    def __post_init__(self) -> None:
        for name in ("ranks", "microbatches", "virtual"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ScheduleError(f"a pipeline's {name} must be a whole number from 1; found {value!r}")

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.ranks * self.virtual

    def __str__(self) -> str:
        return f"P={self.ranks}, M={self.microbatches}, V={self.virtual}"


@dataclass(frozen=True)
class PipelineOrder:
    """A schedule: the placement of stages, and each rank's actions in order."""

    placement: tuple[int, ...]
    """For each stage the rank that owns it."""
    ranks: tuple[tuple[Action, ...], ...]
    """For each rank its actions in order."""
    microbatches: int
    training: bool = True
    """False: forwards only, for evaluation."""
    cells: tuple[tuple[str, ...], ...] | None = field(default=None, compare=False, repr=False)
    """Where each action was read, in words, if it comes from a file."""
    source: str = field(default="", compare=False, repr=False)
    """The file that it was read from."""

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def stages_per_rank(self) -> int:
        """The most that a rank owns."""
        return max((self.placement.count(rank) for rank in set(self.placement)), default=0)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in the order of the model's layers."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """(rank, index in its order, action), rank by rank."""
        for rank, actions in enumerate(self.ranks):
            for index, action in enumerate(actions):
                yield rank, index, action

    def where(self, rank: int, index: int) -> str:
        """Place of an action, in words; ``index`` may be the order's length, for its end."""
        if self.cells is not None and self.cells[rank]:
            cells = self.cells[rank]
            text = cells[index] if index < len(cells) else f"after {cells[-1]}"
            return f"{self.source}, {text}" if self.source else text
        return f"rank {rank}, action {index + 1}" if index < len(self.ranks[rank]) else f"rank {rank}, at the end"

    def forward_only(self) -> PipelineOrder:
        """The same order without its backward part."""
        ranks = tuple(tuple(a for a in actions if a.kind is ActionKind.F) for actions in self.ranks)
        return PipelineOrder(self.placement, ranks, self.microbatches, training=False)


def loop_placement(ranks: int, virtual: int = 1) -> tuple[int, ...]:
    """Rank of each stage where stages go round: 0 1 2 0 1 2."""
    return tuple(stage % ranks for stage in range(ranks * virtual))


def v_placement(ranks: int, virtual: int = 2) -> tuple[int, ...]:
    """Rank of each stage where stages go forth and back: 0 1 2 2 1 0."""
    return tuple(r if turn % 2 == 0 else ranks - 1 - r for turn in range(virtual) for r in range(ranks))


LARGEST_COST = 1e100
"""Sums and products of costs stay far below the largest float."""


@dataclass(frozen=True)
class Costs:
    """Seconds, or any unit, of each kind of action. BW costs B + W. ScheduleError where one is below 0 or above
    LARGEST_COST.

    The base costs are those of one stage, whatever V is.
    """

    forward: float = 1.0
    backward: float = 1.0
    """Of B, the gradient of the input."""
    weight: float = 1.0
    """Of W, the gradients of the weights."""
    comm: float = 0.0
    """From the end of an action to the moment when another rank can use its result. Links carry any number at once."""
    stages: tuple[tuple[float, float, float], ...] | None = None
    """F, B and W of each stage, in the place of the base costs."""
    ranks: tuple[float, ...] | None = None
    """A factor for each rank: 2 is a device of half the speed."""

    def __post_init__(self) -> None:
        values = [self.forward, self.backward, self.weight, self.comm, *(self.ranks or ())]
        values += [value for costs in self.stages or () for value in costs]
        for value in values:
            if not 0 <= value <= LARGEST_COST:
                raise ScheduleError(f"a cost must be a number from 0 to {LARGEST_COST:g}; found {value!r}")

    @property
    def uniform(self) -> bool:
        """Every stage and every rank costs the same."""
        return len(set(self.stages or ())) <= 1 and len(set(self.ranks or ())) <= 1


@dataclass(frozen=True)
class BubbleFormula:
    """A published figure for a schedule's bubble, beside which the simulated one is shown."""

    text: str
    """As the paper has it: ``(P-1)/(M+P-1)``."""
    value: float
    measure: Literal["idle", "span"]
    """``idle``: idle time over makespan. ``span``: (longest span of a rank - its work) / that span."""
    premises: str
    """What the paper assumes, in words."""
    holds: bool
    """Whether the shape and the costs at hand are as it assumes."""


class PipelineSchedule(ABC):
    """A schedule for any shape that it admits. ``Config`` validates ``[pipeline_schedule.NAME]``.

    Built as ``cls(cfg, argument)``. Every method is a pure function: the engine calls it on every rank and compares.
    """

    Config: ClassVar[type[Settings]] = Settings
    reference: ClassVar[str] = ""
    """The paper, or whoever is to be asked."""
    argument_name: ClassVar[str | None] = None
    """What follows ``NAME:`` where the schedule takes an argument (``FILE``); None: it takes none."""
    default_virtual: ClassVar[int] = 1
    """Stages of a rank where nobody says how many."""

    def __init__(self, cfg: Any, argument: str | None = None) -> None:
        self.cfg = cfg
        self.argument = argument

    @property
    def fixed_shape(self) -> PipelineShape | None:
        """The only shape that it has, for a schedule that is read and not computed."""
        return None

    def objection(self, shape: PipelineShape) -> str | None:
        """Why the shape is not admitted, as the end of "NAME does not admit P=2, M=3, V=1: ..."; None if it is.

        The engine asks for other shapes too, to tell the nearest that is admitted.
        """
        return None

    @abstractmethod
    def build(self, shape: PipelineShape) -> PipelineOrder:
        """The schedule for an admitted shape."""

    def formula(self, shape: PipelineShape, costs: Costs) -> BubbleFormula | None:
        """What the literature says of its bubble."""
        return None
