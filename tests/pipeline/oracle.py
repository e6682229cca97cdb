"""What is true of a schedule, found out without the engine: plain Python over strings, written for these tests.

A schedule is a placement and a list of rows; an action is a string such as ``2BW7``.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

from megalm.plugin.contract.pipeline import PipelineOrder

Rows = list[list[str]]


def rows_of(order: PipelineOrder) -> Rows:
    return [[str(action) for action in actions] for actions in order.ranks]


def parts(action: str) -> tuple[int, str, int]:
    stage, kind, microbatch = re.fullmatch(r"(\d+)([FBW]+)(\d+)", action).groups()  # type: ignore[union-attr]
    return int(stage), kind, int(microbatch)


def complete(placement: tuple[int, ...], rows: Rows, microbatches: int) -> bool:
    """Each stage's F, B and W of each microbatch exactly once, on its rank; BW counts as both."""
    found: Counter[tuple[int, int, str, int]] = Counter()
    for rank, row in enumerate(rows):
        for stage, kind, m in map(parts, row):
            for letter in kind:
                found[rank, stage, letter, m] += 1
    wanted = {(placement[s], s, k, m) for s in range(len(placement)) for k in "FBW" for m in range(microbatches)}
    return found == Counter(wanted)


def comes_to_the_end(placement: tuple[int, ...], rows: Rows) -> bool:
    """Brute force: as long as some rank can take its next action, let it."""
    last = len(placement) - 1
    have: set[tuple[str, int, int]] = set()
    at = [0] * len(rows)
    while True:
        moved = False
        for rank, row in enumerate(rows):
            if at[rank] == len(row):
                continue
            stage, kind, m = parts(row[at[rank]])
            if kind == "F":
                can = stage == 0 or ("out", stage - 1, m) in have
            elif kind == "W":
                can = ("in-gradient", stage, m) in have
            else:
                can = ("out", stage, m) in have and (stage == last or ("in-gradient", stage + 1, m) in have)
            if can:
                if kind == "F":
                    have.add(("out", stage, m))
                elif kind != "W":
                    have.add(("in-gradient", stage, m))
                at[rank] += 1
                moved = True
        if not moved:
            return all(n == len(row) for n, row in zip(at, rows, strict=True))


def valid(placement: tuple[int, ...], rows: Rows, microbatches: int) -> bool:
    return complete(placement, rows, microbatches) and comes_to_the_end(placement, rows)


def peaks(row: list[str]) -> tuple[int, int]:
    """Most (stage, microbatch) pairs alive on a rank at a time: from F to B, and from F to W. By intervals."""
    place = {action: n for n, action in enumerate(row)}
    lives: dict[str, list[tuple[int, int]]] = {"B": [], "W": []}
    for action, begin in place.items():
        stage, kind, m = parts(action)
        if kind == "F":
            both = place.get(f"{stage}BW{m}")
            for letter in "BW":
                end = both if both is not None else place[f"{stage}{letter}{m}"]
                lives[letter].append((begin, end))
    return tuple(max(sum(a <= n <= z for a, z in lives[k]) for n in range(len(row))) for k in "BW")  # type: ignore


def times(
    placement: tuple[int, ...], rows: Rows, cost: dict[tuple[int, str], float], comm: float
) -> dict[str, tuple[float, float]]:
    """Start and end of each action by the longest path, found by relaxing every edge until nothing moves."""
    last = len(placement) - 1
    length = {}
    edges: list[tuple[str, str, float]] = []
    names = {action for row in rows for action in row}
    for row in rows:
        edges += [(a, b, 0.0) for a, b in pairwise(row)]
    for action in names:
        stage, kind, m = parts(action)
        length[action] = sum(cost[stage, letter] for letter in kind)
        if kind == "F" and stage:
            sources = [(stage - 1, "F")]
        elif kind == "F":
            sources = []
        elif kind == "W":
            sources = [(stage, "B")]
        else:
            sources = [(stage, "F")] + [(stage + 1, k) for k in ("B", "BW") if stage < last]
        for other, k in sources:
            if f"{other}{k}{m}" in names:
                edges.append((f"{other}{k}{m}", action, comm * (placement[other] != placement[stage])))
    start = dict.fromkeys(names, 0.0)
    for _ in range(len(names) + 1):
        moved = False
        for a, b, lag in edges:
            if start[a] + length[a] + lag > start[b] + 1e-12:
                start[b], moved = start[a] + length[a] + lag, True
        if not moved:
            return {action: (begin, begin + length[action]) for action, begin in start.items()}
    raise AssertionError("the order has a circle")


def critical_path(placement: tuple[int, ...], rows: Rows, cost: dict[tuple[int, str], float], comm: float) -> float:
    """The larger of one microbatch's way there and back, and the busiest rank's work."""
    hops = comm * sum(a != b for a, b in pairwise(placement))
    way = sum(cost[s, "F"] + cost[s, "B"] for s in range(len(placement))) + 2 * hops
    if any(parts(action)[1] == "BW" for action in rows[0]):
        way += sum(cost[s, "W"] for s in range(len(placement)))
    work = max(sum(cost[parts(a)[0], letter] for a in row for letter in parts(a)[1]) for row in rows)
    return max(way, work)
