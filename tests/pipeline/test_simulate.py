"""Times, bubbles and formulas, against hand-made figures and an independent longest path."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from megalm.errors import ScheduleError
from megalm.pipeline.bound import lower_bound
from megalm.pipeline.choose import Chosen
from megalm.pipeline.simulate import Record, Timeline, simulate
from megalm.pipeline.verify import verify
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder, PipelineShape

from .conftest import NAMES
from .oracle import critical_path, rows_of, times

Build = Callable[..., PipelineOrder]
Admitted = Callable[..., list[tuple[str, PipelineShape]]]
F = ActionKind.F


def random_costs(draw: random.Random, order: PipelineOrder) -> tuple[Costs, dict[tuple[int, str], float]]:
    """Costs, and the same as a table of stage and letter."""

    def cost() -> float:
        return draw.choice([draw.uniform(0.05, 3), float(draw.randrange(4))])

    comm = draw.choice([0.0, draw.random()])
    base, factors, stages = (cost(), cost(), cost()), None, None
    if draw.random() < 0.3:
        factors = tuple(draw.uniform(0.5, 2) for _ in order.ranks)
    if draw.random() < 0.3:
        stages = tuple((cost(), cost(), cost()) for _ in order.placement)
    table = {
        (stage, letter): (stages[stage] if stages else base)[n] * (factors[rank] if factors else 1.0)
        for stage, rank in enumerate(order.placement)
        for n, letter in enumerate("FBW")
    }
    return Costs(*base, comm=comm, stages=stages, ranks=factors), table


def test_random_cases(build: Build, admitted: Admitted, campaign_seed: int, full: bool) -> None:
    """Every schedule verifies under its costs, every time is that of the longest path, and nothing is faster than the
    critical path.
    """
    draw = random.Random(campaign_seed)
    cases = admitted(4, 6)
    for _ in range(1000 if full else 200):
        name, shape = draw.choice(cases)
        order = build(name, shape.ranks, shape.microbatches, shape.virtual)
        costs, table = random_costs(draw, order)
        verify(order, costs)
        timeline = simulate(order, costs)
        expected = times(order.placement, rows_of(order), table, costs.comm)
        for record in timeline.records:
            assert (record.start, record.end) == pytest.approx(expected[str(record.action)], abs=1e-9), (name, shape)
        makespan = max(end for _, end in expected.values())
        assert timeline.makespan == pytest.approx(makespan, abs=1e-9)
        floor = critical_path(order.placement, rows_of(order), table, costs.comm)
        assert floor <= lower_bound(order, costs) + 1e-9
        assert lower_bound(order, costs) <= timeline.makespan + 1e-9


def test_published_formulas(schedules: dict[str, Chosen], full: bool) -> None:
    """Written here a second time, and not as the plugins have them."""
    for p in range(1, 9 if full else 6):
        for m in range(p, 4 * p + 1, 1 if full else 3):
            for f, b, w in ((1.0, 1.0, 1.0), (1.0, 2.0, 0.5), (0.3, 0.4, 0.25)):
                costs = Costs(f, b, w)

                def found(name: str, v: int, m: int = m, costs: Costs = costs, p: int = p) -> Timeline:
                    return simulate(schedules[name].build(PipelineShape(p, m, v)), costs)

                assert found("gpipe", 1).idle_fraction == pytest.approx((p - 1) / (m + p - 1))
                assert found("1f1b", 1).idle_fraction == pytest.approx((p - 1) / (m + p - 1))
                bubble = (p - 1) * (f + b - w)
                assert found("zb-h1", 1).span_bubble == pytest.approx(bubble / (m * (f + b + w) + bubble))
                if m % p == 0:
                    for v in (2, 3):
                        assert found("interleaved", v).idle_fraction == pytest.approx((p - 1) / (v * m + p - 1))
                if f == b == w and m >= 2 * p - 1:
                    assert found("zb-v", 2).span_bubble == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_says_when_its_formula_holds(schedules: dict[str, Chosen], name: str) -> None:
    schedule, shape = schedules[name].schedule, schedules[name].shape(4, 8, None)
    held = schedule.formula(shape, Costs())
    assert held is not None
    assert held.holds
    timeline = simulate(schedules[name].build(shape), Costs())
    assert held.value == pytest.approx(timeline.idle_fraction if held.measure == "idle" else timeline.span_bubble)
    for costs in (Costs(comm=0.1), Costs(ranks=(1, 1, 1, 2)), Costs(stages=((1, 1, 1),) * 3 + ((2, 2, 2),))):
        other = schedule.formula(shape, costs)
        assert other is not None
        assert not other.holds


def test_two_ranks_by_hand(build: Build) -> None:
    """1F1B, two microbatches: F of 1, BW of 3, half a unit of communication, the second rank twice as slow."""
    costs = Costs(1, 2, 1, comm=0.5, ranks=(1, 2))
    timeline = simulate(build("1f1b", 2, 2), costs)
    shown = {str(r.action): (r.start, r.end) for r in timeline.records}
    assert shown == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1.5, 3.5),
        "1BW0": (3.5, 9.5),
        "1F1": (9.5, 11.5),
        "1BW1": (11.5, 17.5),
        "0BW0": (10, 13),
        "0BW1": (18, 21),
    }
    assert timeline.makespan == 21
    assert timeline.work == [8, 16]
    assert timeline.spans == [21, 16]
    assert timeline.idle_fraction == pytest.approx(1 - 24 / 42)
    assert timeline.span_bubble == pytest.approx((21 - 8) / 21)


def test_costs_of_stages() -> None:
    order = PipelineOrder((0, 1), ((Action(F, 0, 0),), (Action(F, 1, 0),)), 1, training=False)
    timeline = simulate(order, Costs(stages=((5, 0, 0), (7, 0, 0)), comm=1))
    assert [(r.start, r.end) for r in timeline.records] == [(0, 5), (6, 13)]


def test_measured_records_have_the_same_figures() -> None:
    """Times of a clock that does not start at 0; a rank that did nothing."""
    records = (Record(0, Action(F, 0, 0), 100.0, 102.0), Record(1, Action(F, 1, 0), 102.0, 103.0))
    timeline = Timeline(3, records)
    assert (timeline.begin, timeline.makespan) == (100, 3)
    assert timeline.work == [2, 1, 0]
    assert timeline.idle_fraction == pytest.approx(1 - 3 / 9)
    assert timeline.span_bubble == 0
    busy = (Record(0, Action(F, 0, 0), 0, 4), Record(1, Action(F, 1, 0), 0, 1), Record(1, Action(F, 1, 1), 3, 4))
    assert Timeline(2, busy).span_bubble == 0.5, "of equal spans the one with the least work"
    empty = Timeline(2, ())
    assert (empty.makespan, empty.idle_fraction, empty.span_bubble) == (0, 0, 0)


def test_decimals_are_meant_as_written(build: Build) -> None:
    """Ten tenths are one: simultaneous events are simultaneous, so no bubble comes from rounding."""
    timeline = simulate(build("zb-v", 4, 10), Costs(0.1, 0.1, 0.1))
    assert timeline.span_bubble == pytest.approx(0.0, abs=1e-12)
    assert timeline.makespan == 6.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Costs(-1), "a cost must be a number from 0 to .*; found -1"),
        (lambda: Costs(comm=float("nan")), "found nan"),
        (lambda: Costs(stages=((1, float("inf"), 1),)), "found inf"),
        (lambda: PipelineShape(0, 1), "a pipeline's ranks must be a whole number from 1; found 0"),
        (lambda: PipelineShape(1, 1, 2.5), r"virtual must be a whole number from 1; found 2\.5"),  # type: ignore[arg-type]
    ],
)
def test_bad_numbers(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()


def test_costs_of_another_shape(build: Build) -> None:
    order = build("1f1b", 3, 2)
    with pytest.raises(ScheduleError, match="costs by rank: expected 3, one for each rank; found 2"):
        simulate(order, Costs(ranks=(1, 2)))
    with pytest.raises(ScheduleError, match="costs by stage: expected 3"):
        simulate(order, Costs(stages=((1, 1, 1),)))


def test_what_cannot_run_is_not_simulated() -> None:
    order = PipelineOrder((0, 0), ((Action(F, 1, 0), Action(F, 0, 0)),), 1, training=False)
    with pytest.raises(ScheduleError, match=r"the schedule cannot run: 1F0 \(rank 0, action 1\) waits"):
        simulate(order, Costs())
