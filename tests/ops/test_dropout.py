"""Dropout by address: frozen draws, one mask from both generators, slices that agree with the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.ops.dropout import (
    DropoutAddress,
    Span,
    _numpy_draws,
    _signed,
    _torch_draws,
    draws16,
    dropout,
    dropout_add,
    philox_4x64,
    row_spans,
)
from megalm.parallel import rng

CPU = torch.device("cpu")
SITE = "layers.0.mlp"
ALL_ONES = 2**64 - 1
PI = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
        (
            (ALL_ONES,) * 4,
            (ALL_ONES,) * 2,
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
        (
            PI,
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
)
def test_published_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    """The known-answer vectors of philox4x64-10 in Random123."""
    found = philox_4x64(torch.tensor([[_signed(word) for word in counter]]), key)
    assert tuple(word % 2**64 for word in found[0].tolist()) == expected


def test_frozen_draws() -> None:
    """These values are in every run that ever dropped anything: they must not change."""
    found = draws16(DropoutAddress(7, 3, (Span(2, 1, 4, 6),)), SITE, 18, CPU)
    assert found.dtype == torch.int32
    first, second = found.tolist()
    assert first[:8] == [3640, 43190, 44341, 50149, 50947, 29930, 27950, 27495]
    assert first[8:] == [15414, 31523, 34665, 47390, 21581, 9880, 19861, 64032, 5571, 9935]
    assert second[:8] == [31692, 39110, 23024, 51969, 1974, 16895, 9006, 33029]
    assert second[8:] == [52050, 41847, 53272, 57395, 62040, 40664, 20756, 35812, 23835, 22962]


spans = st.tuples(st.integers(0, 2**40), st.integers(0, 3), st.integers(0, 50), st.integers(1, 6)).map(
    lambda t: Span(t[0], t[1], t[2], t[2] + t[3])
)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    spans=st.lists(spans, min_size=1, max_size=4),
    features=st.integers(1, 50),
)
def test_numpy_and_torch_draw_the_same_bits(seed: int, step: int, spans: list[Span], features: int) -> None:
    address, key = DropoutAddress(seed, step, tuple(spans)), rng.key(seed, "dropout", SITE)
    assert torch.equal(_numpy_draws(address, key, features), _torch_draws(address, key, features, CPU))


@settings(deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    views=st.integers(1, 2),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    features=st.integers(1, 40),
)
def test_shards_draw_what_the_whole_draws(rows: int, length: int, views: int, cuts: list[int], features: int) -> None:
    slots = [5 * n + 1 for n in range(rows)]
    tokens = rows * views * length

    def draws(start: int, stop: int) -> torch.Tensor:
        return draws16(DropoutAddress(1, 2, row_spans(slots, length, start, stop, views)), SITE, features, CPU)

    bounds = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    shards = [draws(a, b) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(shards), draws(0, tokens))


def test_every_word_of_the_address_counts() -> None:
    base = DropoutAddress(1, 2, (Span(3, 0, 0, 8),))
    others = {
        "seed": (DropoutAddress(2, 2, base.spans), SITE),
        "step": (DropoutAddress(1, 3, base.spans), SITE),
        "slot": (DropoutAddress(1, 2, (Span(4, 0, 0, 8),)), SITE),
        "view": (DropoutAddress(1, 2, (Span(3, 1, 0, 8),)), SITE),
        "position": (DropoutAddress(1, 2, (Span(3, 0, 8, 16),)), SITE),
        "site": (base, "layers.1.mlp"),
    }
    seen = draws16(base, SITE, 32, CPU)
    for word, (address, site) in others.items():
        assert (draws16(address, site, 32, CPU) == seen).float().mean() < 0.05, word


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_is_binomial(p: float) -> None:
    tokens, features = 500, 200
    out = dropout(torch.ones(tokens, features), p, DropoutAddress(0, 0, (Span(0, 0, 0, tokens),)), SITE)
    kept = int((out != 0).sum())
    n = tokens * features
    # 1 / 65536 is how finely p can be met; 6 standard deviations are passed once in 5e8 draws of the seed.
    assert abs(kept - n * (1 - p)) < 6 * math.sqrt(n * p * (1 - p)) + n / 65536
    by_feature = (out != 0).float().mean(dim=0)
    assert (by_feature - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(6, 20).to(dtype).requires_grad_()
    address, p = DropoutAddress(9, 1, row_spans([4, 5], 3, 0, 6)), 0.3
    out = dropout(x, p, address, SITE)
    threshold = round(p * 65536)
    keep = draws16(address, SITE, 20, CPU) >= threshold
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(65536 / (65536 - threshold), dtype=wide)
    assert out.dtype == dtype
    # Rounded once, from the exact product: a scale rounded to bfloat16 first would be 0.2% off everywhere.
    assert torch.equal(out, torch.where(keep, (x.detach().to(wide) * scale).to(dtype), torch.zeros_like(x)))
    gradient = torch.randn(6, 20).to(dtype)
    out.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, keep * (gradient.to(wide) * scale).to(dtype))


def test_probabilities_at_the_ends() -> None:
    x, address = torch.ones(2, 8), DropoutAddress(0, 0, (Span(0, 0, 0, 2),))
    assert dropout(x, 0.0, address, SITE) is x
    assert dropout(x, 0.9999999, address, SITE).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_sum_with_residual(dtype: torch.dtype, biased: bool) -> None:
    """In float64 it is the plain formula; in less it is rounded once."""
    x, residual, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((6, 20), (6, 20), (20,)))
    address, p = DropoutAddress(9, 1, row_spans([4, 5], 3, 0, 6)), 0.3
    out = dropout_add(x, residual, p, address, SITE, bias if biased else None)
    keep = draws16(address, SITE, 20, CPU) >= round(p * 65536)
    scale = 65536 / (65536 - round(p * 65536))
    truth = residual.double() + (x.double() + (bias.double() if biased else 0)) * keep * scale
    assert out.dtype == dtype
    # Wider dtypes round each sum and product, of terms that may be larger than what they add up to.
    eps, roundings = torch.finfo(dtype).eps, 1 if dtype == torch.bfloat16 else 8
    torch.testing.assert_close(out, truth.to(dtype), rtol=eps, atol=roundings * eps)
    out.sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    torch.testing.assert_close(x.grad, (keep * scale).to(dtype))
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_sum_without_dropping() -> None:
    x, address = torch.randn(2, 8), DropoutAddress(0, 0, (Span(0, 0, 0, 2),))
    assert torch.equal(dropout_add(x, x, 0.0, address, SITE, x[0]), x + (x + x[0]))
