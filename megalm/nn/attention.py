"""Multi-head attention, query heads divided over the tensor-parallel axis.

Heads need not divide evenly, and there may be fewer key/value heads than ranks: each rank holds the key/value heads
that its query heads read, so neighbours may hold the same one (see megalm.parallel.layout).

Shapes: B rows, S positions, N heads on this rank, D features of a head, T = B * S tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megalm.nn.linear import ColumnParallelLinear, Projection, RowParallelLinear
from megalm.nn.microbatch import Microbatch
from megalm.ops.attention import attention, attention_with_dropout
from megalm.ops.document_attention import document_attention
from megalm.ops.kernels import Kernels
from megalm.ops.rope import rope_angles
from megalm.parallel.layout import Init, covering_ranges, even_ranges, scale_ranges
from megalm.parallel.mesh import ParallelContext


class Attention(nn.Module):
    """Self-attention of whole rows: (T or T / tp, H) to the same."""

    def __init__(
        self,
        parallel: ParallelContext,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        rope_theta: float | None,
        qkv_bias: bool,
        out_bias: bool,
        dropout: float,
        site: str,
        init: Init,
        out_init: Init,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.causal = causal
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.site = site
        query_heads = even_ranges(heads, parallel.tp.size)
        key_heads = covering_ranges(query_heads, heads // kv_heads)
        first, last = query_heads[parallel.tp.index]
        kv_first, kv_last = key_heads[parallel.tp.index]
        self.first_head = first
        self.heads = last - first
        self.kv_heads = kv_last - kv_first
        # For each local query head, the local key/value head that it reads.
        reads = [head // (heads // kv_heads) - kv_first for head in range(first, last)]
        self.repeat = self.heads // self.kv_heads
        self.kv_index = None if reads == [i // self.repeat for i in range(self.heads)] else reads
        kv_rows, kv_ranges = kv_heads * head_dim, scale_ranges(key_heads, head_dim)
        q_ranges = scale_ranges(query_heads, head_dim)
        self.qkv = ColumnParallelLinear(
            parallel,
            width,
            (
                Projection(heads * head_dim, q_ranges, "q"),
                Projection(kv_rows, kv_ranges, "k"),
                Projection(kv_rows, kv_ranges, "v"),
            ),
            bias=qkv_bias,
            init=init,
        )
        self.out = RowParallelLinear(parallel, heads * head_dim, q_ranges, width, bias=out_bias, init=out_init)

    def forward(self, x_TH: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        n, m = self.heads, self.kv_heads
        qkv = self.qkv(x_TH).view(batch.rows, batch.length, n + 2 * m, self.head_dim)
        if self.rope_theta is None:
            q, k, v = qkv.split((n, m, m), dim=2)
        else:
            qk, v = qkv.split((n + m, m), dim=2)
            positions = torch.arange(batch.length, device=qk.device)
            angles = rope_angles(positions, self.head_dim, self.rope_theta, qk.dtype)
            own = None if batch.documents is None else batch.documents.positions
            q, k = self.kernels.rope(qk, *angles, positions=own).split((n, m), dim=2)
        q_BNSD, k_BNSD, v_BNSD = q.transpose(1, 2), self._spread(k), self._spread(v)
        seen: dict[str, Any] = {"causal": self.causal, "mask_BS": batch.tensors.get("attention_mask")}
        dropped: dict[str, Any] = {
            "p": self.dropout,
            "address": batch.full_address,
            "site": self.site,
            "first_head": self.first_head,
            "kernels": self.kernels,
        }
        if batch.documents is not None:
            bounds, starts = batch.documents.bounds, batch.documents.starts
            mixed = document_attention(q_BNSD, k_BNSD, v_BNSD, bounds, starts, **seen, **dropped)
        elif self.dropout and batch.full_address is not None:
            mixed = attention_with_dropout(q_BNSD, k_BNSD, v_BNSD, **seen, **dropped)
        else:
            mixed = attention(q_BNSD, k_BNSD, v_BNSD, **seen)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch.rows * batch.length, n * self.head_dim))
        return out

    def _spread(self, x_BSMD: torch.Tensor) -> torch.Tensor:
        """Key/value heads as (B, N, S, D), one for each query head."""
        x_BMSD = x_BSMD.transpose(1, 2)
        if self.kv_index is not None:
            return x_BMSD[:, self.kv_index]
        return x_BMSD if self.repeat == 1 else x_BMSD.repeat_interleave(self.repeat, dim=1)
