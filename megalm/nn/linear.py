"""Megatron's two linear layers: by columns into a tensor region, by rows out of it.

(Shoeybi et al., "Megatron-LM", 2019.) Weights are (out, in) as in torch.nn.Linear. A column-parallel layer may hold
several logical projections in one weight, so that one matrix product serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalm.nn.lora import LoraSpec, declare_by_columns, declare_by_rows
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

    lora_a: torch.Tensor
    lora_b: torch.Tensor

    def __init__(
        self,
        parallel: ParallelContext,
        width: int,
        projections: Sequence[Projection],
        *,
        bias: bool,
        init: Init,
        lora: LoraSpec | None = None,
    ) -> None:
        super().__init__(parallel)
        self.weight = self.declare(
            "weight",
            Layout(tuple(Part((p.rows, width), p.name, Shard("tp", 0, p.ranges)) for p in projections), init),
        )
        parts = tuple(Part((p.rows,), p.name, Shard("tp", 0, p.ranges)) for p in projections)
        self.bias = self.declare("bias", Layout(parts, ZERO)) if bias else None
        self.lora = declare_by_columns(self, lora, width, [(p.name, p.rows, p.ranges) for p in projections])

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        x_TH = enter_tensor_region(x_TH, self.parallel)
        out = linear(x_TH, self.weight, self.bias)
        return out if self.lora is None else self.lora.add(out, x_TH, self.lora_a, self.lora_b)


class RowParallelLinear(ParallelModule):
    """(T, this rank's in) to (T or T / tp, out): partial products are summed over the tensor-parallel axis."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor

    def __init__(
        self,
        parallel: ParallelContext,
        width: int,
        ranges: tuple[Range, ...],
        out: int,
        *,
        bias: bool,
        init: Init,
        lora: LoraSpec | None = None,
    ) -> None:
        super().__init__(parallel)
        self.weight = self.declare_shard("weight", (out, width), init, Shard("tp", 1, ranges))
        self.bias = self.declare_whole("bias", (out,), ZERO, parallel.token_partial) if bias else None
        self.lora = declare_by_rows(self, lora, width, ranges, out)

    def forward(self, x_TF: torch.Tensor) -> torch.Tensor:
        alone = self.parallel.tp.alone
        out = linear(x_TF, self.weight, self.bias if alone else None)
        if self.lora is not None:
            out = self.lora.add(out, x_TF, self.lora_a, self.lora_b)
        if alone:
            return out
        out = exit_tensor_region(out, self.parallel)
        return out if self.bias is None else out + self.bias


class ReplicatedLinear(ParallelModule):
    """A linear layer that every rank computes alike, on inputs that every rank has; or, with its gradient ``partial``,
    each on its own tokens."""

    def __init__(
        self, parallel: ParallelContext, width: int, out: int, *, init: Init, partial: tuple[str, ...] = ()
    ) -> None:
        super().__init__(parallel)
        self.weight = self.declare_whole("weight", (out, width), init, partial)
        self.bias = self.declare_whole("bias", (out,), ZERO, partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
