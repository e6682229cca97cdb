"""Normalisation layers. Weights are replicated; in token-sharded regions each rank sees part of their gradient."""

from __future__ import annotations

from typing import Literal

import torch

from megalm.nn.module import ParallelModule
from megalm.ops.norm import layer_norm, rms_norm
from megalm.parallel.layout import Init
from megalm.parallel.mesh import ParallelContext


class LayerNorm(ParallelModule):
    """Layer normalisation with weight and bias."""

    def __init__(self, parallel: ParallelContext, width: int, eps: float, partial: tuple[str, ...]) -> None:
        super().__init__(parallel)
        self.eps = eps
        self.weight = self.declare_whole("weight", (width,), Init("constant", 1.0), partial)
        self.bias = self.declare_whole("bias", (width,), Init("constant", 0.0), partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(ParallelModule):
    """Root-mean-square normalisation with weight."""

    def __init__(self, parallel: ParallelContext, width: int, eps: float, partial: tuple[str, ...]) -> None:
        super().__init__(parallel)
        self.eps = eps
        self.weight = self.declare_whole("weight", (width,), Init("constant", 1.0), partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(
    kind: Literal["layer_norm", "rms_norm"],
    parallel: ParallelContext,
    width: int,
    eps: float,
    *,
    token_sharded: bool = True,
) -> LayerNorm | RMSNorm:
    """The norm that ``kind`` names; ``token_sharded`` says that under SP it sees this rank's tokens only."""
    partial = parallel.token_partial if token_sharded else ()
    return (LayerNorm if kind == "layer_norm" else RMSNorm)(parallel, width, eps, partial)
