"""Linear projection and cross-entropy over a vocabulary that is divided among ranks; logits are never all in memory.

Tokens go through in chunks. A chunk's logits become exponentials in place; two small all-reduces (maximum; sum of
exponentials with the target's logit) give the exact softmax statistics over the whole vocabulary. Where one chunk holds
all tokens its exponentials are kept for the backward, otherwise they are computed again there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megalm.parallel.comm import Group

CHUNK_BYTES = 128 << 20
"""Largest size of a chunk's logits."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        first_row: int,
        ignore: int,
        vocab_size: int,
        group: Group,
    ) -> torch.Tensor:
        wide = torch.float64 if h_TH.dtype == torch.float64 else torch.float32
        tokens, rows = h_TH.shape[0], weight_VH.shape[0]
        # Ranks must agree on the chunks, and may hold different numbers of rows.
        most_rows = -(-vocab_size // group.size)
        chunk = max(1, min(tokens, CHUNK_BYTES // (wide.itemsize * most_rows)))
        scored = labels_T != ignore
        local = labels_T - first_row
        mine = scored & (local >= 0) & (local < rows)
        local = local.clamp(0, max(0, rows - 1))
        stats = h_TH.new_empty((2, tokens), dtype=wide)
        losses = h_TH.new_empty(tokens, dtype=wide)
        kept = None
        # At least one chunk, so that ranks whose rows score nothing say what the others say.
        for start in range(0, max(1, tokens), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(h_TH[part], weight_VH, bias_V).to(wide)
            top = group.all_reduce(logits.amax(dim=-1), "max")
            target = (logits.gather(1, local[part, None]).squeeze(1) - top) * mine[part]
            exponentials = logits.sub_(top[:, None]).exp_()
            both = group.all_reduce(torch.stack((exponentials.sum(dim=-1), target)))
            stats[0, part], stats[1, part] = top, both[0]
            losses[part] = (both[0].log() - both[1]) * scored[part]
            kept = exponentials if chunk >= tokens else None
        ctx.save_for_backward(h_TH, weight_VH, bias_V, local, mine, scored, stats)
        ctx.chunk = chunk
        ctx.kept = kept
        return losses

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h_TH, weight_VH, bias_V, local, mine, scored, stats = ctx.saved_tensors
        # The exponentials become the gradient in place, so a second backward has to compute them again.
        kept, ctx.kept = ctx.kept, None
        grad_h = torch.empty_like(h_TH)
        grad_weight = None
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=stats.dtype)
        scale = grad_T * scored
        for start in range(0, h_TH.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            if kept is None:
                logits = F.linear(h_TH[part], weight_VH, bias_V).to(stats.dtype)
                exponentials = logits.sub_(stats[0, part, None]).exp_()
            else:
                exponentials = kept
            grad_logits = exponentials.mul_((scale[part] / stats[1, part])[:, None])
            grad_logits.scatter_add_(1, local[part, None], -(scale[part] * mine[part])[:, None])
            grad_logits = grad_logits.to(h_TH.dtype)
            torch.mm(grad_logits, weight_VH, out=grad_h[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            if grad_weight is None:
                grad_weight = grad_logits.t() @ h_TH[part]
            elif grad_weight.dtype == grad_logits.dtype == stats.dtype:
                grad_weight.addmm_(grad_logits.t(), h_TH[part])
            else:
                # Chunks are added in float32: in bfloat16 the sum of many would lose what the products have.
                grad_weight = grad_weight.to(stats.dtype).add_(grad_logits.t() @ h_TH[part])
        if grad_weight is None:
            grad_weight = torch.zeros_like(weight_VH)
        grad_bias = None if bias_V is None or grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_h, grad_weight.to(weight_VH.dtype), grad_bias, None, None, None, None, None


def linear_cross_entropy(
    h_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    group: Group,
    *,
    vocab_size: int,
    bias_V: torch.Tensor | None = None,
    first_row: int = 0,
    ignore: int = -100,
) -> torch.Tensor:
    """-log softmax(h W^T + b)[label] for each token: (T,) in float32 (float64 for float64), 0 at ignored labels.

    ``weight_VH`` and ``bias_V`` are this rank's rows of the vocabulary, from ``first_row`` on; ``labels_T`` are ids
    of the whole vocabulary. The gradient of ``h_TH`` is this rank's part of a sum over ``group``.
    """
    out: torch.Tensor = _LinearCrossEntropy.apply(
        h_TH, weight_VH, bias_V, labels_T, first_row, ignore, vocab_size, group
    )
    return out
