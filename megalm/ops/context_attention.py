"""Attention of some positions' queries to the keys of whole rows, as a context-parallel rank computes it.

Every mask comes from logical positions, never from places in a rank's memory. The work is cut into pieces: a stretch of
queries with the keys that it may see. So causal queries do not multiply keys after them, documents of a row do not
meet, and ranks whose positions are balanced have equal work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from megalm.ops.attention import drop_probabilities
from megalm.ops.dropout import DropoutAddress
from megalm.ops.kernels import Kernels

Stretch = tuple[int, int]


def context_attention(
    q_BNQD: torch.Tensor,
    k_BNSD: torch.Tensor,
    v_BNSD: torch.Tensor,
    stretches: Sequence[Stretch],
    *,
    causal: bool,
    mask_BS: torch.Tensor | None = None,
    prefix_B: torch.Tensor | None = None,
    bounds: Sequence[int] | None = None,
    p: float = 0.0,
    address: DropoutAddress | None = None,
    site: str = "",
    first_head: int = 0,
    kernels: Kernels,
) -> torch.Tensor:
    """What :func:`megalm.ops.attention.attention`, its form with dropout and :func:`document_attention` give for the
    queries at ``stretches`` of a row: (B, N, Q, D).

    ``stretches``: logical positions [start, stop) of the queries, in the order in which they stand in ``q``; keys and
    values are those of all S positions. ``mask_BS`` is true at keys that may be attended to; ``prefix_B`` as in
    ``attention``. ``bounds``: as in ``document_attention``, of whole rows. ``address``: of whole rows, one span each.
    """
    batch, length = len(q_BNQD), k_BNSD.shape[2]
    drops = p > 0.0 and address is not None

    def piece(rows: slice, queries: Stretch, place: int, keys: Stretch) -> torch.Tensor:
        q = q_BNQD[rows, :, place : place + queries[1] - queries[0]]
        k, v = (x[rows, :, keys[0] : keys[1]] for x in (k_BNSD, v_BNSD))
        mask_BK = None if mask_BS is None else mask_BS[rows, keys[0] : keys[1]]
        prefix = None if prefix_B is None or not causal else prefix_B[rows]
        if not drops:
            mask = _seen(queries, keys, causal, mask_BK, prefix, q.device)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert address is not None
        scores = q @ k.transpose(-1, -2)
        if prefix is not None:
            # Finite, so that a query of padding, which may attend to nothing, has no NaN.
            unseen = ~_past(queries, keys, prefix, q.device)
            scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
        probabilities = kernels.masked_softmax(
            scores,
            mask_BK,
            scale=1 / math.sqrt(q.shape[-1]),
            causal=causal and prefix is None,
            first_query=queries[0] - keys[0],
        )
        spans = tuple(replace(span, start=queries[0], stop=queries[1]) for span in address.spans[rows])
        own = replace(address, spans=spans)
        return drop_probabilities(probabilities, p, own, site, first_head, kernels) @ v

    everyone = slice(0, batch)
    parts, place = [], 0
    for start, stop in stretches:
        if bounds is None:
            end = stop if causal and prefix_B is None else length
            parts.append(piece(everyone, (start, stop), place, (0, end)))
        else:
            rows = [
                torch.cat(
                    [
                        piece(slice(row, row + 1), queries, place + queries[0] - start, keys)
                        for queries, keys in _documents_of(row, (start, stop), bounds, length, causal)
                    ],
                    dim=2,
                )
                for row in range(batch)
            ]
            parts.append(torch.cat(rows))
        place += stop - start
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _documents_of(
    row: int, stretch: Stretch, bounds: Sequence[int], length: int, causal: bool
) -> list[tuple[Stretch, Stretch]]:
    """For each document that a stretch of a row touches: its queries in the stretch, and the keys that they see."""
    found = []
    for begin, end in itertools.pairwise(bounds):
        first, last = begin - row * length, end - row * length
        queries = max(first, stretch[0]), min(last, stretch[1])
        if queries[0] < queries[1]:
            found.append((queries, (first, queries[1] if causal else last)))
    return found


def _seen(
    queries: Stretch,
    keys: Stretch,
    causal: bool,
    mask_BK: torch.Tensor | None,
    prefix_B: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Which keys each query attends to: bool, (B or 1, 1, Q or 1, K); none where it is all of them."""
    seen = None if mask_BK is None else mask_BK[:, None, None, :]
    if causal:
        past = _past(queries, keys, prefix_B, device)
        seen = past if seen is None else seen & past
    return seen


def _past(queries: Stretch, keys: Stretch, prefix_B: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Keys that do not stand after the query, or stand in the row's prefix: bool (B or 1, 1, Q, K)."""
    own, others = torch.arange(*queries, device=device), torch.arange(*keys, device=device)
    past = (own[:, None] >= others)[None, None]
    return past if prefix_B is None else past | (others < prefix_B[:, None])[:, None, None]
