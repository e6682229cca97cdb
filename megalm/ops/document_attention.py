"""Attention of rows that hold several documents, which do not see each other.

Each document is computed by itself, so that the work is that of the documents, and no mask of positions by positions
exists: by torch's kernel for sequences of various lengths where it serves (CUDA, 16 bits), else one document after the
other.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from megalm.ops.attention import attention, attention_with_dropout
from megalm.ops.dropout import DropoutAddress, Span
from megalm.ops.kernels import Kernels


def document_attention(
    q_BNSD: torch.Tensor,
    k_BNSD: torch.Tensor,
    v_BNSD: torch.Tensor,
    bounds: Sequence[int],
    starts: torch.Tensor,
    *,
    causal: bool,
    mask_BS: torch.Tensor | None = None,
    p: float = 0.0,
    address: DropoutAddress | None = None,
    site: str = "",
    first_head: int = 0,
    kernels: Kernels,
) -> torch.Tensor:
    """Like :func:`attention`, or with an ``address`` and ``p`` :func:`attention_with_dropout`, of documents that do not
    see each other.

    ``bounds``: where each begins in the rows flattened to T tokens, and T; a row's start is always one. ``starts`` is
    the same as int32 on the device. What is dropped is addressed by the key's place in its document.
    """
    batch, heads, length, dim = q_BNSD.shape
    drops = p > 0.0 and address is not None
    varying = _varying_lengths() if not drops and mask_BS is None and _varying_lengths_serve(q_BNSD) else None
    if varying is not None:
        flat = [x.transpose(1, 2).reshape(batch * length, heads, dim) for x in (q_BNSD, k_BNSD, v_BNSD)]
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        mixed: torch.Tensor = varying(*flat, starts, longest, causal)
        return mixed.view(batch, length, heads, dim).transpose(1, 2)
    parts = []
    for start, stop in itertools.pairwise(bounds):
        row, first = divmod(start, length)
        last = first + stop - start
        q, k, v = (x[row : row + 1, :, first:last] for x in (q_BNSD, k_BNSD, v_BNSD))
        mask = None if mask_BS is None else mask_BS[row : row + 1, first:last]
        if drops:
            assert address is not None
            own = _part_of(address, start, stop)
            part = attention_with_dropout(
                q,
                k,
                v,
                causal=causal,
                mask_BS=mask,
                p=p,
                address=own,
                site=site,
                first_head=first_head,
                kernels=kernels,
            )
        else:
            part = attention(q, k, v, causal=causal, mask_BS=mask)
        parts.append(part[0])
    return torch.cat(parts, dim=1).view(heads, batch, length, dim).transpose(0, 1)


def _part_of(address: DropoutAddress, start: int, stop: int) -> DropoutAddress:
    """The address of the flattened tokens [start, stop)."""
    spans, before = [], 0
    for span in address.spans:
        size = span.stop - span.start
        first, last = max(start - before, 0), min(stop - before, size)
        if first < last:
            spans.append(Span(span.slot, span.view, span.start + first, span.start + last))
        before += size
    return replace(address, spans=tuple(spans))


def _varying_lengths_serve(q_BNSD: torch.Tensor) -> bool:
    dim = q_BNSD.shape[-1]
    return (
        q_BNSD.is_cuda
        and q_BNSD.dtype in (torch.float16, torch.bfloat16)
        and dim % 8 == 0
        and dim <= 256
        and torch.cuda.get_device_capability(q_BNSD.device) >= (8, 0)
    )


@cache
def _varying_lengths() -> Callable[..., Any] | None:
    """torch's attention over sequences of various lengths, (q, k, v, starts, longest, causal); none where this torch
    has none. Its argument for causal attention was renamed between versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    windows = "window_size" in inspect.signature(varlen_attn).parameters

    def compute(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, causal: bool
    ) -> Any:
        how: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if windows else {"is_causal": causal}
        return varlen_attn(q, k, v, starts, starts, longest, longest, **how)

    return compute
