"""Divergence of two softmaxes over a vocabulary that is divided among ranks: a student's from a teacher's.

(Hinton et al., "Distilling the knowledge in a neural network", 2015.) Both sides are vectors that meet their own
vocabulary's matrix; logits are there for a chunk of tokens at a time, and never exchanged: ranks agree on the two
log-sum-exps of each token, by one maximum and one sum. Only the student has gradients. They take the logits once more
in backward, which costs two products and saves the memory of all logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.cross_entropy import wide_dtype
from megalm.parallel.comm import Group

CHUNK_BYTES = 64 << 20
"""Largest size of a chunk's logits, of one side."""

_Side = tuple[Tensor, Tensor, Tensor | None]
"""Vectors (T, H), this rank's rows of the vocabulary (V, H), their bias (V,)."""


def _parts(tokens: int, most_rows: int, itemsize: int) -> Iterator[slice]:
    """Chunks, alike on every rank; at least one, so that ranks say the same whatever there is to score."""
    size = max(1, CHUNK_BYTES // (itemsize * max(1, most_rows)))
    for begin in range(0, max(1, tokens), size):
        yield slice(begin, begin + size)


def _logits(side: _Side, part: slice, temperature: float) -> Tensor:
    h_TH, weight_VH, bias_V = side
    logits = F.linear(h_TH[part], weight_VH, bias_V)
    return logits.to(wide_dtype(logits.dtype)) / temperature


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, teacher: _Side, rest: tuple[float, int, Group]
    ) -> Tensor:
        temperature, most_rows, group = rest
        student = (h_TH, weight_VH, bias_V)
        wide = wide_dtype(h_TH.dtype)
        losses = h_TH.new_empty(len(h_TH), dtype=wide)
        ends = h_TH.new_empty((2, len(h_TH)), dtype=wide)
        for part in _parts(len(h_TH), most_rows, wide.itemsize):
            s, t = _logits(student, part, temperature), _logits(teacher, part, temperature)
            low = torch.finfo(wide).min  # of a rank without a row of the vocabulary
            most = [x.amax(1) if x.shape[1] else x.new_full((len(x),), low) for x in (s, t)]
            top = group.all_reduce(torch.stack(most), "max")
            weight = (t - top[1][:, None]).exp()
            sums = torch.stack(((s - top[0][:, None]).exp().sum(1), weight.sum(1), (weight * (t - s)).sum(1)))
            group.all_reduce(sums)
            ends[:, part] = top + sums[:2].log()
            losses[part] = sums[2] / sums[1] - ends[1, part] + ends[0, part]
        ctx.save_for_backward(h_TH, weight_VH, bias_V, ends)
        ctx.teacher, ctx.rest = teacher, rest
        return losses.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        h_TH, weight_VH, bias_V, ends = ctx.saved_tensors
        temperature, most_rows, _ = ctx.rest
        wide = ends.dtype
        grad_h = torch.zeros_like(h_TH, memory_format=torch.contiguous_format)
        grad_w = torch.zeros_like(weight_VH, dtype=wide)
        grad_b = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        for part in _parts(len(h_TH), most_rows, wide.itemsize):
            s = (_logits((h_TH, weight_VH, bias_V), part, temperature) - ends[0, part, None]).exp_()
            t = (_logits(ctx.teacher, part, temperature) - ends[1, part, None]).exp_()
            d = (s - t).mul_(grad_T[part, None].to(wide) * temperature)
            grad_h[part] = d.to(weight_VH.dtype) @ weight_VH
            grad_w += d.t() @ h_TH[part].to(wide)
            if grad_b is not None:
                grad_b += d.sum(0)
        bias = None if grad_b is None else grad_b.to(weight_VH.dtype)
        return grad_h, grad_w.to(weight_VH.dtype), bias, None, None


def distillation_loss(
    student: _Side, teacher: _Side, group: Group, *, temperature: float, vocab_size: int
) -> Tensor:
    """``temperature``^2 KL(teacher || student) of softmax(logits / temperature) for each token: (T,) nats in float32
    (float64 for float64).

    ``student``, ``teacher``: vectors (T, H) of a width each, this rank's rows of the vocabulary of ``vocab_size``, the
    same rows of both, and their biases. The gradient of the student's vectors is this rank's part of a sum over
    ``group``; the teacher has none.
    """
    most_rows = -(-vocab_size // group.size)
    frozen = tuple(None if x is None else x.detach() for x in teacher)
    out: Tensor = _Divergence.apply(*student, frozen, (temperature, most_rows, group))
    return out
