"""Activation functions by name, and what surrounds them: the gated form, and a bias that is added first.

The references compute in float32 at least and round once; the ``torch_`` forms are torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def gated(x: Tensor, kind: str) -> Tensor:
    """activation(gate) * up of ``x`` (..., 2 F), the gate in its first half: (..., F) of ``x``'s dtype.

    ``kind`` names the activation: SwiGLU is ``silu``, GeGLU ``gelu`` or ``gelu_tanh``, ReGLU ``relu``. (Shazeer, "GLU
    Variants Improve Transformer", 2020.)
    """
    return torch_gated(_wide(x), kind).to(x.dtype)


def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """activation(x + bias) of ``x`` (..., F) and ``bias`` (F): (..., F) of ``x``'s dtype."""
    return torch_bias_activation(_wide(x), None if bias is None else _wide(bias), kind).to(x.dtype)


def torch_gated(x: Tensor, kind: str) -> Tensor:
    """:func:`gated` by torch's operations."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * up


def torch_bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """:func:`bias_activation` by torch's operations."""
    return ACTIVATIONS[kind](x if bias is None else x + bias)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
