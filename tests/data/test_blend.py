"""Blending: shares exact to one sample after every place, at any place of the order, for any number of corpora."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from megalm.data import chairman
from megalm.data.blend import BlendOrder, whole_parts
from megalm.data.chairman import LONGEST_PERIOD, MOST_PARTS, Turns

FROZEN_TURNS = [0, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0]
FROZEN_FAR = [98, 65, 65, 65]
FROZEN_BLEND = [[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 1, 1], [2, 0, 1, 1, 1, 0, 2, 0]]


def counts_after(turns: Turns, parts: np.ndarray, first: int, places: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(members, turns, counts of each member after each place)."""
    members, own = turns.many(np.arange(first, first + places))
    ones = np.zeros((places, len(parts)), dtype=np.int64)
    ones[np.arange(places), members] = 1
    return members, own, turns.taken(first) + np.cumsum(ones, axis=0)


def draw(r: random.Random) -> list[int]:
    """Shares of many shapes: alike, unlike, one much larger than many, in scales of ten."""
    k = r.randint(1, r.choice([3, 6, 40, 200]))
    return r.choice(
        [
            [r.randint(1, 9) for _ in range(k)],
            [r.randint(1, 1000) for _ in range(k)],
            [int(10 ** (3.5 * r.random())) for _ in range(k)],
            [r.choice([1, 99, 100, 101]) for _ in range(k)],
            [*[3] * k, r.randint(1, 3 * k)],
            [25, 24, 1, 25, 24, 1],
        ]
    )


def test_shares_are_exact_to_one(campaign_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strictly: each member has floor(w n) or ceil(w n) after n places, also across the edges of blocks and cycles."""
    r = random.Random(campaign_seed)
    for _ in range(60):
        monkeypatch.setattr(chairman, "_LEAST_BLOCK", r.choice([1, 2, 7, 64, 4096]))
        given = draw(r)
        turns, parts = Turns(given), np.array(given)
        total = int(parts.sum())
        first = r.choice([0, r.randrange(3 * turns.cycle), turns.cycle - 5])
        first = max(first, 0)
        places = min(2 * turns.cycle + 7, 4000)
        members, own, counts = counts_after(turns, parts, first, places)
        quotas = np.arange(first + 1, first + places + 1)[:, None] * parts
        assert (np.abs(counts * total - quotas) < total).all(), given
        np.testing.assert_array_equal(own, counts[np.arange(places), members] - 1)


def test_a_place_does_not_depend_on_the_way_to_it(campaign_seed: int) -> None:
    r = random.Random(campaign_seed)
    parts = [r.randint(1, 500) for _ in range(37)]
    whole = Turns(parts)
    expected = whole.many(np.arange(30_000))
    for _ in range(20):
        places = np.array(sorted(r.sample(range(30_000), 50)))
        if r.random() < 0.5:
            r.shuffle(places)
        found = Turns(parts).many(places)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b[places])


def test_more_corpora_than_int16_and_places_past_float32() -> None:
    """40,000 corpora; at 10^11 places, where float32 counts in steps of 8192."""
    turns = Turns(np.arange(40_000) % 50 + 1)
    first = 10**11
    members, own = turns.many(np.arange(first, first + 80_000))
    assert members.max() > 39_000
    parts = np.arange(40_000) % 50 + 1
    total = int(parts.sum())
    exact = (np.arange(first, first + 80_000)) * parts[members] / total
    assert np.abs(own - exact).max() < 1.01
    assert len(set(zip(members.tolist(), own.tolist(), strict=True))) == 80_000


def test_what_cannot_be_shared_out() -> None:
    for bad in ([], [0, 1], [MOST_PARTS, 1]):
        with pytest.raises(ValueError, match="whole numbers"):
            Turns(bad)
    with pytest.raises(ValueError, match="less than one in"):
        Turns([1, LONGEST_PERIOD])
    Turns([1, LONGEST_PERIOD - 1])


@pytest.mark.parametrize(
    ("weights", "parts"),
    [([0.7, 0.3], [7, 3]), ([2, 4], [1, 2]), ([0.1, 0.2, 0.3], [1, 2, 3]), ([1e-3, 1], [1, 1000]), ([5.0], [1])],
)
def test_decimals_are_exact(weights: list[float], parts: list[int]) -> None:
    assert whole_parts(weights).tolist() == parts


def test_other_weights_are_near(campaign_seed: int) -> None:
    r = random.Random(campaign_seed)
    for _ in range(20):
        weights = [r.random() + 1e-3 for _ in range(r.randint(2, 50))]
        parts = whole_parts(weights)
        total = sum(map(Fraction, weights))
        assert int(parts.sum()) <= MOST_PARTS
        for weight, part in zip(weights, parts.tolist(), strict=True):
            assert abs(Fraction(part, int(parts.sum())) - Fraction(weight) / total) <= Fraction(2, MOST_PARTS)


def test_nothing_is_repeated_or_lost_in_three_epochs() -> None:
    """Weights as the sizes are: each cycle shows every sample once; else each corpus goes round in its own time."""
    sizes = [5, 12, 1, 30]
    order = BlendOrder(3, sizes, Turns(sizes))
    seen = [list(zip(*(a.tolist() for a in order.many(np.arange(48 * e, 48 * e + 48))), strict=True)) for e in range(3)]
    for epoch, rows in enumerate(seen):
        assert sorted(rows) == [(c, epoch, s) for c, size in enumerate(sizes) for s in range(size)]
    assert len({tuple(rows) for rows in seen}) == 3
    weighted = BlendOrder(3, sizes, Turns([1, 1, 1, 1]))
    rows = list(zip(*(a.tolist() for a in weighted.many(np.arange(4 * 120))), strict=True))
    for corpus, size in enumerate(sizes):
        mine = [(epoch, sample) for c, epoch, sample in rows if c == corpus]
        assert sorted(mine) == [(n // size, n % size) for n in range(120)]
        assert [epoch for epoch, _ in mine] == [n // size for n in range(120)]


def test_frozen_vectors() -> None:
    """Part of the contract: resumed runs rely on them."""
    assert Turns([7, 2, 1]).many(np.arange(12))[0].tolist() == FROZEN_TURNS
    assert Turns(range(1, 100)).many(np.array([0, 10**4, 10**9, 10**12]))[0].tolist() == FROZEN_FAR
    found: Any = BlendOrder(7, [3, 2], Turns([2, 1])).many(np.arange(8))
    assert [a.tolist() for a in found] == FROZEN_BLEND


