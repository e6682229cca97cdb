"""Clocks of ranks: the truth lies within the bounds that are told, and one clock is seen to be one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.clocks import Stopwatch, clocks_from, compare_clocks
from megalm.testing.processes import run_processes


def barriers(draw: random.Random, ahead: list[float], rounds: int) -> list[list[float]]:
    """What ranks with such clocks note: all leave after the last has entered."""
    rows: list[list[float]] = [[] for _ in ahead]
    now = 0.0
    for _ in range(rounds):
        entered = [now + draw.expovariate(1e4) for _ in ahead]
        left = [max(entered) + draw.expovariate(1e4) for _ in ahead]
        for row, offset, a, z in zip(rows, ahead, entered, left, strict=True):
            row += [a + offset, z + offset]
        now = max(left)
    return rows


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_truth_is_within_the_bounds(ranks: int, campaign_seed: int) -> None:
    draw = random.Random(f"{campaign_seed} clocks {ranks}")
    for _ in range(200):
        ahead = [0.0, *(draw.choice([1e5, 1e-2, 1e-5]) * draw.uniform(-1, 1) for _ in range(ranks - 1))]
        found = clocks_from(barriers(draw, ahead, 16))
        assert found.ahead[0] == 0
        wrong = [mine - true for mine, true in zip(found.ahead, ahead, strict=True)]
        assert max(wrong) - min(wrong) <= found.error + 1e-9, "between any two ranks"
        assert found.error < 5e-4


def test_more_barriers_tell_more(campaign_seed: int) -> None:
    ahead = [0.0, 17.0]
    few, many = (
        [clocks_from(barriers(random.Random(f"{campaign_seed} {n}"), ahead, rounds)).error for n in range(50)]
        for rounds in (1, 16)
    )
    assert sum(many) < sum(few) / 2


def test_one_clock_is_taken_as_one(campaign_seed: int) -> None:
    found = clocks_from(barriers(random.Random(campaign_seed), [0.0, 0.0, 0.0], 16))
    assert found.ahead == (0.0, 0.0, 0.0)
    assert found.error > 0


def compared(parallel: ParallelContext) -> dict[str, torch.Tensor]:
    found = compare_clocks(parallel.pp, parallel.device)
    values = {"ahead": found.ahead, "error": (found.error,)}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@pytest.mark.parametrize("run", [run_simulated, run_processes], ids=["simulated", "gloo"])
def test_ranks_of_one_host(run: Callable[..., list[dict[str, torch.Tensor]]]) -> None:
    for found in run(compared, pp=3):
        assert found["ahead"].tolist() == [0, 0, 0]
        assert 0 < found["error"].item() < 1


@pytest.mark.dist
def test_a_clock_that_is_ahead_is_found() -> None:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        honest = time.perf_counter
        shift = (0.0, 3600.0, -5.0)[parallel.pp.index]
        time.perf_counter = lambda: honest() + shift
        try:
            return compared(parallel)
        finally:
            time.perf_counter = honest

    for found in run_processes(rank, pp=3):
        wrong = (found["ahead"] - torch.tensor([0.0, 3600.0, -5.0], dtype=torch.float64)).abs().max()
        assert wrong <= found["error"].item()


def test_a_group_of_one() -> None:
    parallel = single_rank()
    assert compare_clocks(parallel.pp, parallel.device).ahead == (0.0,)


def test_a_stopwatch_notes_moments_in_order() -> None:
    before, watch = time.perf_counter(), Stopwatch(torch.device("cpu"))
    for _ in range(3):
        watch.mark()
    moments: list[Any] = [before, *watch.moments(), time.perf_counter()]
    assert moments == sorted(moments)
    assert len(moments) == 5
