"""Normalisation layers. Weights are replicated; in token-sharded regions each rank sees part of their gradient."""

from __future__ import annotations

from typing import Literal

import torch

from megalm.nn.module import ParallelModule
from megalm.ops.kernels import Kernels
from megalm.parallel.layout import Init
from megalm.parallel.mesh import ParallelContext


class LayerNorm(ParallelModule):
    """Layer normalisation with weight and bias."""

    def __init__(
        self, parallel: ParallelContext, width: int, eps: float, partial: tuple[str, ...], kernels: Kernels
    ) -> None:
        super().__init__(parallel)
        self.eps = eps
        self.kernels = kernels
        self.weight = self.declare_whole("weight", (width,), Init("constant", 1.0), partial)
        self.bias = self.declare_whole("bias", (width,), Init("constant", 0.0), partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return normed

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x + residual``, and that sum."""
        both: tuple[torch.Tensor, torch.Tensor] = self.kernels.add_layer_norm(
            x, residual, self.weight, self.bias, self.eps
        )
        return both


class RMSNorm(ParallelModule):
    """Root-mean-square normalisation with weight."""

    def __init__(
        self, parallel: ParallelContext, width: int, eps: float, partial: tuple[str, ...], kernels: Kernels
    ) -> None:
        super().__init__(parallel)
        self.eps = eps
        self.kernels = kernels
        self.weight = self.declare_whole("weight", (width,), Init("constant", 1.0), partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.kernels.rms_norm(x, self.weight, self.eps)
        return normed

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x + residual``, and that sum."""
        both: tuple[torch.Tensor, torch.Tensor] = self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
        return both


def make_norm(
    kind: Literal["layer_norm", "rms_norm"],
    parallel: ParallelContext,
    width: int,
    eps: float,
    *,
    token_sharded: bool = True,
    kernels: Kernels,
) -> LayerNorm | RMSNorm:
    """The norm that ``kind`` names; ``token_sharded`` says that under SP it sees this rank's tokens only."""
    partial = parallel.token_partial if token_sharded else ()
    return (LayerNorm if kind == "layer_norm" else RMSNorm)(parallel, width, eps, partial, kernels)
