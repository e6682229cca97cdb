"""Attention over whole rows: torch's fused kernels, and a reference that drops probabilities by address.

SDPA draws its dropout from the generator's stream, which depends on the layout; so with attention dropout the reference
runs instead, its mask addressed by slot, view, query, head and key.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from megalm.ops.dropout import DropoutAddress
from megalm.ops.kernels import Kernels


def prefix_mask(prefix_B: torch.Tensor, length: int) -> torch.Tensor:
    """Which keys a query attends to, causally but for the first ``prefix_B`` (int64) of its row, which all do: bool
    (B, 1, S, S)."""
    places = torch.arange(length, device=prefix_B.device)
    past = places[:, None] >= places[None, :]
    return (past | (places < prefix_B[:, None])[:, None, :])[:, None]


def attention(
    q_BNSD: torch.Tensor,
    k_BNSD: torch.Tensor,
    v_BNSD: torch.Tensor,
    *,
    causal: bool,
    mask_BS: torch.Tensor | None = None,
    prefix_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, with as many key/value heads as query heads: (batch, heads, seq, head_dim).

    ``mask_BS`` is true at keys that may be attended to. With ``prefix_B``, causal attention is that of
    :func:`prefix_mask`.
    """
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    if causal and prefix_B is not None:
        seen = prefix_mask(prefix_B, q_BNSD.shape[2])
        mask = seen if mask is None else mask & seen
        causal = False
    elif mask is not None and causal:
        length = q_BNSD.shape[2]
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        causal = False
    return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, attn_mask=mask, is_causal=causal)


def grouped_attention(
    q_BNSD: torch.Tensor, k_BMKD: torch.Tensor, v_BMKD: torch.Tensor, mask_BSK: torch.Tensor
) -> torch.Tensor:
    """The same for some queries and the keys of all positions so far, without a copy of the keys for each query head:
    head n reads key/value head n * M / N. ``mask_BSK`` is true where a query may attend to a key.

    Query heads that share keys stand as further queries of one head.
    """
    (batch, heads, length, dim), groups = q_BNSD.shape, k_BMKD.shape[1]
    together = q_BNSD.reshape(batch, groups, heads // groups * length, dim)
    mask = mask_BSK[:, None].repeat(1, 1, heads // groups, 1)
    mixed = F.scaled_dot_product_attention(together, k_BMKD, v_BMKD, attn_mask=mask)
    return mixed.reshape(batch, heads, length, dim)


def attention_with_dropout(
    q_BNSD: torch.Tensor,
    k_BNSD: torch.Tensor,
    v_BNSD: torch.Tensor,
    *,
    causal: bool,
    mask_BS: torch.Tensor | None,
    prefix_B: torch.Tensor | None = None,
    p: float,
    address: DropoutAddress,
    site: str,
    first_head: int,
    kernels: Kernels,
) -> torch.Tensor:
    """Like :func:`attention`, probabilities dropped by address. ``first_head`` numbers this rank's heads."""
    length, dim = q_BNSD.shape[2:]
    scores = q_BNSD @ k_BNSD.transpose(-1, -2)
    if causal and prefix_B is not None:
        # Finite, so that a query of padding, which may attend to nothing, has no NaN.
        scores = scores.masked_fill(~prefix_mask(prefix_B, length), torch.finfo(scores.dtype).min)
        causal = False
    probabilities = kernels.masked_softmax(scores, mask_BS, scale=1 / math.sqrt(dim), causal=causal)
    return drop_probabilities(probabilities, p, address, site, first_head, kernels) @ v_BNSD


def drop_probabilities(
    probabilities_BNQK: torch.Tensor, p: float, address: DropoutAddress, site: str, first_head: int, kernels: Kernels
) -> torch.Tensor:
    """Dropout of probabilities by address: that of the queries, one span for each row; keys count from 0."""
    batch, heads, queries, keys = probabilities_BNQK.shape
    blocks = -(-keys // KEYS)
    more = blocks * KEYS - keys
    padded = F.pad(probabilities_BNQK, (0, more)) if more else probabilities_BNQK
    rows = padded.reshape(batch, heads, queries, blocks, KEYS).transpose(2, 3).reshape(-1, KEYS)
    dropped: torch.Tensor = kernels.dropout(rows, p, head_blocks(address, first_head, heads, keys), site)
    whole = dropped.view(batch, heads, blocks, queries, KEYS).transpose(2, 3).reshape(padded.shape)
    return whole[..., :keys]


KEYS = 32
"""Keys whose draws are numbered together, one block of them after the other. So the draw for a query and a key does not
depend on how long the row is made, as it would if a query's draws followed those of the query before it."""
_BLOCK_BITS, _QUERY_BITS = 22, 26
"""Of the number of a draw's row: head, block of keys, query. Two 16-bit draws for each leave it a signed 64-bit integer
with up to 16,384 heads, of rows of 67 million tokens."""


@lru_cache(maxsize=8)
def head_blocks(address: DropoutAddress, first_head: int, heads: int, keys: int) -> DropoutAddress:
    """Where the rows of an attention's probabilities lie, cut into blocks of keys: of each row of tokens, of each head,
    the queries with its first :data:`KEYS` keys, then with the next. All layers of a microbatch ask for the same."""
    blocks = -(-keys // KEYS)
    starts = [
        ((first_head + head) << _BLOCK_BITS | block) << _QUERY_BITS for head in range(heads) for block in range(blocks)
    ]
    spans = tuple(
        replace(span, start=start + span.start, stop=start + span.stop) for span in address.spans for start in starts
    )
    return replace(address, spans=spans)
