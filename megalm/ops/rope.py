"""Rotary position embedding: half-split (GPT-NeoX, LLaMA), where feature i turns with feature i + R / 2, or interleaved
(GPT-J), where 2i turns with 2i + 1. R features of a head turn, those after them are copied.

(Su et al., "RoFormer", 2021.) One fused autograd function: the rotation's adjoint is the opposite rotation, so nothing
but the angles is kept for the backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class RopeScaling:
    """Frequencies stretched for texts ``factor`` times longer. ``linear``: all of them. ``llama3``: waves longer than
    ``original / low``; those shorter than ``original / high`` are left alone, those between are mixed. (Dubey et al.,
    "The Llama 3 herd of models", 2024.)
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 1
    """Positions before stretching."""

    def scaled(self, frequencies: torch.Tensor) -> torch.Tensor:
        """The stretched frequencies, in radians a position."""
        if self.kind == "linear":
            return frequencies / self.factor
        waves = 2 * math.pi / frequencies
        share = ((self.original / waves - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return (1 - share) * frequencies / self.factor + share * frequencies


def rope_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (positions, head_dim / 2), computed in float64 or float32 and returned as ``dtype``.

    An angle is its position times a rounded frequency, as in every implementation that models were trained with: at
    far positions another order of operations turns by something else.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions.device).to(wide) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.scaled(frequencies)
    angles = positions.to(wide)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None


def _partners(x: torch.Tensor, rotary_dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    rotary_dim = 2 * cos.shape[-1]
    # In 16 bits each product would be rounded before the sum is.
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    out = torch.empty_like(wide)
    first, second = _partners(wide, rotary_dim, interleaved)
    out_first, out_second = _partners(out, rotary_dim, interleaved)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin)
    out[..., rotary_dim:] = wide[..., rotary_dim:]
    return out.to(x.dtype)


def rope(
    x_BSND: torch.Tensor,
    cos_SD: torch.Tensor,
    sin_SD: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotate ``x`` (batch, seq, heads, head_dim) by the angles of its positions, each (seq, rotary_dim / 2).

    ``rotary_dim`` is at most head_dim; cosines and sines are float32 or of ``x``'s dtype. ``positions``, (seq) or
    (batch, seq) in int64, names their rows for each place, from 0 on; the tables may then be longer than seq. The
    compiled operation, which cannot raise from a device, gives NaN at positions that the tables do not have.
    """
    if positions is None:
        cos, sin = cos_SD[:, None], sin_SD[:, None]
    else:
        cos, sin = cos_SD[positions].unsqueeze(-2), sin_SD[positions].unsqueeze(-2)
    out: torch.Tensor = _Rotate.apply(x_BSND, cos, sin, interleaved)
    return out
