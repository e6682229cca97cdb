"""Every layout gives the loss and every gradient of one rank, and ranks of one program say the same.

Ranks are simulated, so that sixteen of them fit in one process and rounding is told from mistakes: float64, relative
tolerance 1e-10. Each layout runs under two random schedules, whose results must be the same bits: a result that depends
on who ran first is a race.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from megalm.model.spec import tensor_parallel_problems
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import Record, SimulatedWorld, run_simulated
from megalm.testing.check import CheckFailed
from megalm.testing.layouts import RankLayout, full_layouts, quick_layouts
from megalm.testing.objective.batches import without_labels
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.parity import differences, gradients_of, loss_and_gradients, loss_first
from megalm.testing.pipelines import full_pipelines, loaded_schedules, quick_pipelines
from megalm.train.feed import Rows
from megalm.train.prepare import Prepared

RTOL = {torch.float64: 1e-10, torch.float32: 1e-4}
MAX_REPORTED = 3
"""Wrong layouts after which the rest is not worth waiting for."""

Gradients = dict[str, torch.Tensor]


def assert_layout_parity(
    objective: str | ObjectiveSubject,
    layouts: Iterable[RankLayout] | None = None,
    dtype: torch.dtype = torch.float64,
    *,
    schedules: Sequence[int] = (1, 2),
) -> int:
    """Compare loss and every gradient of a step under each layout with those of one rank; how many were compared.

    Args:
        objective: the name of an installed one, or a subject with its settings.
        layouts: default: the quick ones, with a pipeline and without.
        dtype: of weights and gradients; float64 tells mistakes from rounding, float32 only large ones.
        schedules: seeds of the random schedules of simulated ranks, which must give equal bits.

    Raises:
        CheckFailed: (an AssertionError) with the layouts and tensors that differ.
    """
    if isinstance(objective, str):
        with ObjectiveSubject(objective) as subject:
            return assert_layout_parity(subject, layouts, dtype, schedules=schedules)
    chosen = layouts_for(objective, full=False) if layouts is None else list(layouts)
    wrong: list[str] = []
    for number, layout in enumerate(chosen, start=1):
        problems = compare_layout(objective, layout, dtype, schedules)
        if problems:
            wrong.append("\n".join([f"{layout}:", *(f"  {line}" for line in problems[:6])]))
        if len(wrong) == MAX_REPORTED or (wrong and number == len(chosen)):
            count = f"{len(wrong)} of {number} layouts differ from one rank" if number > 1 else "differs from one rank"
            raise CheckFailed(f"objective {objective.name}: {count}\n" + "\n".join(wrong))
    return len(chosen)


def layouts_for(subject: ObjectiveSubject, full: bool) -> list[RankLayout]:
    """What the seed gives, with pipelines of all schedules that are loaded. Where the subject asks for a sample of the
    quick ones, it is another for each name."""
    seed, length = subject.seed, subject.sequence_length
    schedules = loaded_schedules(subject.manager)
    if full:
        found = [*full_layouts(seed, length), *full_pipelines(seed, length, schedules)]
    else:
        found = [*quick_layouts(seed, length), *quick_pipelines(seed, length, schedules)]
    # An auxiliary model may have fewer heads than the model, so that fewer ranks can share them.
    found = [layout for layout in found if not tensor_parallel_problems(subject.prepared().spec, layout.tp)]
    if full or subject.sample is None:
        return found
    return random.Random(f"{subject.name} {seed}").sample(found, min(subject.sample, len(found)))


@contextmanager
def told_of(layout: RankLayout) -> Iterator[None]:
    """What is raised meanwhile gets a note that names the layout."""
    try:
        yield
    except Exception as error:
        error.add_note(f"under the layout {layout}")
        raise


def compare_layout(
    subject: ObjectiveSubject, layout: RankLayout, dtype: torch.dtype = torch.float64, schedules: Sequence[int] = (1, 2)
) -> list[str]:
    """What differs from one rank, a line each; best empty.

    Every rank has an objective of its own, as processes have: what one rank keeps, another does not see.
    """
    with told_of(layout):
        return _compare_layout(subject, layout, dtype, schedules)


def _compare_layout(
    subject: ObjectiveSubject, layout: RankLayout, dtype: torch.dtype, schedules: Sequence[int]
) -> list[str]:
    prepared, pipeline = subject.prepared_for(layout, str(dtype).removeprefix("torch."))
    first: list[Gradients] | None = None
    for seed in schedules:
        own = [subject.in_another_process(prepared) for _ in range(layout.ranks)]

        def rank(parallel: ParallelContext, own: list[Prepared] = own) -> Gradients:
            mine = own[parallel.rank]
            return loss_and_gradients(mine, parallel, micro_batch=layout.micro_batch, pipeline=pipeline)

        found = run_simulated(rank, **layout.world, device=subject.device, schedule="random", seed=subject.seed + seed)
        if first is None:
            first = found
        elif name := _unequal(first, found):
            return [f"{name}: other bits when ranks run in another order"]
    assert first is not None
    serial = single_rank(subject.device)
    expected = subject.once(("serial step", id(prepared)), lambda: loss_and_gradients(prepared, serial))
    problems = loss_first(differences(first[0], expected, rtol=RTOL[dtype]))
    for number, gradients in enumerate(first[1:], start=1):
        if not problems and (name := _unequal([first[0]], [gradients])):
            problems = [f"{name}: rank {number} has other bits than rank 0"]
    return problems


def _unequal(a: list[Gradients], b: list[Gradients]) -> str | None:
    for mine, other in zip(a, b, strict=True):
        for name, tensor in mine.items():
            if name not in other or not torch.equal(tensor, other[name]):
                return name
    return None


def layouts_agree(subject: ObjectiveSubject) -> str:
    """Loss and every gradient equal one rank's under every layout, whatever the order in which ranks run."""
    layouts = layouts_for(subject, subject.full)
    count = assert_layout_parity(subject, layouts)
    ranks = max(layout.ranks for layout in layouts)
    pipelines = sum(layout.pp > 1 for layout in layouts)
    told = f"{pipelines} of them with a pipeline" if pipelines else "none with a pipeline, for want of a schedule"
    return f"{count} layouts of up to {ranks} ranks, {told}, two schedules each, float64, rtol {RTOL[torch.float64]:g}"


def ranks_say_the_same(subject: ObjectiveSubject) -> str:
    """Every rank issues the same operations in the same order, also where its rows have nothing to score."""
    covered = 0
    for tp, dp, sp in ((2, 2, subject.sequence_length % 2 == 0), (1, 3, False)):
        micro_batch = 2
        prepared = subject.prepared(global_batch=micro_batch * dp, cell=micro_batch * dp)
        examples, starts = subject.examples(micro_batch * dp), range(0, micro_batch * dp, micro_batch)
        rows = [subject.rows(examples[first : first + micro_batch], first) for first in starts]
        cases = [rows]
        if (starved := without_labels(subject, rows[-1])) is not None:
            cases.append([*rows[:-1], starved])
        for mine in cases:
            world = SimulatedWorld(tp=tp, dp=dp, sp=sp, device=subject.device)
            world.run(partial(_share_of_step, prepared, mine))
            _compare_traces(subject, world)
            covered += 1
    return f"{covered} worlds"


def _share_of_step(prepared: Prepared, rows: list[Rows], parallel: ParallelContext) -> Gradients:
    return gradients_of(prepared, parallel, [rows[parallel.dp.index]])


def _compare_traces(subject: ObjectiveSubject, world: SimulatedWorld) -> None:
    traces: list[list[Record]] = [[r for r in world.trace if r.rank == rank] for rank in range(world.size)]
    for rank, trace in enumerate(traces[1:], start=1):
        for mine, first in zip([*trace, None], [*traces[0], None], strict=False):
            if (mine and _said(mine)) != (first and _said(first)):
                raise CheckFailed(
                    f"objective {subject.name}: rank {rank} goes another way than rank 0: {_spelled(mine)}, where "
                    f"rank 0 {_spelled(first)}. Make the same calls on ctx whatever the rows hold, also where nothing "
                    "is scored"
                )


def _said(record: Record) -> tuple[object, ...]:
    """Shapes may differ: of shards that are uneven, and of what a rank's own rows score."""
    return record.operation, record.group, record.call, record.dtype, record.phase


def _spelled(record: Record | None) -> str:
    if record is None:
        return "has ended its step"
    at = f" at {' < '.join(record.frames)}" if record.frames else ""
    during = f" during {record.phase}" if record.phase else ""
    return f"issues {record.operation} on {record.group}, its call {record.call} there{during}{at}"
