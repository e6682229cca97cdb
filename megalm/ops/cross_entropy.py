"""Cross-entropy over a vocabulary that is divided among ranks: its statistics, its gradient, and what combines them.

Two kernels do what touches every logit, each in one pass: :func:`statistics` reads a rank's logits, :func:`gradient_`
overwrites them with the gradient. All between is arithmetic on a few numbers for each token, and two small all-reduces
(maximum; rescaled sums), so that kernels know nothing of ranks. The functions here are the references of the kernels.

The loss of a token is F.cross_entropy's with label smoothing e, of the whole vocabulary's V logits z, plus the z-loss:

    lse(z) - (1 - e) z[label] - e mean(z) + c lse(z)^2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.errors import UsageError
from megalm.parallel.comm import Group

MAXIMUM, SUM, TARGET, TOTAL = range(4)
"""Rows of the statistics."""


def statistics(logits: Tensor, labels: Tensor, first_row: int, *, total: bool) -> Tensor:
    """(4, tokens) in float32 (float64 for float64): each token's largest logit, its sum of exp(logit - largest), the
    label's logit, and the sum of logits if ``total`` (else 0).

    ``logits`` (tokens, rows) are those of the vocabulary from ``first_row`` on. A label that lies elsewhere has logit
    0. Without rows, or where all logits are -inf, the largest is -inf and the sum of exponentials 0. A NaN shows in the
    sum; the largest may be that of the other logits.
    """
    wide = logits.to(wide_dtype(logits.dtype))
    out = wide.new_zeros((4, wide.shape[0]))
    if wide.shape[1] == 0:
        out[MAXIMUM] = -math.inf
        return out
    top = wide.amax(dim=-1)
    out[MAXIMUM] = top
    out[SUM] = (wide - top.masked_fill(top == -math.inf, 0.0)[:, None]).exp().sum(dim=-1)
    local, mine = _local(labels, first_row, wide.shape[1])
    out[TARGET] = wide.gather(1, local[:, None]).squeeze(1).masked_fill(~mine, 0.0)
    if total:
        out[TOTAL] = wide.sum(dim=-1)
    return out


def gradient_(
    logits: Tensor,
    labels: Tensor,
    first_row: int,
    maximum: Tensor,
    factor: Tensor,
    scale: Tensor,
    *,
    smooth: float,
    confidence: float,
) -> None:
    """Overwrite each token's logits z with factor exp(z - maximum) - scale (smooth + confidence [is the label]).

    ``maximum``, ``factor``, ``scale`` are (tokens,) of the statistics' dtype. Where ``scale`` is 0 the gradient is 0,
    whatever the logits are.
    """
    wide = logits.to(maximum.dtype)
    grad = (wide - maximum[:, None]).exp() * factor[:, None] - (scale * smooth)[:, None]
    if wide.shape[1] > 0:
        local, mine = _local(labels, first_row, wide.shape[1])
        grad.scatter_add_(1, local[:, None], -(scale * confidence * mine)[:, None])
    logits.copy_(grad.masked_fill_((scale == 0)[:, None], 0.0))


def _local(labels: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    local = labels - first_row
    return local.clamp(0, rows - 1), (local >= 0) & (local < rows)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics and losses are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class CrossEntropyKernels:
    """What touches every logit; signatures and meaning of this module's functions."""

    statistics: Callable[..., Tensor] = statistics
    gradient_: Callable[..., None] = gradient_


REFERENCE = CrossEntropyKernels()


@dataclass(frozen=True)
class Loss:
    """The loss of a token; see the module's formula."""

    vocab_size: int
    """Of all ranks together."""
    ignore: int = -100
    """The label of tokens without a loss."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise UsageError(f"label_smoothing is from 0 to 1; found {self.label_smoothing}")
        if not self.z_loss >= 0.0:
            raise UsageError(f"z_loss is at least 0; found {self.z_loss}")

    @property
    def total(self) -> bool:
        """Whether the sum of logits is needed."""
        return self.label_smoothing > 0.0

    def losses(self, stats: Tensor, labels: Tensor) -> Tensor:
        """(tokens,) from the whole vocabulary's statistics: 0 at ignored labels, NaN at labels that do not exist."""
        top, log = stats[MAXIMUM], stats[SUM].log()
        out = log + (1.0 - self.label_smoothing) * (top - stats[TARGET])
        if self.total:
            out += self.label_smoothing * (top - stats[TOTAL] / self.vocab_size)
        if self.z_loss:
            out += self.z_loss * (top + log).square()
        out = out.masked_fill_((labels < 0) | (labels >= self.vocab_size), math.nan)
        return out.masked_fill_(labels == self.ignore, 0.0)

    def differentiate_(
        self,
        kernels: CrossEntropyKernels,
        logits: Tensor,
        labels: Tensor,
        first_row: int,
        stats: Tensor,
        grad: Tensor | None,
    ) -> None:
        """Overwrite ``logits`` with their gradient, given the losses' (None: of ones)."""
        scored = labels != self.ignore
        scale = scored.to(stats.dtype) if grad is None else grad.to(stats.dtype) * scored
        factor = scale / stats[SUM]
        if self.z_loss:
            factor *= 1.0 + 2.0 * self.z_loss * (stats[MAXIMUM] + stats[SUM].log())
        smooth = self.label_smoothing / self.vocab_size
        kernels.gradient_(
            logits,
            labels,
            first_row,
            stats[MAXIMUM],
            factor,
            scale,
            smooth=smooth,
            confidence=1.0 - self.label_smoothing,
        )


def no_statistics(tokens: int, like: Tensor) -> Tensor:
    """What :func:`merge` leaves other statistics as they are with."""
    out = like.new_zeros((4, tokens), dtype=wide_dtype(like.dtype))
    out[MAXIMUM] = -math.inf
    return out


def merge(one: Tensor, other: Tensor) -> Tensor:
    """Statistics of two parts of the vocabulary together."""
    top = torch.fmax(one[MAXIMUM], other[MAXIMUM])
    out = _rescaled(one, top) + _rescaled(other, top)
    out[MAXIMUM] = top
    return out


def combine(stats: Tensor, group: Group | None, *, total: bool) -> Tensor:
    """Statistics of the whole vocabulary from those of each rank's rows: two all-reduces."""
    if group is None or group.alone:
        return stats
    top = group.all_reduce(stats[MAXIMUM].clone(), "max")
    out = _rescaled(stats, top)
    out[MAXIMUM] = top
    group.all_reduce(out[SUM:] if total else out[SUM:TOTAL])
    return out


def _rescaled(stats: Tensor, top: Tensor) -> Tensor:
    """Sums of exponentials relative to ``top``."""
    out = stats.clone()
    out[SUM] *= (stats[MAXIMUM] - top).masked_fill_(stats[MAXIMUM] == -math.inf, -math.inf).exp_()
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        first_row: int,
        loss: Loss,
        group: Group | None,
        kernels: CrossEntropyKernels,
        overwrite: bool,
    ) -> Tensor:
        stats = combine(kernels.statistics(logits, labels, first_row, total=loss.total), group, total=loss.total)
        ctx.save_for_backward(logits, labels, stats)
        ctx.rest = first_row, loss, kernels, overwrite
        return loss.losses(stats, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, stats = ctx.saved_tensors
        first_row, loss, kernels, overwrite = ctx.rest
        out = logits if overwrite else logits.clone(memory_format=torch.contiguous_format)
        loss.differentiate_(kernels, out, labels, first_row, stats, grad)
        return out, None, None, None, None, None, None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: Group | None = None,
    *,
    vocab_size: int | None = None,
    first_row: int = 0,
    ignore: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    overwrite: bool = False,
    kernels: CrossEntropyKernels = REFERENCE,
) -> Tensor:
    """The loss of each token: (tokens,) in float32 (float64 for float64), 0 at ignored labels, NaN at labels outside
    the vocabulary.

    ``logits`` (tokens, rows) are of this rank's rows of the vocabulary, from ``first_row`` on; ``labels`` (tokens,)
    int64 are ids of the whole vocabulary of ``vocab_size`` (rows, if not given). With ``overwrite`` the backward leaves
    the gradient in the logits' own memory: nothing else may need them, and a second backward is an error.
    """
    loss = Loss(logits.shape[1] if vocab_size is None else vocab_size, ignore, label_smoothing, z_loss)
    out: Tensor = _CrossEntropy.apply(logits, labels, first_row, loss, group, kernels, overwrite)
    return out
