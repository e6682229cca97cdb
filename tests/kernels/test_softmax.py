"""masked_softmax against float64, on every backend."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from megalm.ops import softmax as reference
from megalm.ops.native.softmax import Softmaxes

from .backends import (
    DTYPES,
    TOLERANCE,
    Backend,
    check_against_float64,
    check_compiled,
    check_registration,
)

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 8), (1, 2, 5, 33), (2, 1, 3, 1000), (2, 2, 9, 257), (1, 1, 2, 2056), (1, 1, 2, 4099)]


def _mask(backend: Backend, batch: int, keys: int) -> Tensor:
    """The first row is padded at both ends, the last has nothing, if there are several."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(7)) < 0.8
    mask[0, : keys // 5] = False
    if batch > 1:
        mask[-1] = False
    return mask.to(backend.device)


def _compare(
    backend: Backend,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    causal: bool,
    masked: bool,
    first_query: int = 0,
    scale: float = 0.7,
) -> None:
    x = backend.draw(*shape, dtype=dtype, seed=1, scale=3.0)
    mask = _mask(backend, shape[0], shape[3]) if masked else None
    options = {"scale": scale, "causal": causal, "first_query": first_query}

    def truth(x: Tensor) -> tuple[Tensor]:
        exact = reference.masked_softmax(x, None if mask is None else mask.cpu(), **options)
        # The gradient is made of what is stored.
        return (exact,)

    check_against_float64(
        lambda x: (Softmaxes(backend.namespace).masked_softmax(x, mask, **options),),
        truth,
        [x],
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_equals_float64(
    backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype, causal: bool, masked: bool
) -> None:
    _compare(backend, shape, dtype, causal=causal, masked=masked)
    if causal:
        _compare(backend, shape, dtype, causal=causal, masked=masked, first_query=shape[3] - shape[2])


def test_row_of_more_than_a_block_holds(backend: Backend) -> None:
    _compare(backend, (1, 1, 2, 20000), torch.bfloat16, causal=True, masked=True, first_query=19000)


def test_drawn_shapes(backend: Backend, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    for _ in range(200 if full else 12):
        keys = draw.choice([draw.randint(1, 300), 8 * draw.randint(1, 300)])
        shape = (draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 9), keys)
        first = draw.randint(-3, keys + 3)
        causal, masked = draw.random() < 0.5, draw.random() < 0.5
        _compare(backend, shape, draw.choice(DTYPES), causal=causal, masked=masked, first_query=first)


def test_attends_to_what_it_may(backend: Backend) -> None:
    """Against a loop over queries and keys, with queries that may attend to nothing."""
    x = backend.draw(2, 1, 4, 6, dtype=torch.float32, seed=1).detach()
    mask = torch.tensor([[False, True, True, True, False, True], [True, False, False, True, True, True]])
    found = Softmaxes(backend.namespace).masked_softmax(
        x, mask.to(backend.device), causal=True, first_query=-1, scale=2.0
    )
    for b in range(2):
        for q in range(4):
            keys = [k for k in range(6) if k <= q - 1 and mask[b, k]]
            expected = torch.zeros(6)
            if keys:
                expected[keys] = (2.0 * x[b, 0, q, keys].cpu()).softmax(dim=0)
            torch.testing.assert_close(found[b, 0, q].cpu(), expected)


def test_no_query_no_key(backend: Backend) -> None:
    for shape in ((2, 3, 0, 4), (2, 3, 4, 0), (0, 1, 2, 3)):
        x = torch.zeros(shape, device=backend.device, requires_grad=True)
        y = Softmaxes(backend.namespace).masked_softmax(x, causal=True)
        y.sum().backward()
        assert y.shape == shape
        assert x.grad is not None


def test_not_contiguous(backend: Backend) -> None:
    x = backend.draw(2, 5, 3, 24, dtype=torch.float32, seed=1)
    mask = _mask(backend, 2, 48)[:, ::2]
    check_against_float64(
        lambda x: (Softmaxes(backend.namespace).masked_softmax(x.transpose(1, 2), mask),),
        lambda x: (reference.masked_softmax(x.transpose(1, 2), mask.cpu()),),
        [x],
        tolerance=2e-6,
    )


def test_not_aligned(backend: Backend) -> None:
    """A row that starts off 16 bytes is read in another way."""
    x = backend.draw(4 * 64 + 1, dtype=torch.float32, seed=1)
    check_against_float64(
        lambda x: (Softmaxes(backend.namespace).masked_softmax(x[1:].view(1, 1, 4, 64), causal=True),),
        lambda x: (reference.masked_softmax(x[1:].view(1, 1, 4, 64), causal=True),),
        [x],
        tolerance=2e-6,
    )


@pytest.mark.parametrize("width", [40, 4099])
def test_not_finite(backend: Backend, width: int) -> None:
    """A bad score spoils its own query and no other; that of a masked key spoils nothing."""
    x = torch.zeros(1, 1, 7, width, device=backend.device)
    x[0, 0, 1, 3], x[0, 0, 2, 3], x[0, 0, 3, 3] = math.nan, math.inf, -math.inf
    x[0, 0, :, 5] = math.nan
    x[0, 0, 4] = -math.inf
    mask = torch.ones(1, width, dtype=torch.bool, device=backend.device)
    mask[0, 5] = False
    y = Softmaxes(backend.namespace).masked_softmax(x, mask)[0, 0]
    torch.testing.assert_close(y.cpu(), reference.masked_softmax(x.cpu(), mask.cpu())[0, 0], equal_nan=True)
    assert y.isnan().any(dim=1).tolist() == [False, True, True, False, True, False, False]
    assert y[:, 5].eq(0).all()


def test_same_bits_again(backend: Backend) -> None:
    x = backend.draw(1, 2, 40, 300, dtype=torch.float32, seed=1)

    def run() -> tuple[Tensor, ...]:
        y = Softmaxes(backend.namespace).masked_softmax(x, causal=True)
        return (y, *torch.autograd.grad(y.square().sum(), [x]))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_refuses_what_does_not_fit(backend: Backend) -> None:
    softmax = Softmaxes(backend.namespace).masked_softmax
    x = torch.ones(2, 1, 3, 8, device=backend.device)
    with pytest.raises(RuntimeError, match="bool, \\(batch, keys\\)"):
        softmax(x, torch.ones(2, 8, device=backend.device))
    with pytest.raises(RuntimeError, match="bool, \\(batch, keys\\)"):
        softmax(x, torch.ones(2, 7, device=backend.device, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="batch, heads, queries, keys"):
        softmax(x[0])
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        softmax(x.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    ops = getattr(torch.ops, backend.namespace)
    x = backend.draw(2, 3, 4, 40, dtype=dtype, seed=1)
    for given in (x, x.transpose(1, 2)):
        check_registration(ops.masked_softmax, (given, _mask(backend, 2, 40), 0.5, True, 36))
        check_registration(ops.masked_softmax, (given, None, 0.5, False, 0))
    y = x.detach().softmax(dim=-1)
    check_registration(ops.masked_softmax_backward, (x.detach(), y, 0.5))


def test_compiles_whole(backend: Backend) -> None:
    softmax = Softmaxes(backend.namespace).masked_softmax
    x, mask = backend.draw(2, 2, 6, 64, dtype=torch.float32, seed=1), _mask(backend, 2, 64)
    check_compiled(lambda x: softmax(x * 2, mask, causal=True).sin().sum(), [x])
