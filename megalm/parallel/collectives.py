"""Collectives with their adjoints, as Megatron-LM's tensor parallelism needs them.

Two kinds of region alternate. Inside a *tensor region* each rank holds some features of all tokens; outside, a rank
holds all features, of all tokens or, under sequence parallelism, of its share of them (rows of dimension 0). What
lies outside is computed alike on every rank, so the adjoint of "everyone gets a copy" is a sum only where each rank's
use of the copy is a different part of the whole.

(Shoeybi et al., "Megatron-LM", 2019; Korthikanti et al., "Reducing activation recomputation", 2022.)
"""

from __future__ import annotations

from typing import Any

import torch

from megalm.parallel.comm import Group
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sequence import SequenceMap


class _Copy(torch.autograd.Function):
    """Identity; gradients are summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    """Sum over the group; gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Concatenate shards of dimension 0; gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.reduce_scatter(grad), None


class _Scatter(torch.autograd.Function):
    """Sum and scatter to token shards; gradients are concatenated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.all_gather(grad), None


class _Replicate(torch.autograd.Function):
    """Concatenate token shards for a computation that every rank does alike; each keeps its rows of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = grad.shape[0] // ctx.group.size
        return grad[ctx.group.index * rows : (ctx.group.index + 1) * rows], None


class _GatherSequence(torch.autograd.Function):
    """Whole rows from every rank's positions (dimension 0); gradients are summed, each to the rank that has it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, places: SequenceMap) -> torch.Tensor:
        ctx.group, ctx.places = group, places
        return places.restore(group.all_gather(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.group.reduce_scatter(ctx.places.by_rank(grad)), None, None


def gather_sequence(x_S: torch.Tensor, group: Group, places: SequenceMap) -> torch.Tensor:
    """Whole rows (length, ...), in the order of logical positions, from this rank's (share, ...).

    For what each rank computes of its own positions against all of them: the adjoint sums what every rank's loss says
    of a position, and gives it to the rank that has it.
    """
    return x_S if group.alone else _GatherSequence.apply(x_S, group, places)


def copy_to_tensor_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Enter a tensor region with replicated ``x``: forward identity, backward all-reduce."""
    return x if group.alone else _Copy.apply(x, group)


def enter_tensor_region(x_TH: torch.Tensor, parallel: ParallelContext) -> torch.Tensor:
    """Enter a tensor region: all tokens from (T or T / tp, H); the backward sums over the tensor-parallel axis."""
    if parallel.tp.alone:
        return x_TH
    out: torch.Tensor = (_Gather if parallel.sp else _Copy).apply(x_TH, parallel.tp)
    return out


def exit_tensor_region(x_TH: torch.Tensor, parallel: ParallelContext) -> torch.Tensor:
    """Leave a tensor region: the sum over the axis of each rank's partial (T, H), token-sharded under SP."""
    if parallel.tp.alone:
        return x_TH
    out: torch.Tensor = (_Scatter if parallel.sp else _Reduce).apply(x_TH, parallel.tp)
    return out


def replicate_tokens(x_TH: torch.Tensor, parallel: ParallelContext) -> torch.Tensor:
    """All tokens on every rank, for computations that every rank does alike."""
    return _Replicate.apply(x_TH, parallel.tp) if parallel.sp else x_TH


def gather_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Concatenate the rows of every rank for losses that each rank computes of its own rows against all of them.

    The adjoint sums what each rank's loss says of a row, and gives it to the rank that has the row.
    """
    return x if group.alone else _Gather.apply(x, group)


def token_shard(parallel: ParallelContext, tokens: int) -> tuple[int, int]:
    """The rows [start, stop) of ``tokens`` that this rank holds outside tensor regions."""
    if not parallel.sp:
        return 0, tokens
    rows = tokens // parallel.tp.size
    return parallel.tp.index * rows, (parallel.tp.index + 1) * rows
