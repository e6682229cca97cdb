"""Normalisation over the last dimension: the references, and what torch fuses itself.

``offset`` is added to the weight: 1 for weights that are centred at zero. The ``add_`` forms normalise a sum and return
it as well, since it is the residual stream that goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (weight + offset) + bias, of ``x``'s dtype; statistics in float32 at least.
    (Ba et al., 2016.)
    """
    wide = _wide(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * (_wide(weight) + offset)
    return (normed if bias is None else normed + _wide(bias)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), of ``x``'s dtype; the mean in float32 at least. (Zhang and
    Sennrich, 2019.)
    """
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * (_wide(weight) + offset)).to(x.dtype)


def added(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The ``add_`` form of a norm: ``(x, residual, ...)`` to the norm of their sum, and that sum."""

    def add_norm(x: Tensor, residual: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, *arguments, **keywords), total

    return add_norm


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """:func:`layer_norm` by torch's operation."""
    return F.layer_norm(x, weight.shape, weight + offset if offset else weight, bias, eps)


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """:func:`rms_norm` by torch's operation."""
    return F.rms_norm(x, weight.shape, weight + offset if offset else weight, eps)


add_layer_norm = added(layer_norm)
add_rms_norm = added(rms_norm)
torch_add_layer_norm = added(torch_layer_norm)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
