"""Norms against their formulas and torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalm.ops.norm import layer_norm, rms_norm

EPS = 1e-3


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(5, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (9,), weight, EPS), rtol=1e-13, atol=1e-13)


def test_rms_norm_by_hand() -> None:
    x, weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = rms_norm(x, weight, 0.5)
    torch.testing.assert_close(found, torch.tensor([[3.0, 8.0]], dtype=torch.float64) / 13.0**0.5)


def test_gradcheck() -> None:
    x, weight, bias = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((3, 4), (4,), (4,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, EPS), (x, weight, bias))


def test_layer_norm_by_its_formula() -> None:
    x, weight, bias = (torch.randn(n, dtype=torch.float64) for n in ((6, 8), (8,), (8,)))
    centred = x - x.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, EPS), expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_means_are_float32() -> None:
    """In bfloat16 the mean of 4096 squares would be off by percents."""
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    x[:, ::2] = 3.0
    found = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float().square().mean(), torch.tensor(1.0), rtol=1e-2, atol=0)
