"""Multi-head attention, query heads divided over the tensor-parallel axis.

Heads need not divide evenly, and there may be fewer key/value heads than ranks: each rank holds the key/value heads
that its query heads read, so neighbours may hold the same one (see megalm.parallel.layout).

Shapes: B rows, S positions, N heads on this rank, D features of a head, T = B * S tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megalm.nn.cache import KeyValueCache
from megalm.nn.linear import ColumnParallelLinear, Projection, RowParallelLinear
from megalm.nn.lora import LoraSpec
from megalm.nn.microbatch import Microbatch
from megalm.nn.norm import RMSNorm
from megalm.ops.attention import attention, attention_with_dropout, grouped_attention
from megalm.ops.document_attention import document_attention
from megalm.ops.kernels import Kernels
from megalm.ops.rope import RopeScaling, rope_angles
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
        rope_scaling: RopeScaling | None = None,
        qk_norm_eps: float | None = None,
        lora: LoraSpec | None = None,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.rope_scaling = rope_scaling
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
            lora=lora,
        )
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            # Each rank sees its own heads, so its gradient of the weights that all heads share is a part.
            self.q_norm, self.k_norm = (RMSNorm(parallel, head_dim, qk_norm_eps, ("tp",), kernels) for _ in "qk")
        out = None if lora is None else lora.of("out")
        self.out = RowParallelLinear(
            parallel, heads * head_dim, q_ranges, width, bias=out_bias, init=out_init, lora=out
        )

    def forward(self, x_TH: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        n, m = self.heads, self.kv_heads
        qkv = self.qkv(x_TH).view(batch.rows, batch.length, n + 2 * m, self.head_dim)
        qk, v = qkv.split((n + m, m), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((n, m), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if self.rope_theta is not None:
            qk = self._turn(qk, batch, self.rope_theta)
        q, k = qk.split((n, m), dim=2)
        mixed = self._whole_rows(q, k, v, batch) if batch.cache is None else self._cached(q, k, v, batch.cache)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch.rows * batch.length, n * self.head_dim))
        return out

    def _turn(self, qk_BSND: torch.Tensor, batch: Microbatch, theta: float) -> torch.Tensor:
        """Queries and keys with their positions in them."""
        if batch.cache is None:
            positions = torch.arange(batch.length, device=qk_BSND.device)
            rows = None if batch.documents is None else batch.documents.positions
        else:
            positions = batch.cache.positions_BS.reshape(-1)
            rows = torch.arange(len(positions), device=qk_BSND.device).view(batch.rows, batch.length)
        angles = rope_angles(positions, self.head_dim, theta, qk_BSND.dtype, self.rope_scaling)
        turned: torch.Tensor = self.kernels.rope(qk_BSND, *angles, positions=rows)
        return turned

    def _whole_rows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        """(B, N, S, D) from rows that are all here."""
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
            return document_attention(q_BNSD, k_BNSD, v_BNSD, bounds, starts, **seen, **dropped)
        seen["prefix_B"] = batch.tensors.get("prefix")
        if self.dropout and batch.full_address is not None:
            return attention_with_dropout(q_BNSD, k_BNSD, v_BNSD, **seen, **dropped)
        return attention(q_BNSD, k_BNSD, v_BNSD, **seen)

    def _cached(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """(B, N, S, D) from the tokens of this forward and those before them."""
        k_BMKD, v_BMKD = cache.extend(self.site, k, v)
        if cache.first:
            return attention(q.transpose(1, 2), self._spread(k), self._spread(v), causal=True)
        if self.kv_index is not None:
            k_BMKD, v_BMKD = k_BMKD[:, self.kv_index], v_BMKD[:, self.kv_index]
        return grouped_attention(q.transpose(1, 2), k_BMKD, v_BMKD, cache.mask_BSK)

    def _spread(self, x_BSMD: torch.Tensor) -> torch.Tensor:
        """Key/value heads as (B, N, S, D), one for each query head."""
        x_BMSD = x_BSMD.transpose(1, 2)
        if self.kv_index is not None:
            return x_BMSD[:, self.kv_index]
        return x_BMSD if self.repeat == 1 else x_BMSD.repeat_interleave(self.repeat, dim=1)
