"""Softmax of attention scores over the keys that a query may attend to: the reference.

For the kinds of attention whose probabilities are needed themselves, such as those with dropout by address.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_softmax(
    x_BNQK: Tensor, mask_BK: Tensor | None = None, *, scale: float = 1.0, causal: bool = False, first_query: int = 0
) -> Tensor:
    """softmax(scale * x) over keys, of ``x``'s dtype, computed in float32 at least; 0 at keys that are masked.

    ``mask_BK`` (bool) is true at keys that may be attended to. With ``causal``, query q attends to keys up to
    ``first_query + q``: queries may be a part of a row whose keys are all here. A query that may attend to no key has
    zeros and a zero gradient, not NaN, so that rows of padding do no harm. Scores of masked keys do not matter, even
    where they are not finite; a NaN among others makes the query's probabilities NaN.
    """
    wide = x_BNQK if x_BNQK.dtype == torch.float64 else x_BNQK.float()
    scores = wide * scale
    seen = _seen(x_BNQK, mask_BK, causal, first_query)
    if seen is None:
        return scores.softmax(dim=-1).to(x_BNQK.dtype)
    scores = scores.masked_fill(~seen, -math.inf)
    # Any finite scores do where nothing is attended to, since none of them is used.
    scores = scores.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)
    return scores.softmax(dim=-1).masked_fill(~seen, 0.0).to(x_BNQK.dtype)


def _seen(x: Tensor, mask: Tensor | None, causal: bool, first_query: int) -> Tensor | None:
    seen = None if mask is None else mask[:, None, None, :]
    if causal:
        past = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device).tril(first_query)
        seen = past if seen is None else seen & past
    return seen
