"""LoRA: a trained product of two thin matrices beside a linear layer's weight, under every layout.

The layer computes ``x W^T + s (x A^T) B^T`` with A (rank, in), B (out, rank) and s = alpha / rank; B starts at zero, so
nothing changes at first. A and B are divided as the weight's own dimensions are, and nothing more is communicated:

- *by columns*, B has the weight's rows and A is whole. Each rank uses A for its own rows of B, so A's gradient on a
  rank is a part of a sum.
- *by rows*, A has the weight's columns and B is whole. Each rank's product with B is partial, as the base product is,
  and is added to that before the layer's own sum over ranks. Again the whole matrix has partial gradients.

A weight of several logical projections has an A and a B of each one that is a target, stacked. They are declared in the
linear layer itself, so that checkpoints call them ``layers.0.attention.q.lora_a`` beside ``...q.weight``, and each
element's initial value is a function of that name. (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
2021.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megalm.nn.module import ParallelModule
from megalm.ops.linear import linear
from megalm.parallel.layout import Init, Layout, Part, Range, Shard

A, B = "lora_a", "lora_b"
"""What the matrices are called in their layer."""


@dataclass(frozen=True)
class LoraSpec:
    """Which projections of every layer get such a product, and of which rank."""

    rank: int
    alpha: float
    targets: frozenset[str]
    """Of ``q``, ``k``, ``v``, ``out``, ``gate``, ``up``, ``down``."""

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def of(self, name: str) -> LoraSpec | None:
        """This, where a layer's only projection is a target."""
        return self if name in self.targets else None


@dataclass(frozen=True)
class LoraRows:
    """What is added to a layer's outputs on this rank: to which of them, from which rows of A and B."""

    rank: int
    scale: float
    rows: tuple[Range, ...]
    """Of the weight on this rank, an entry for each target."""

    def add(self, out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``out`` (T, rows of the weight), which is changed, with the products of ``x`` (T, columns of the weight)."""
        inner = linear(x, a)
        row = 0
        for number, (first, last) in enumerate(self.rows):
            part = inner.narrow(-1, number * self.rank, self.rank)
            product = linear(part, b.narrow(0, row, last - first))
            out.narrow(-1, first, last - first).add_(product, alpha=self.scale)
            row += last - first
        return out


def declare_by_columns(
    module: ParallelModule,
    lora: LoraSpec | None,
    width: int,
    projections: Iterable[tuple[str | None, int, tuple[Range, ...]]],
) -> LoraRows | None:
    """Declare A and B of a column-parallel layer; nothing where none of its projections (name, rows, ranges) is a
    target."""
    if lora is None:
        return None
    index = module.parallel.tp.index
    targets, rows, row = [], [], 0
    for name, size, ranges in projections:
        held = ranges[index][1] - ranges[index][0]
        if name in lora.targets:
            targets.append((name, size, ranges))
            rows.append((row, row + held))
        row += held
    if not targets:
        return None
    whole = tuple(Part((lora.rank, width), name) for name, _, _ in targets)
    module.declare(A, Layout(whole, _init(width), partial=("tp",)))
    divided = tuple(Part((size, lora.rank), name, Shard("tp", 0, ranges)) for name, size, ranges in targets)
    module.declare(B, Layout(divided, Init("constant", 0.0)))
    return LoraRows(lora.rank, lora.scale, tuple(rows))


def declare_by_rows(
    module: ParallelModule, lora: LoraSpec | None, width: int, ranges: tuple[Range, ...], out: int
) -> LoraRows | None:
    """Declare A and B of a row-parallel layer."""
    if lora is None:
        return None
    module.declare_shard(A, (lora.rank, width), _init(width), Shard("tp", 1, ranges))
    module.declare_whole(B, (out, lora.rank), Init("constant", 0.0), ("tp",))
    return LoraRows(lora.rank, lora.scale, ((0, out),))


def _init(width: int) -> Init:
    """Normal, with the variance that a linear layer's usual uniform values have."""
    return Init("normal", 1.0 / math.sqrt(3.0 * width))
