"""Pipelined layouts to prove things under, drawn from the schedules that are loaded.

No schedule is known by name. What tells them apart is what their orders do: whether the last stage lets several
microbatches wait for their backward, whether a backward comes in two parts, whether a rank has several stages. So a
third party's schedule takes part in every proof, and the quick set still has each kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from megalm.pipeline.choose import KIND, Chosen, choose
from megalm.plugin.contract.pipeline import ActionKind, PipelineOrder, PipelineShape
from megalm.plugin.manager import PluginManager
from megalm.testing.layouts import RankLayout, cuts, every_grid

MICROBATCHES = 6
"""At most, of each data-parallel rank."""
VIRTUAL = 3
"""Stages of a rank, at most."""
STAGES = 16
"""Of a whole pipeline, at most: each needs a layer, and layers are what these proofs cost."""
SHORT_SIZES, LONG = 4, 6
"""The full set has so many pipeline sizes of up to ``LONG`` ranks for each schedule, and one that is longer."""
QUICK_MICROBATCHES, QUICK_STAGES, QUICK_RANKS = 3, 4, 4


def loaded_schedules(manager: PluginManager) -> list[Chosen]:
    """Every schedule that computes its orders: none that takes an argument, such as a file. PluginError where one
    cannot be loaded."""
    found = []
    for name, components in manager.registry(KIND).items():
        for component in components:
            full = name if len(components) == 1 else f"{component.plugin and component.plugin.name}:{name}"
            if manager.load_class(KIND, full).argument_name is None:
                found.append(choose(full, manager))
    return found


def quick_pipelines(seed: int, sequence_length: int, schedules: Sequence[Chosen]) -> list[RankLayout]:
    """A pipeline of tensor-parallel ranks in which microbatches wait at the end, one of data-parallel ranks whose
    backward comes in two parts, and one of up to four ranks with several stages each, as far as schedules have that."""
    draw = random.Random(f"pipelines {seed}")
    by_name = {chosen.name: chosen for chosen in schedules}

    def does(trait: Callable[[PipelineOrder], bool], layout: RankLayout) -> bool:
        return trait(by_name[str(layout.schedule)].build(_shape(layout)))

    tensor, data = RankLayout(tp=2, sp=sequence_length % 2 == 0), RankLayout(dp=2)
    kinds: list[tuple[Callable[[PipelineOrder], bool], list[RankLayout]]] = [
        (several_wait, [layout for chosen in schedules for layout in _quick(chosen, tensor, 2)]),
        (in_parts, [layout for chosen in schedules for layout in _quick(chosen, data, 2)]),
        (several_stages, [each for s in schedules for each in _every(s, sequence_length, QUICK_RANKS, _quick)]),
    ]
    found: list[RankLayout] = []
    for trait, layouts in kinds:
        possible = [layout for layout in layouts if layout not in found]
        fitting = [layout for layout in possible if does(trait, layout)] or possible
        other = [layout for layout in fitting if layout.schedule not in {each.schedule for each in found}]
        found += _draw(draw, other or fitting)
    return found[:-1] + [_uneven(draw, layout) for layout in found[-1:]]


def full_pipelines(seed: int, sequence_length: int, schedules: Sequence[Chosen], ranks: int = 16) -> list[RankLayout]:
    """For every schedule one layout with every axis, and several of other pipeline sizes; uneven stages among them."""
    draw = random.Random(f"pipelines {seed}")
    found: list[RankLayout] = []
    for chosen in schedules:
        every = list(_every(chosen, sequence_length, ranks, _with_pipeline))
        sizes = sorted({layout.pp for layout in every})
        groups = [[each for each in every if each.tp > 1 and each.dp > 1]]
        short, long = [pp for pp in sizes if pp <= LONG], [pp for pp in sizes if pp > LONG]
        drawn = [*draw.sample(short, min(SHORT_SIZES, len(short))), *draw.sample(long, min(1, len(long)))]
        groups += [[each for each in every if each.pp == pp] for pp in drawn]
        for group in groups:
            found += [_uneven(draw, layout) for layout in _draw(draw, group)]
    return list(dict.fromkeys(found))


def several_wait(order: PipelineOrder) -> bool:
    """The last stage does a forward while another microbatch waits there for its backward."""
    last = order.stages - 1
    kinds = [action.kind for action in order.ranks[order.placement[last]] if action.stage == last]
    return kinds[:2] == [ActionKind.F, ActionKind.F]


def in_parts(order: PipelineOrder) -> bool:
    """Backwards come in two parts."""
    return any(action.kind is ActionKind.W for _, _, action in order.actions())


def several_stages(order: PipelineOrder) -> bool:
    """A rank has several stages."""
    return order.stages_per_rank > 1


Pipelines = Callable[[Chosen, RankLayout, int], Iterator[RankLayout]]
"""(schedule, grid, pp) -> all that the schedule admits of it."""


def _every(chosen: Chosen, sequence_length: int, ranks: int, make: Pipelines) -> Iterator[RankLayout]:
    for grid in every_grid(sequence_length, ranks // 2):
        for pp in range(2, ranks // grid.ranks + 1):
            yield from make(chosen, grid, pp)


def _quick(chosen: Chosen, grid: RankLayout, pp: int) -> Iterator[RankLayout]:
    """Several microbatches: of one alone all schedules are alike."""
    found = _with_pipeline(chosen, grid, pp, QUICK_MICROBATCHES, QUICK_STAGES)
    return (layout for layout in found if layout.microbatches > 1)


def _with_pipeline(
    chosen: Chosen, grid: RankLayout, pp: int, microbatches: int = MICROBATCHES, stages: int = STAGES
) -> Iterator[RankLayout]:
    for micro_batch in cuts(grid, microbatches):
        for virtual in range(1, min(VIRTUAL, stages // pp) + 1):
            layout = replace(grid, micro_batch=micro_batch, pp=pp, schedule=chosen.name, virtual=virtual)
            if chosen.objection(_shape(layout)) is None:
                yield layout


def _shape(layout: RankLayout) -> PipelineShape:
    return PipelineShape(layout.pp, layout.microbatches, layout.virtual or 1)


def _draw(draw: random.Random, layouts: Sequence[RankLayout]) -> list[RankLayout]:
    """One, every schedule as likely as another; none of none."""
    if not layouts:
        return []
    name = draw.choice(sorted({str(layout.schedule) for layout in layouts}))
    return [draw.choice([layout for layout in layouts if layout.schedule == name])]


def _uneven(draw: random.Random, layout: RankLayout) -> RankLayout:
    """Half of them with a stage that has a layer more."""
    stages = layout.pp * (layout.virtual or 1)
    if draw.random() < 0.5:
        return layout
    longer = draw.randrange(stages)
    return replace(layout, split=tuple(1 + (stage == longer) for stage in range(stages)))
