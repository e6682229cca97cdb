"""Who holds which positions under context parallelism, against plain counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.errors import LayoutError
from megalm.parallel.collectives import gather_sequence
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sequence import SequenceMap, balanced_map, contiguous_map
from megalm.parallel.sim import run_simulated

ranks_and_size = st.tuples(st.integers(1, 9), st.integers(1, 5))


def held(places: SequenceMap, rank: int) -> list[int]:
    return [position for start, stop in places.ranges[rank] for position in range(start, stop)]


@given(ranks_and_size)
def test_every_position_has_one_rank_and_all_have_as_many(drawn: tuple[int, int]) -> None:
    ranks, size = drawn
    for places in (balanced_map(2 * ranks * size, ranks), contiguous_map(ranks * size, ranks)):
        each = [held(places, rank) for rank in range(ranks)]
        assert sorted(position for own in each for position in own) == list(range(places.length))
        assert {len(own) for own in each} == {places.share}
        assert all(own == sorted(own) == places.positions(rank).tolist() for rank, own in enumerate(each))


@given(ranks_and_size)
def test_balanced_ranks_have_equal_work(drawn: tuple[int, int]) -> None:
    """A causal query at position s meets s + 1 keys."""
    ranks, size = drawn
    places = balanced_map(2 * ranks * size, ranks)
    assert len({sum(s + 1 for s in held(places, rank)) for rank in range(ranks)}) == 1


@given(ranks_and_size, st.integers(0, 1))
def test_parts_of_rows_and_rows_of_parts(drawn: tuple[int, int], dim: int) -> None:
    ranks, size = drawn
    places = balanced_map(2 * ranks * size, ranks)
    x = torch.arange(places.length * 3).view(places.length, 3)
    x = x if dim == 0 else x.T.contiguous()
    parts = [places.take(x, rank, dim) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, x.index_select(dim, torch.tensor(held(places, rank))))
    assert torch.equal(places.by_rank(x, dim), torch.cat(parts, dim))
    assert torch.equal(places.restore(torch.cat(parts, dim), dim), x)


def test_a_length_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"2 \* 3 chunks, which does not divide 20 positions; .* 18 or 24"):
        balanced_map(20, 3)
    with pytest.raises(LayoutError, match=r"3 stretches, which does not divide 20 positions; .* 18 or 21"):
        contiguous_map(20, 3)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gathered_rows_and_their_gradients(ranks: int) -> None:
    """Each rank scores its own positions against whole rows; one rank's loss is the sum."""
    places = balanced_map(4 * ranks, ranks)
    torch.manual_seed(ranks)
    x = torch.randn(places.length, 2, dtype=torch.float64)
    weights = torch.randn(ranks, places.length, 2, dtype=torch.float64)

    def rank(parallel: ParallelContext) -> tuple[torch.Tensor, torch.Tensor]:
        index = parallel.dp.index
        own = places.take(x, index, 0).requires_grad_()
        whole = gather_sequence(own, parallel.dp, places)
        (whole.sin() * weights[index]).sum().backward()
        assert own.grad is not None
        return whole.detach(), own.grad

    leaf = x.clone().requires_grad_()
    (leaf.sin() * weights.sum(0)).sum().backward()
    assert leaf.grad is not None
    for index, (whole, grad) in enumerate(run_simulated(rank, dp=ranks)):
        assert torch.equal(whole, x)
        torch.testing.assert_close(grad, places.take(leaf.grad, index, 0), rtol=1e-12, atol=1e-12)
