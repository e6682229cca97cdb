"""How far each schedule is from the best order there is, found by exhaustive search.

The ratios are printed at the end of the session; with ``-v`` each one of drawn costs as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from megalm.pipeline.bound import lower_bound
from megalm.pipeline.simulate import simulate
from megalm.plugin.contract.pipeline import ActionKind, Costs, PipelineOrder

from .conftest import NAMES
from .optimum import Cost, by_permutation, shortest
from .oracle import rows_of
from .ratios import Ratio

Build = Callable[..., PipelineOrder]


def best(order: PipelineOrder, cost: Cost) -> tuple[int, int]:
    """Makespan, and the shortest that any order has."""
    makespan = round(simulate(order, Costs(*cost)).makespan)
    split = any(action.kind is ActionKind.B for _, _, action in order.actions())
    return makespan, shortest(order.placement, order.microbatches, split, cost, makespan)


@pytest.mark.parametrize("cost", [(1, 1, 1), (1, 2, 1), (2, 1, 3)])
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("gpipe", 2, 2), ("1f1b", 2, 3), ("1f1b", 3, 2), ("zb-h1", 2, 2), ("zb-v", 2, 1), ("interleaved", 2, 1)],
)
def test_the_search_finds_what_all_permutations_find(
    build: Build, name: str, ranks: int, microbatches: int, cost: Cost
) -> None:
    order = build(name, ranks, microbatches)
    every = by_permutation(order.placement, rows_of(order), cost)
    split = any(action.kind is ActionKind.B for _, _, action in order.actions())
    assert shortest(order.placement, microbatches, split, cost, known=1000) == every
    assert lower_bound(order, Costs(*cost)) <= every


@pytest.mark.parametrize("name", NAMES)
def test_with_equal_costs_no_order_is_better(build: Build, name: str, ratios: list[Ratio]) -> None:
    """F = B = W, P <= 3, M <= 4: each schedule is the best order of its placement and its kinds of action."""
    for ranks in (1, 2, 3):
        for microbatches in (1, 2, 3, 4):
            makespan, least = best(build(name, ranks, microbatches), (1, 1, 1))
            ratios.append(Ratio(name, ranks, microbatches, (1, 1, 1), makespan, least, drawn=False))
            assert makespan == least


UNEQUAL: list[Cost] = [(2, 3, 1), (1, 2, 1)]
LARGE = {("zb-v", 3, 3), ("zb-v", 3, 4), ("zb-v", 2, 4)}
"""Searches of many seconds."""


@pytest.mark.parametrize("name", NAMES)
def test_with_unequal_costs(build: Build, name: str, full: bool, ratios: list[Ratio]) -> None:
    """An order that is fixed in advance cannot be the best for all costs; it stays within a fifth."""
    for ranks in (1, 2, 3):
        for microbatches in (1, 2, 3, 4):
            if (name, ranks, microbatches) in LARGE and not full:
                continue
            order = build(name, ranks, microbatches)
            for cost in UNEQUAL:
                makespan, least = best(order, cost)
                ratios.append(Ratio(name, ranks, microbatches, cost, makespan, least, drawn=False))
                assert lower_bound(order, Costs(*cost)) <= least
                assert makespan <= 1.2 * least


def test_with_drawn_costs(build: Build, full: bool, campaign_seed: int, ratios: list[Ratio]) -> None:
    """Any costs: the bound is never above what the search finds, and the search never above the schedule."""
    draw = random.Random(campaign_seed)
    for _ in range(20 if full else 3):
        for name in NAMES:
            shape = (name, draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 4]))
            if shape in LARGE:
                shape = (name, 2, 3)
            cost = (draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([1, 2, 3]))
            order = build(*shape)
            makespan, least = best(order, cost)
            ratios.append(Ratio(*shape, cost, makespan, least, drawn=True))
            assert lower_bound(order, Costs(*cost)) <= least <= makespan
