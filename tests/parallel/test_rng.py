"""Frozen vectors of the addressing, and normal values that are the same drawn whole or in part."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.parallel import rng

KEY = rng.key(7, "init", "a")


def test_frozen_keys() -> None:
    assert rng.key(7, "init", "layers.0.mlp.up.weight") == (0x2A8B3A7641BBE617, 0x5570D51D88FDFE25)
    assert rng.key("é", 2**63 - 1) == (0x14080F86373D3814, 0x1B90682CA07CA06A)


def test_frozen_blocks() -> None:
    found = rng.blocks((1, 2), 3, 2, (4, 5, 6))
    assert found.dtype == np.uint64
    assert found.tolist() == [
        [0x8070E5788D05927E, 0x1C5AEF1CB5451508, 0xD04B22EC4863E2A0, 0xD67CC7DA10E919CE],
        [0x00A7B5FAE736FABF, 0x832DF5EC2023505B, 0xF40F1906A82EEDC2, 0xAB5E719EDEEC3829],
    ]


def test_frozen_values() -> None:
    """numpy's logarithm and cosine may differ in their last bit between machines."""
    normal = [0.2490279889953647, 0.7291273904280321, 0.5799635325716304, -0.8658509308831303]
    np.testing.assert_allclose(rng.normal(KEY, 5, 9), normal, rtol=1e-14)
    uniform = [0.7248347275681355, 0.9793749400642708, 0.3593519605068099]
    assert rng.uniform((1, 2), 3, (4, 5, 6)).tolist() == uniform
    assert rng.generator("example", "mlm", 7, "train", 0, 11).integers(1000, size=4).tolist() == [953, 53, 926, 623]


def test_normal_is_the_box_muller_transform_of_the_blocks() -> None:
    raw = rng.blocks(KEY, 0, 2).reshape(-1).tolist()
    expected = []
    for a, b in zip(raw[::2], raw[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(((a >> 11) + 1) / 2**53))
        angle = 2 * math.pi * ((b >> 11) / 2**53)
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    np.testing.assert_allclose(rng.normal(KEY, 0, 8), expected, rtol=1e-12)


def test_addresses_do_not_run_into_each_other() -> None:
    addresses = [("a", "b"), ("ab",), ("a", "", "b"), ("a,b",), ('a","b',), (1, "a"), ("1", "a"), (1, 2), (12,)]
    assert len({rng.key(*address) for address in addresses}) == len(addresses)


@given(start=st.integers(0, 500), size=st.integers(0, 100))
def test_any_slice_of_normal_values_equals_the_whole(start: int, size: int) -> None:
    whole = rng.normal(KEY, 0, 600)
    assert np.array_equal(rng.normal(KEY, start, start + size), whole[start : start + size])


@given(first=st.integers(0, 50), count=st.integers(1, 10))
def test_any_blocks_equal_the_whole(first: int, count: int) -> None:
    assert np.array_equal(rng.blocks(KEY, first, count), rng.blocks(KEY, 0, 60)[first : first + count])


def test_moments_of_normal_values() -> None:
    n = 200_000
    x = rng.normal(KEY, 0, n)
    # Standard errors of the first four moments are sqrt(1, 2, 15, 96) / sqrt(n); five of them are allowed.
    for power, moment, variance in ((1, 0.0, 1), (2, 1.0, 2), (3, 0.0, 15), (4, 3.0, 96)):
        assert abs(np.mean(x**power) - moment) < 5 * math.sqrt(variance / n), power
    assert abs(np.mean(x[::2] * x[1::2])) < 5 / math.sqrt(n)
    tail = math.erfc(2 / math.sqrt(2))
    assert abs(np.mean(np.abs(x) > 2) - tail) < 5 * math.sqrt(tail / n)


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_uniform_lies_inside(count: int) -> None:
    x = rng.uniform(KEY, count)
    assert x.shape == (count,)
    assert ((x > 0) & (x < 1)).all()


def test_a_reused_generator_draws_the_same() -> None:
    """Whatever was drawn from it before, halves of words and unfinished blocks included, and from other threads."""

    def draws(generator: np.random.Generator, n: int) -> list[object]:
        found: list[object] = [generator.random(n).tolist(), generator.integers(9, size=n, dtype=np.uint32).tolist()]
        return [*found, generator.standard_normal(n).tolist(), generator.permutation(n).tolist()]

    addresses = [("example", "mlm", seed, sample) for seed in range(3) for sample in range(20)]
    for n, address in enumerate(addresses):
        assert draws(rng.reused_generator(*address), n % 7) == draws(rng.generator(*address), n % 7)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda a: draws(rng.reused_generator(*a), 5), addresses))
    assert found == [draws(rng.generator(*a), 5) for a in addresses]
