"""Layouts as properties: ranges cover, every element has exactly one owner, pieces say where they lie."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.parallel.layout import (
    Init,
    Layout,
    Part,
    Range,
    Shard,
    covering_ranges,
    even_ranges,
    logical_name,
    pieces,
    scale_ranges,
)

INIT = Init("constant", 0.0)


@st.composite
def attention_sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """kv_heads, query heads to each, tp (up to the heads), head_dim."""
    kv, group = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return kv, group, draw(st.integers(1, kv * group)), draw(st.integers(1, 3))


@given(units=st.integers(0, 200), ranks=st.integers(1, 17), unit=st.integers(1, 8))
def test_even_ranges_cover_exactly(units: int, ranks: int, unit: int) -> None:
    ranges = even_ranges(units, ranks, unit)
    assert len(ranges) == ranks
    assert ranges[0][0] == 0
    assert ranges[-1][1] == units * unit
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    sizes = [(stop - start) // unit for start, stop in ranges]
    assert all(start % unit == 0 for start, _ in ranges)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(attention_sizes())
def test_covering_ranges_are_the_heads_that_are_read(sizes: tuple[int, int, int, int]) -> None:
    kv, group, tp, _ = sizes
    queries = even_ranges(kv * group, tp)
    for (start, stop), (first, last) in zip(queries, covering_ranges(queries, group), strict=True):
        assert set(range(first, last)) == {head // group for head in range(start, stop)}


def holders(part: Part, axes: dict[str, int]) -> np.ndarray:
    """How many ranks own each element."""
    count = np.zeros(part.shape, dtype=int)
    for place in np.ndindex(*axes.values()):
        indices = dict(zip(axes, place, strict=True))
        held, owned = part.held(indices), part.owned(indices)
        if owned is None:
            continue
        assert all(h[0] <= o[0] and o[1] <= h[1] for h, o in zip(held, owned, strict=True)), "owned but not held"
        count[tuple(slice(*r) for r in owned)] += 1
    return count


@given(attention_sizes(), st.integers(1, 3))
def test_every_element_has_one_owner(sizes: tuple[int, int, int, int], dp: int) -> None:
    kv, group, tp, dim = sizes
    queries = even_ranges(kv * group, tp)
    keys = scale_ranges(covering_ranges(queries, group), dim)
    shards = [
        Part((kv * group * dim, 2), "q", Shard("tp", 0, scale_ranges(queries, dim))),
        Part((kv * dim, 2), "k", Shard("tp", 0, keys)),
        Part((2, kv * group * dim), None, Shard("tp", 1, scale_ranges(queries, dim))),
        Part((3,), None),
    ]
    for part in shards:
        assert (holders(part, {"tp": tp, "dp": dp}) == 1).all(), part


@given(cuts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5))
def test_one_owner_for_any_rising_ranges(cuts: list[tuple[int, int]]) -> None:
    """Also ranges that overlap further than to the next rank, are equal, or are empty."""
    starts, stops = sorted(min(c) for c in cuts), sorted(max(c) for c in cuts)
    ranges: tuple[Range, ...] = tuple(zip(starts, stops, strict=True))
    covered = np.zeros(20, dtype=int)
    for start, stop in ranges:
        covered[start:stop] = 1
    assert np.array_equal(holders(Part((20,), None, Shard("tp", 0, ranges)), {"tp": len(ranges)}), covered)


@given(attention_sizes())
def test_pieces_of_fused_projections(sizes: tuple[int, int, int, int]) -> None:
    """Each piece is its range of the logical tensor, at its place in the fused one."""
    kv, group, tp, dim = sizes
    queries = even_ranges(kv * group, tp)
    keys = scale_ranges(covering_ranges(queries, group), dim)
    parts = (
        Part((kv * group * dim, 2), "q", Shard("tp", 0, scale_ranges(queries, dim))),
        Part((kv * dim, 2), "k", Shard("tp", 0, keys)),
    )
    layout = Layout(parts, INIT)
    whole = {part.name: torch.randn(part.shape) for part in parts}
    for index in range(tp):
        indices = {"tp": index, "dp": 0}
        fused = torch.cat([whole[p.name][slice(*p.held(indices)[0])] for p in parts])
        assert layout.local_shape(indices) == tuple(fused.shape)
        found = pieces("layers.3.attention.qkv.weight", layout, fused, indices)
        assert [p.name for p in found] == ["layers.3.attention.q.weight", "layers.3.attention.k.weight"]
        for piece in found:
            assert torch.equal(piece.local, whole[piece.part.name][slice(*piece.held[0])])
            if piece.owned is not None:
                rows = slice(*piece.owned[0])
                assert torch.equal(piece.view(piece.owned), whole[piece.part.name][rows])
        found[0].local.fill_(0.0)
        assert fused[: len(found[0].local)].eq(0).all(), "a piece is a view"


def test_local_shape_of_the_second_dimension() -> None:
    layout = Layout((Part((4, 10), None, Shard("tp", 1, even_ranges(10, 3))),), INIT)
    shapes = [layout.local_shape({"tp": index, "dp": 1}) for index in range(3)]
    assert shapes == [(4, 4), (4, 3), (4, 3)]
    assert sum(map(math.prod, shapes)) == 40


def test_logical_names() -> None:
    assert logical_name("layers.0.attention.qkv.bias", Part((1,), "k")) == "layers.0.attention.k.bias"
    assert logical_name("layers.0.mlp.up.weight", Part((1,), "gate")) == "layers.0.mlp.gate.weight"
    assert logical_name("final_norm.weight", Part((1,))) == "final_norm.weight"


def test_overlaps() -> None:
    assert Shard("tp", 0, ((0, 2), (1, 3))).overlaps
    assert not Shard("tp", 0, ((0, 2), (2, 3))).overlaps
