"""The module of SpanBERT's boundary term: a vector for each masked token from what stands around its span."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalm.api import BuildContext

_STD = 0.02


class SpanBoundary(nn.Module):
    """Two layers, each linear, GELU and norm, of [left neighbour, right neighbour, place in the span]."""

    def __init__(self, width: int, places: int, place_size: int, ctx: BuildContext) -> None:
        super().__init__()
        self.places = ctx.parameter((places, place_size), std=_STD)
        self.inner = ctx.linear(2 * width + place_size, width)
        self.inner_norm = ctx.norm(width)
        self.outer = ctx.linear(width, width)
        self.outer_norm = ctx.norm(width)

    def forward(self, left_BNH: torch.Tensor, right_BNH: torch.Tensor, place_BN: torch.Tensor) -> torch.Tensor:
        """Vectors (B, N, H) of tokens; ``place_BN``: int64, from 0."""
        around = torch.cat((left_BNH, right_BNH, F.embedding(place_BN, self.places)), dim=-1)
        inner = self.inner_norm(F.gelu(self.inner(around)))
        vectors: torch.Tensor = self.outer_norm(F.gelu(self.outer(inner)))
        return vectors
