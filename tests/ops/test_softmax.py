"""The reference of masked_softmax against torch's softmax of the keys that are left."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.ops.softmax import masked_softmax

B, N, Q, K = 2, 3, 4, 7


@pytest.mark.parametrize("first_query", [-2, 0, 3, 10])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch_on_what_is_left(causal: bool, masked: bool, first_query: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, Q, K, generator=draw, dtype=torch.float64).requires_grad_()
    weights = torch.randn(B, N, Q, K, generator=draw, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False, True, True, True], [False] * 7]) if masked else None
    found = masked_softmax(x, mask, scale=0.3, causal=causal, first_query=first_query)
    (grad,) = torch.autograd.grad((found * weights).sum(), x)
    for b in range(B):
        for q in range(Q):
            last = first_query + q if causal else K
            keys = [k for k in range(K) if k <= last and (mask is None or mask[b, k])]
            rest = [k for k in range(K) if k not in keys]
            assert found[b, :, q, rest].eq(0).all()
            assert grad[b, :, q, rest].eq(0).all()
            if keys:
                scores = x[b, :, q, keys]
                expected = (0.3 * scores).softmax(dim=-1)
                torch.testing.assert_close(found[b, :, q, keys], expected, rtol=1e-13, atol=1e-13)
                (true,) = torch.autograd.grad((expected * weights[b, :, q, keys]).sum(), x)
                torch.testing.assert_close(grad[b, :, q, keys], true[b, :, q, keys], rtol=1e-12, atol=1e-13)


def test_bad_scores_of_masked_keys_do_no_harm() -> None:
    x = torch.tensor([[[[1.0, math.nan], [math.inf, math.inf]]]], requires_grad=True)
    y = masked_softmax(x, torch.tensor([[True, False]]))
    assert y[0, 0, 0].tolist() == [1.0, 0.0]
    assert y[0, 0, 1].isnan().tolist() == [True, False]


def test_computed_in_float32() -> None:
    x = torch.randn(1, 1, 2, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = masked_softmax(x, scale=0.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (x.float() * 0.5).softmax(dim=-1).bfloat16())
