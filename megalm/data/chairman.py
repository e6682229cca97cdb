"""Who gets which place, so that after every place each has its share to within one.

Tijdeman's chairman assignment problem ("The chairman assignment problem", 1980): members with shares that add up to
one take turns, and after n turns a member with share w has had floor(w n) or ceil(w n) of them, for every n. Rounding
each share by itself does not add up; rounding along a tree adds errors up; choosing the most starved one can fall
behind by two. What does it is scheduling: turn j of a member may be any place from floor(j / w) to
ceil((j + 1) / w) - 1, and taking the earliest deadline among those that may go meets every deadline.

That is a walk from the start, and a run that resumes at place 10^10 cannot walk. So places are cut into blocks, and the
state at a block's edge is computed on its own: which members have had their share rounded up. A state is one that
such a walk can pass through where two conditions hold: those rounded up fit into the places before (none goes before
its first place), and those rounded down fit into the places after (none misses its last). The first is a chain of upper
bounds on nested sets, hence a matroid, so a greedy choice by deadline leaves the fewest urgent members behind for every
horizon at once; and since some state meets both conditions, this one does. Between two such states with no member going
backwards the earliest deadline leads from one to the other. Blocks are at least as long as the rarest member's period,
which is why none goes backwards.

All arithmetic is on whole numbers below 2**62.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

MOST_PARTS = (1 << 31) - 1
"""Shares are whole numbers that add up to at most this: their products with a place fit int64."""
LONGEST_PERIOD = 1 << 21
"""The rarest member has a turn at least this often, or a block would take seconds."""
_LEAST_BLOCK = 1 << 12
_CHUNK = 1 << 12


class Turns:
    """The places 0, 1, 2, ... shared out among members in proportion to whole numbers, exact to one at every place."""

    def __init__(self, parts: Sequence[int] | np.ndarray) -> None:
        """``parts``: of each member, at least 1; their sum at most ``MOST_PARTS`` and ``LONGEST_PERIOD`` times the
        least."""
        given = np.asarray(parts, dtype=np.int64)
        if given.ndim != 1 or not given.size or int(given.min()) < 1 or int(given.sum()) > MOST_PARTS:
            raise ValueError(f"{given.size} shares must be whole numbers from 1 that add up to at most {MOST_PARTS}")
        given = given // np.gcd.reduce(given)
        if -(-int(given.sum()) // int(given.min())) > LONGEST_PERIOD:
            raise ValueError(f"a share of {given.min()} in {given.sum()}: less than one in {LONGEST_PERIOD}")
        self._parts = given * -(-_LEAST_BLOCK // int(given.sum()))
        self.cycle = int(self._parts.sum())
        """After so many places everything begins anew."""
        self._block = max(_LEAST_BLOCK, -(-self.cycle // int(self._parts.min())))
        self._at = -1
        self._walk: _Walk | None = None

    def __len__(self) -> int:
        return len(self._parts)

    def taken(self, places: int) -> np.ndarray:
        """How many of the first ``places`` places each member has: int64 (members,)."""
        cycles, rest = divmod(places, self.cycle)
        start = rest - rest % self._block
        counts: np.ndarray = self._state(start)
        if rest > start:
            members, _ = self.many(np.arange(cycles * self.cycle + start, places))
            counts = counts + np.bincount(members, minlength=len(self))
        counts = counts + cycles * self._parts
        return counts

    def lasting(self, member: int, turns: int) -> int:
        """The most places of which ``member`` has ``turns`` for certain not yet exceeded."""
        return turns * self.cycle // int(self._parts[member])

    def many(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(members, turns) at ``places`` (int64, from 0): whose a place is, and how many turns it has had before.

        Places near each other are quick; one far away costs a block's walk.
        """
        places = np.asarray(places, dtype=np.int64)
        members, turns = np.empty_like(places), np.empty_like(places)
        cycles, rest = np.divmod(places, self.cycle)
        blocks = rest // self._block
        for block in np.unique(blocks).tolist():
            here = blocks == block
            offsets = rest[here] - block * self._block
            walk = self._find(block)
            found = walk.members(int(offsets.max()) + 1)
            members[here] = found[offsets]
            turns[here] = walk.turns[offsets] + cycles[here] * self._parts[members[here]]
        return members, turns

    def _find(self, block: int) -> _Walk:
        walk = self._walk
        if walk is None or self._at != block:
            start, stop = block * self._block, min((block + 1) * self._block, self.cycle)
            walk = _Walk(self._parts, self.cycle, start, stop, self._state(start), self._state(stop))
            self._at, self._walk = block, walk
        return walk

    def _state(self, place: int) -> np.ndarray:
        """Turns that each member has had before a block's edge, within the cycle."""
        parts, cycle = self._parts, self.cycle
        whole: np.ndarray
        whole, over = np.divmod(parts * place, cycle)
        up = int(over.sum()) // cycle
        if not up:
            return whole
        open_ = np.flatnonzero(over)
        released = whole[open_] * cycle // parts[open_]
        deadline = -(-(whole[open_] + 1) * cycle // parts[open_])
        # Before place x there is no room in [x, place) for more than its length less the turns that lie wholly in it.
        first = int(released.min())
        room = np.arange(place - first, 0, -1) - _turns_within(parts, cycle, first, place, whole)
        chosen: list[tuple[int, int]] = []
        order = np.argsort(-released, kind="stable")
        edges = np.flatnonzero(np.diff(released[order])) + 1
        groups = np.split(order, edges)
        lows = [int(released[group[0]]) for group in groups]
        for i, group in enumerate(groups):
            for each in group.tolist():
                heapq.heappush(chosen, (-int(deadline[each]), -int(open_[each])))
            lowest = lows[i + 1] + 1 if i + 1 < len(groups) else first
            limit = int(room[lowest - first : lows[i] - first + 1].min())
            while len(chosen) > limit:
                heapq.heappop(chosen)
        while len(chosen) > up:
            heapq.heappop(chosen)
        assert len(chosen) == up, "no state of the assignment has these places"
        whole[[-member for _, member in chosen]] += 1
        return whole


def _turns_within(parts: np.ndarray, cycle: int, first: int, place: int, whole: np.ndarray) -> np.ndarray:
    """For each x in [first, place): the turns that can begin no earlier than x and must be over before ``place``."""
    # Turn j begins at floor(j * cycle / parts): those from ``first`` on have j >= first * parts / cycle.
    lowest = -(-first * parts // cycle)
    counts = np.maximum(whole - lowest, 0)
    owner = np.repeat(np.arange(len(parts)), counts)
    turn = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + lowest[owner]
    begins = turn * cycle // parts[owner]
    histogram = np.bincount(begins - first, minlength=place - first)
    counted: np.ndarray = np.cumsum(histogram[::-1])[::-1]
    return counted


class _Walk:
    """The places of one block, by the earliest deadline from one edge's state to the other's; as far as asked for."""

    def __init__(
        self, parts: np.ndarray, cycle: int, start: int, stop: int, before: np.ndarray, after: np.ndarray
    ) -> None:
        self._cycle, self._start, self._stop = cycle, start, stop
        self._parts, self._after = parts, after
        self._next = before.copy()
        self._members = np.empty(stop - start, dtype=np.int64)
        self.turns = np.empty(stop - start, dtype=np.int64)
        """Turns within the cycle before each place, as far as walked."""
        self._done = 0
        active = np.flatnonzero(before < after)
        begins = before[active] * cycle // parts[active]
        ends = np.minimum(-(-(before[active] + 1) * cycle // parts[active]), stop)
        ready = begins <= start
        self._ready = list(zip(ends[ready].tolist(), active[ready].tolist(), strict=True))
        heapq.heapify(self._ready)
        later = zip(begins[~ready].tolist(), ends[~ready].tolist(), active[~ready].tolist(), strict=True)
        self._later = list(later)
        heapq.heapify(self._later)

    def members(self, count: int) -> np.ndarray:
        """Members of the first places, at least ``count`` of them."""
        if count > self._done:
            self._advance(min(-(-count // _CHUNK) * _CHUNK, len(self._members)))
        return self._members

    def _advance(self, until: int) -> None:
        ready, later, cycle, stop = self._ready, self._later, self._cycle, self._stop
        members: list[int] = []
        turns: list[int] = []
        nexts, parts, after = self._next, self._parts, self._after
        for place in range(self._start + self._done, self._start + until):
            while later and later[0][0] <= place:
                _, end, member = heapq.heappop(later)
                heapq.heappush(ready, (end, member))
            end, member = heapq.heappop(ready)
            assert end > place, "a turn came too late"
            turn = int(nexts[member])
            members.append(member)
            turns.append(turn)
            turn += 1
            nexts[member] = turn
            if turn < after[member]:
                part = int(parts[member])
                begin, end = turn * cycle // part, min(-(-(turn + 1) * cycle // part), stop)
                if begin <= place + 1:
                    heapq.heappush(ready, (end, member))
                else:
                    heapq.heappush(later, (begin, end, member))
        self._members[self._done : until] = members
        self.turns[self._done : until] = turns
        self._done = until
