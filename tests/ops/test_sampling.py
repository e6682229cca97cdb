"""Tokens drawn by address: the arg-max of the same draws by numpy, whoever holds which rows of the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.ops.sampling import TokenDraw, _numpy_draws, _torch_draws
from megalm.parallel import rng
from megalm.parallel.layout import even_ranges
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated

CPU = torch.device("cpu")
ROWS, LENGTH, WIDTH, VOCABULARY = 3, 7, 5, 45
SLOTS = (11, 0, 6)
SEED, STEP, SITE = 3, 9, "auxiliary.generator"


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors of all tokens, weight, bias, and which tokens are chosen."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((ROWS * LENGTH, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    vectors, weight, bias = (torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
    return vectors, weight, bias, torch.rand(ROWS * LENGTH, generator=draw) < 0.6


def address(slots: tuple[int, ...] = SLOTS) -> DropoutAddress:
    return DropoutAddress(SEED, STEP, row_spans(slots, LENGTH, 0, len(slots) * LENGTH))


def noise(slot: int, position: int) -> np.ndarray:
    """Gumbel values of the whole vocabulary, by numpy's own generator from its counter on."""
    blocks = -(-VOCABULARY // 8)
    key = np.array(rng.key(SEED, "sample", SITE), dtype=np.uint64)
    counter = np.array([position * blocks, slot, 0, STEP], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(4 * blocks)
    draws = np.stack((raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)), axis=1).reshape(-1)[:VOCABULARY]
    gumbel: np.ndarray = -np.log(-np.log((draws + 0.5) / 2.0**32))
    return gumbel


def expected(temperature: float = 1.0, size: int = VOCABULARY) -> list[int]:
    vectors, weight, bias, where = (tensor.numpy() for tensor in case())
    logits = vectors @ weight.T + bias
    return [
        int((logits[t] / temperature + noise(SLOTS[t // LENGTH], t % LENGTH))[:size].argmax())
        for t in np.flatnonzero(where)
    ]


def drawn(parallel: ParallelContext, **how: float | int) -> list[int]:
    vectors, weight, bias, where = case()
    first, last = even_ranges(VOCABULARY, parallel.tp.size)[parallel.tp.index]
    draw = TokenDraw(address(), SITE, **how)  # type: ignore[arg-type]
    found = draw.tokens(
        vectors[where], weight[first:last], bias[first:last], where, parallel.tp, VOCABULARY, first
    )
    assert found.dtype == torch.int64
    return found.tolist()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.3}, {"size": 17}, {"temperature": 4.0, "size": 40}], ids=str)
def test_the_arg_max_of_the_same_draws(how: dict[str, float]) -> None:
    wanted = expected(how.get("temperature", 1.0), int(how.get("size", VOCABULARY)))
    assert len(set(wanted)) > 3  # else it would say little
    assert drawn(single_rank(), **how) == wanted
    for tp in (2, 3, 7):
        for found in run_simulated(lambda parallel: drawn(parallel, **how), tp=tp):
            assert found == wanted


def test_more_ranks_than_ids() -> None:
    """Ranks without a row of the vocabulary, or with rows beyond the ids that are drawn, never win."""
    for found in run_simulated(lambda parallel: drawn(parallel, size=2), tp=9):
        assert found == expected(size=2)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(single_rank())
    monkeypatch.setattr("megalm.ops.sampling.CHUNK_BYTES", 8 * VOCABULARY * 2)
    assert drawn(single_rank()) == whole


def test_nothing_chosen() -> None:
    vectors, weight, bias, where = case()
    none = torch.zeros_like(where)
    draw = TokenDraw(address(), SITE)
    assert draw.tokens(vectors[none], weight, bias, none, single_rank().tp, VOCABULARY, 0).shape == (0,)


def test_equal_sums_go_to_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(self: TokenDraw, counters: np.ndarray, vocab: int, first: int, count: int, device: object) -> torch.Tensor:
        return torch.zeros(len(counters), count, dtype=torch.float64)

    monkeypatch.setattr(TokenDraw, "_noise", flat)

    def rank(parallel: ParallelContext) -> list[int]:
        first, last = even_ranges(VOCABULARY, parallel.tp.size)[parallel.tp.index]
        weight = torch.zeros(last - first, WIDTH, dtype=torch.float64)
        bias = torch.zeros(last - first, dtype=torch.float64)
        bias[[n - first for n in (8, 20, 44) if first <= n < last]] = 1.0
        where = torch.zeros(ROWS * LENGTH, dtype=torch.bool)
        where[:2] = True
        vectors = torch.zeros(2, WIDTH, dtype=torch.float64)
        found = TokenDraw(address(), SITE).tokens(vectors, weight, bias, where, parallel.tp, VOCABULARY, first)
        return found.tolist()

    for tp in (1, 2, 3):
        assert all(found == [8, 8] for found in run_simulated(rank, tp=tp))


def test_both_generators_draw_the_same() -> None:
    key, counters = rng.key(1, "sample", "x"), np.array([[3, 1, 4], [2**40, 0, 5]])
    for low, blocks in ((0, 6), (2, 3)):
        found = _torch_draws(key, counters, STEP, 6, low, blocks, CPU)
        assert torch.equal(found, _numpy_draws(key, counters, STEP, 6, low, blocks, CPU))
        assert found.min() >= 0


def test_frozen() -> None:
    """These numbers are the mapping from addresses to draws: changing it changes every run."""
    found = _numpy_draws(rng.key(1, "sample", "x"), np.array([[3, 1, 4]]), 7, 6, 2, 1, CPU)
    assert found.tolist() == [
        [1844812495, 934680085, 3490721899, 381175311, 57483570, 2479105629, 266058800, 3268136159],
    ]


def test_the_distribution_is_the_softmax() -> None:
    """20,000 draws at different addresses; chi-square with 5 degrees of freedom stays below its 1e-6 quantile."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5], dtype=torch.float64)
    rows, length = 200, 100
    where = torch.ones(rows * length, dtype=torch.bool)
    spans = DropoutAddress(SEED, STEP, row_spans(range(rows), length, 0, rows * length))
    found = TokenDraw(spans, SITE, 2.0).tokens(
        torch.ones(rows * length, 1, dtype=torch.float64), logits[:, None], None, where, single_rank().tp, 6, 0
    )
    share = torch.softmax(logits / 2.0, dim=0) * rows * length
    count = torch.bincount(found, minlength=6).double()
    assert ((count - share).square() / share).sum().item() < 35.9
