"""The permutation and the sample order that is made of it."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from megalm.data.permutation import Permutation
from megalm.data.sampler import SampleOrder

FROZEN_10 = [3, 4, 7, 8, 0, 1, 2, 6, 9, 5]
FROZEN_MILLION = [350863, 453330, 715174, 568179, 19068]
FROZEN_ORDER = [(0, 1), (0, 2), (0, 4), (0, 3), (0, 0), (1, 3), (1, 0), (1, 1), (1, 4), (1, 2), (2, 1), (2, 3)]
SIZES = sorted(
    {1, 2, 3, 4, 5, 6, 7, 10, 97, 101, 997, 1009, 4093, 4097, 7919}
    | {2**k + d for k in range(2, 13) for d in (-1, 0, 1)}
)


@pytest.mark.parametrize("n", SIZES)
def test_bijection(n):
    for key in ((0, 0, "samples"), (12345, 7, "x"), (2**63 - 1, 10**6, "é")):
        p = Permutation(n, *key)
        assert len(p) == n
        assert sorted(map(p, range(n))) == list(range(n))


def test_outside_is_an_error():
    p = Permutation(5, 1)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            p(index)
    with pytest.raises(ValueError, match="0 items"):
        Permutation(0, 1)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_orders_are_uniform(n):
    """Chi-square over all n! orders, 6 standard deviations."""
    trials = 3000
    seen = Counter(tuple(map(Permutation(n, seed, "u"), range(n))) for seed in range(trials))
    orders = list(itertools.permutations(range(n)))
    expected = trials / len(orders)
    chi = sum((seen[order] - expected) ** 2 / expected for order in orders)
    freedom = len(orders) - 1
    assert abs(chi - freedom) < 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("n", [64, 1000, 4096])
def test_places_and_neighbours_are_uniform(n):
    """Where index 0 and n-1 go, and how far apart neighbours land, over many keys: no bias, no memory of the input."""
    keys = range(1500)
    bins = 16
    for index in (0, n - 1):
        where = np.array([Permutation(n, k, "place")(index) for k in keys])
        counts = np.bincount(where * bins // n, minlength=bins)
        expected = np.bincount(np.arange(n) * bins // n, minlength=bins) * len(keys) / n
        assert ((counts - expected) ** 2 / expected).sum() < 15 + 6 * 30**0.5
    image = np.array([Permutation(n, 3, "corr")(i) for i in range(n)])
    assert abs(np.corrcoef(image, np.arange(n))[0, 1]) < 6 / n**0.5
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 6 / n**0.5


@pytest.mark.parametrize("n", [1, 5, 64, 1009, 4097, 2**24 + 3, 3 * 10**9, 2**53 + 1, 2**62 - 1])
def test_many_at_once_are_those_one_by_one(n, campaign_seed):
    p = Permutation(n, campaign_seed, "many")
    indices = np.random.default_rng(campaign_seed).integers(0, n, size=300)
    assert p.many(indices).tolist() == [p(i) for i in indices.tolist()]
    assert p.many(np.array([], dtype=np.int64)).tolist() == []
    for bad in (-1, n):
        with pytest.raises(IndexError):
            p.many(np.array([0, bad]))
    order = SampleOrder(campaign_seed, n)
    places = np.random.default_rng(campaign_seed).integers(0, min(4 * n, 2**62), size=50)
    assert list(zip(*(a.tolist() for a in order.many(places)), strict=True)) == [order.at(i) for i in places.tolist()]


def test_past_float32_each_place_has_a_sample_of_its_own():
    """2^24 + 1 is the first whole number that a float32 rounds away."""
    n = 2**24 + 1001
    images = Permutation(n, 1, "wide").many(np.arange(n))
    assert (np.bincount(images, minlength=n) == 1).all()


def test_large_domains_need_no_memory():
    p = Permutation(10**15, 1, 2, "big")
    images = [p(i) for i in range(1000)]
    assert len(set(images)) == 1000
    assert all(0 <= i < 10**15 for i in images)


def test_keys_are_not_confused():
    def order(*key):
        return [Permutation(1000, *key)(i) for i in range(50)]

    keys = [(1, 2), (12,), ("1", 2), (1, "2"), ("1,2",), (1, 2, ""), (2, 1), ()]
    assert len({tuple(order(*key)) for key in keys}) == len(keys)


def test_frozen_vectors():
    """Part of the contract: resumed runs rely on them."""
    assert [Permutation(10, 0, 0, "samples")(i) for i in range(10)] == FROZEN_10
    assert [Permutation(1_000_003, 42, 3, "samples")(i) for i in (0, 1, 2, 500_000, 1_000_002)] == FROZEN_MILLION
    assert [SampleOrder(7, 5).at(i) for i in range(12)] == FROZEN_ORDER


def test_each_epoch_is_an_order_of_its_own():
    order = SampleOrder(3, 50)
    epochs = [[order.at(e * 50 + i) for i in range(50)] for e in range(6)]
    assert all([epoch for epoch, _ in row] == [e] * 50 for e, row in enumerate(epochs))
    samples = [tuple(sample for _, sample in row) for row in epochs]
    assert all(sorted(row) == list(range(50)) for row in samples)
    assert len(set(samples)) == 6
    assert [order.at(i) for i in range(50)] == epochs[0]
    assert [SampleOrder(3, 50, name="other").at(i) for i in range(50)] != epochs[0]
    assert [SampleOrder(4, 50).at(i) for i in range(50)] != epochs[0]


def test_natural_order_and_errors():
    order = SampleOrder(3, 4, shuffle=False)
    assert [order.at(i) for i in range(9)] == [(i // 4, i % 4) for i in range(9)]
    with pytest.raises(IndexError):
        order.at(-1)
    with pytest.raises(ValueError, match="0 samples"):
        SampleOrder(0, 0)
