"""Bottleneck adapters: a small network with a residual connection of its own, after a block's output projection.

It works on tokens one by one and is too small to divide: every rank holds it whole, and under sequence parallelism its
gradient there is that of the rank's tokens. (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019.)
"""

from __future__ import annotations

import torch
from torch import nn

from megalm.nn.linear import ZERO, ReplicatedLinear
from megalm.ops.kernels import Kernels
from megalm.parallel.layout import Init
from megalm.parallel.mesh import ParallelContext


class Adapter(nn.Module):
    """x + up(activation(down(x))): (T or T / tp, H) to the same. It starts as the identity: ``up`` is zero."""

    def __init__(
        self, parallel: ParallelContext, width: int, size: int, activation: str, init: Init, kernels: Kernels
    ) -> None:
        super().__init__()
        self.activation = activation
        self.kernels = kernels
        self.down = ReplicatedLinear(parallel, width, size, init=init, partial=parallel.token_partial)
        self.up = ReplicatedLinear(parallel, size, width, init=ZERO, partial=parallel.token_partial)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        inner = self.kernels.bias_activation(self.down(x_TH), None, self.activation)
        out: torch.Tensor = x_TH + self.up(inner)
        return out
