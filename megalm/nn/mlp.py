"""The transformer's MLP, its inner features divided over the tensor-parallel axis; plain or gated."""

from __future__ import annotations

import torch
from torch import nn

from megalm.nn.linear import ColumnParallelLinear, Projection, RowParallelLinear
from megalm.nn.lora import LoraSpec
from megalm.ops.kernels import Kernels
from megalm.parallel.layout import Init, even_ranges
from megalm.parallel.mesh import ParallelContext


class MLP(nn.Module):
    """down(activation(up(x))), or gated down(activation(gate(x)) * up(x)): (T or T / tp, H) to the same."""

    def __init__(
        self,
        parallel: ParallelContext,
        *,
        width: int,
        inner: int,
        activation: str,
        gated: bool,
        bias: bool,
        init: Init,
        out_init: Init,
        kernels: Kernels,
        lora: LoraSpec | None = None,
    ) -> None:
        super().__init__()
        ranges = even_ranges(inner, parallel.tp.size)
        self.kernels = kernels
        self.activation = activation
        self.gated = gated
        names = ("gate", "up") if gated else ("up",)
        projections = tuple(Projection(inner, ranges, name) for name in names)
        self.up = ColumnParallelLinear(parallel, width, projections, bias=bias, init=init, lora=lora)
        down = None if lora is None else lora.of("down")
        self.down = RowParallelLinear(parallel, inner, ranges, width, bias=bias, init=out_init, lora=down)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        inner = self.up(x_TH)
        if self.gated:
            inner = self.kernels.gated(inner, self.activation)
        else:
            # The bias is in already: the matrix product adds it at no cost.
            inner = self.kernels.bias_activation(inner, None, self.activation)
        out: torch.Tensor = self.down(inner)
        return out
