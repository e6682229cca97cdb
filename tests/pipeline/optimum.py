"""The shortest makespan that any order has: same placement, same actions, memory without limit.

Two searches. :func:`by_permutation` tries every order of every rank: the definition, for the smallest cases.
:func:`shortest` goes moment by moment through all states that could still beat what is known, for costs in whole
numbers. It uses that microbatches are alike, so that each stage may take them in turn; and where all costs are 1,
that doing something at once never hurts, and a W only where there is nothing else. The first search proves the second
on small cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from .oracle import Rows, comes_to_the_end, parts, times

Cost = tuple[int, int, int]
Running = tuple[int, str, int]
State = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[Running, ...]]
NOTHING: Running = (0, "", -1)


def by_permutation(placement: tuple[int, ...], rows: Rows, cost: Cost) -> float:
    """Every interleaving of a rank's microbatches in which F is before B before W, on every rank."""
    table = {(s, k): float(c) for s in range(len(placement)) for k, c in zip("FBW", cost, strict=True)}
    best = float("inf")
    for orders in itertools.product(*(list(_interleavings(row)) for row in rows)):
        if comes_to_the_end(placement, list(map(list, orders))):
            ends = times(placement, list(map(list, orders)), table, 0.0)
            best = min(best, max(end for _, end in ends.values()))
    return best


def _interleavings(row: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Orders of a row in which each (stage, microbatch) keeps its own order."""
    if not row:
        yield ()
    pairs = {parts(action)[::2] for action in row}
    for pair in sorted(pairs):
        first = next(n for n, action in enumerate(row) if parts(action)[::2] == pair)
        for rest in _interleavings([*row[:first], *row[first + 1 :]]):
            yield (row[first], *rest)


def shortest(placement: tuple[int, ...], microbatches: int, split: bool, cost: Cost, known: int) -> int:
    """The least makespan, at most ``known``, a makespan that some order has."""
    search = _Search(placement, microbatches, split, cost)
    level: set[State] = {search.start()}
    now = 0
    while level:
        following: set[State] = set()
        for state in level:
            for after in search.moment(state):
                left = search.at_least(after)
                if left == 0:
                    return now + 1
                if now + 1 + left < known:
                    following.add(after)
        level, now = following, now + 1
    return known


class _Search:
    def __init__(self, placement: tuple[int, ...], microbatches: int, split: bool, cost: Cost) -> None:
        self.m, self.split, self.last = microbatches, split, len(placement) - 1
        self.f, b, self.w = cost
        self.b = b if split else b + self.w
        self.stages = [[s for s, r in enumerate(placement) if r == rank] for rank in range(max(placement) + 1)]
        self.unit = split and set(cost) == {1}

    def start(self) -> State:
        zeros = (0,) * (self.last + 1)
        return zeros, zeros, (0,) * len(self.stages), (NOTHING,) * len(self.stages)

    def moment(self, state: State) -> Iterator[State]:
        """All states one moment later."""
        forwards, backwards, weights, running = state
        choices = []
        for rank, now in enumerate(running):
            if now[0]:
                choices.append([now])
                continue
            found: list[Running] = []
            for s in self.stages[rank]:
                if forwards[s] < self.m and (s == 0 or forwards[s - 1] > forwards[s]):
                    found.append((self.f, "F", s))
                above = self.m if s == self.last else backwards[s + 1]
                if backwards[s] < min(forwards[s], above):
                    found.append((self.b, "B", s))
            if not self.unit or not found:
                due = sum(backwards[s] for s in self.stages[rank]) - weights[rank]
                found += [(self.w, "W", rank)] * (self.split and due > 0) + [NOTHING]
            choices.append(found)
        for chosen in itertools.product(*choices):
            if any(length for length, _, _ in chosen):
                yield self._after(state, chosen)

    def _after(self, state: State, chosen: tuple[Running, ...]) -> State:
        counts = {"F": list(state[0]), "B": list(state[1]), "W": list(state[2])}
        running = []
        for length, kind, where in chosen:
            if length == 1:
                counts[kind][where] += 1
            running.append((length - 1, kind, where) if length > 1 else NOTHING)
        return tuple(counts["F"]), tuple(counts["B"]), tuple(counts["W"]), tuple(running)

    def at_least(self, state: State) -> int:
        """Moments that are needed still: a rank's work, or the way of the last microbatch of a stage."""
        forwards, backwards, weights, running = state
        left = {(kind, where): length for length, kind, where in running if length}
        tail = self.w if self.split else 0
        best = 0
        for rank, stages in enumerate(self.stages):
            work = running[rank][0]
            for s in stages:
                work += (self.m - forwards[s] - (("F", s) in left)) * self.f
                work += (self.m - backwards[s] - (("B", s) in left)) * self.b
            if self.split:
                work += (self.m * len(stages) - weights[rank] - (("W", rank) in left)) * self.w
            elif work:
                work += min(stages) * self.b
            best = max(best, work)
        for s in range(self.last + 1):
            if forwards[s] < self.m:
                here = left.get(("F", s), 0) + (self.m - forwards[s] - (("F", s) in left)) * self.f
                best = max(best, here + (self.last - s) * self.f + (self.last + 1) * self.b + tail)
            if backwards[s] < self.m:
                here = left.get(("B", s), 0) + (self.m - backwards[s] - (("B", s) in left)) * self.b
                best = max(best, here + s * self.b + tail)
        return best
