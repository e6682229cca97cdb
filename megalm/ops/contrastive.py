"""Contrastive cross-entropy: each query is to find its key among all; their products are never all in memory.

It is the cross-entropy of a linear layer whose weight is the keys, so chunks, kernels and gradients are that one's.
(van den Oord et al., 2018.)
"""

from __future__ import annotations

from torch import Tensor

from megalm.ops.cross_entropy import REFERENCE, CrossEntropyKernels
from megalm.ops.linear_cross_entropy import linear_cross_entropy


def contrastive_cross_entropy(
    queries_ND: Tensor,
    keys_MD: Tensor,
    targets_N: Tensor,
    temperature: float | Tensor,
    *,
    excluded_N: Tensor | None = None,
    ignore: int = -100,
    kernels: CrossEntropyKernels = REFERENCE,
) -> Tensor:
    """-log softmax(queries keys^T / temperature)[target] for each query: (N,) in float32 (float64 for float64), 0 where
    the target is ``ignore``.

    ``targets_N`` are rows of ``keys_MD``, int64. ``excluded_N`` names a key for each query that is not among its
    choices, such as the query itself where keys are views of the same samples (-1: none); it must not be the target.
    Gradients reach queries, all keys (those gathered from other ranks too), and a temperature that is a tensor.
    """
    return linear_cross_entropy(
        queries_ND / temperature,
        keys_MD,
        targets_N,
        vocab_size=keys_MD.shape[0],
        ignore=ignore,
        excluded_T=excluded_N,
        kernels=kernels,
    )
