"""Megatron's two linear layers: by columns into a tensor region, by rows out of it.

(Shoeybi et al., "Megatron-LM", 2019.) Weights are (out, in) as in torch.nn.Linear. A column-parallel layer may hold
several logical projections in one weight, so that one matrix product serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalm.nn.module import ParallelModule
from megalm.ops.linear import linear
from megalm.parallel.collectives import enter_tensor_region, exit_tensor_region
from megalm.parallel.layout import Init, Layout, Part, Range, Shard
from megalm.parallel.mesh import ParallelContext

ZERO = Init("constant", 0.0)


@dataclass(frozen=True)
class Projection:
    """A logical projection inside a column-parallel weight: its output rows, and which of them each rank holds."""

    rows: int
    ranges: tuple[Range, ...]
    name: str | None = None


class ColumnParallelLinear(ParallelModule):
    """(T or T / tp, in) to (T, this rank's out): each rank computes some output features of all tokens."""

    def __init__(
        self, parallel: ParallelContext, width: int, projections: Sequence[Projection], *, bias: bool, init: Init
    ) -> None:
        super().__init__(parallel)
        self.weight = self.declare(
            "weight",
            Layout(tuple(Part((p.rows, width), p.name, Shard("tp", 0, p.ranges)) for p in projections), init),
        )
        parts = tuple(Part((p.rows,), p.name, Shard("tp", 0, p.ranges)) for p in projections)
        self.bias = self.declare("bias", Layout(parts, ZERO)) if bias else None

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return linear(enter_tensor_region(x_TH, self.parallel), self.weight, self.bias)


class RowParallelLinear(ParallelModule):
    """(T, this rank's in) to (T or T / tp, out): partial products are summed over the tensor-parallel axis."""

    def __init__(
        self, parallel: ParallelContext, width: int, ranges: tuple[Range, ...], out: int, *, bias: bool, init: Init
    ) -> None:
        super().__init__(parallel)
        self.weight = self.declare_shard("weight", (out, width), init, Shard("tp", 1, ranges))
        self.bias = self.declare_whole("bias", (out,), ZERO, parallel.token_partial) if bias else None

    def forward(self, x_TF: torch.Tensor) -> torch.Tensor:
        if self.parallel.tp.alone:
            return linear(x_TF, self.weight, self.bias)
        out = exit_tensor_region(linear(x_TF, self.weight), self.parallel)
        return out if self.bias is None else out + self.bias


class ReplicatedLinear(ParallelModule):
    """A linear layer that every rank computes alike, on inputs that every rank has."""

    def __init__(self, parallel: ParallelContext, width: int, out: int, *, init: Init) -> None:
        super().__init__(parallel)
        self.weight = self.declare_whole("weight", (out, width), init)
        self.bias = self.declare_whole("bias", (out,), ZERO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
