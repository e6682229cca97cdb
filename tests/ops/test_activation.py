"""Activations with a gate or a bias, against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalm.ops.activation import ACTIVATIONS, bias_activation, gated, torch_bias_activation, torch_gated

FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
    "gelu_tanh": lambda v: v / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "relu": lambda v: max(v, 0.0),
}


def by_formula(x: Tensor, kind: str) -> Tensor:
    return torch.tensor([FORMULAS[kind](v) for v in x.flatten().tolist()], dtype=torch.float64).view(x.shape)


def test_every_activation_has_a_formula() -> None:
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("function", [gated, torch_gated])
def test_the_gate_is_the_first_half(function: Callable[[Tensor, str], Tensor], kind: str) -> None:
    gate, up = (torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(2))
    found = function(torch.cat((gate, up), dim=-1), kind)
    torch.testing.assert_close(found, by_formula(gate, kind) * up, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("function", [bias_activation, torch_bias_activation])
def test_the_bias_is_added_first(function: Callable[[Tensor, Tensor | None, str], Tensor], kind: str) -> None:
    x, bias = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(function(x, bias, kind), by_formula(x + bias, kind), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function(x, None, kind), by_formula(x, kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    x, bias = torch.randn(400, 64).to(dtype), torch.randn(64).to(dtype)
    assert gated(x, "silu").dtype == dtype
    for found, exact in (
        (gated(x, "silu"), gated(x.double(), "silu")),
        (bias_activation(x, bias, "gelu"), bias_activation(x.double(), bias.double(), "gelu")),
    ):
        # float32 on the way may turn a value over the middle between two neighbours, seldom.
        assert (found != exact.to(dtype)).double().mean() < 0.02
