"""Attention of a rank's positions to whole rows, against attention of whole rows: results and gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megalm.nn.documents import find_documents
from megalm.ops.attention import attention, attention_with_dropout
from megalm.ops.context_attention import context_attention
from megalm.ops.document_attention import document_attention
from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.ops.kernels import PLAIN
from megalm.parallel.collectives import gather_sequence
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sequence import SequenceMap, balanced_map, contiguous_map
from megalm.parallel.sim import run_simulated

SITE = "layers.0.attention.probabilities"
KINDS = ["causal", "bidirectional", "padded", "causal padded", "prefix", "documents", "causal documents"]
P = 0.4


def case(kind: str, ranks: int, seed: int) -> tuple[list[torch.Tensor], dict[str, Any], dict[str, Any], SequenceMap]:
    """q, k and v of whole rows; what is attended to, as attention of whole rows and as the other take it; the map."""
    draw, torch_draw = random.Random(f"{kind} {ranks} {seed}"), torch.Generator().manual_seed(seed)
    # More keys than are numbered together, and chunks whose borders are not theirs.
    size = draw.choice([5, 6, 9, 20 // ranks + 3])
    batch, heads, length, dim = 3, 2, 2 * ranks * size, 4
    q, k, v = (torch.randn(batch, heads, length, dim, dtype=torch.float64, generator=torch_draw) for _ in range(3))
    causal = kind.startswith(("causal", "prefix"))
    seen: dict[str, Any] = {"causal": causal}
    if "padded" in kind:
        lengths = torch.tensor([draw.randint(1, length) for _ in range(batch)])
        seen["mask_BS"] = torch.arange(length) < lengths[:, None]
    if kind == "prefix":
        seen["prefix_B"] = torch.tensor([0, draw.randint(1, length - 1), length])
    whole = dict(seen)
    if "documents" in kind:
        numbers = (torch.rand(batch, length, generator=torch_draw) < 0.15).cumsum(1)
        found = find_documents(numbers)
        whole |= {"bounds": found.bounds, "starts": found.starts}
        seen["bounds"] = found.bounds
    places = balanced_map(length, ranks) if causal else contiguous_map(length, ranks)
    return [q, k, v], whole, seen, places


def serial(kind: str, qkv: list[torch.Tensor], whole: dict[str, Any], dropped: dict[str, Any]) -> torch.Tensor:
    if "documents" in kind:
        return document_attention(*qkv, **whole, kernels=PLAIN, **dropped)
    if dropped:
        return attention_with_dropout(*qkv, **{"mask_BS": None, **whole}, kernels=PLAIN, **dropped)
    return attention(*qkv, **whole)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_together_compute_what_one_computes(kind: str, drops: bool, ranks: int) -> None:
    qkv, whole, seen, places = case(kind, ranks, seed=ranks)
    address = DropoutAddress(5, 2, row_spans((3, 0, 8), places.length, 0, 3 * places.length))
    dropped: dict[str, Any] = {}
    if drops:
        dropped = {"p": P, "address": address, "site": SITE, "first_head": 1}
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = serial(kind, leaves, whole, dropped)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (expected * weight).sum().backward()

    def rank(parallel: ParallelContext) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        index = parallel.dp.index
        own = [places.take(x, index, 2).requires_grad_() for x in qkv]
        k, v = (gather_sequence(x.movedim(2, 0), parallel.dp, places).movedim(0, 2) for x in own[1:])
        mixed = context_attention(own[0], k, v, places.ranges[index], **seen, kernels=PLAIN, **dropped)
        (mixed * places.take(weight, index, 2)).sum().backward()
        return mixed.detach(), [x.grad for x in own]

    for index, (mixed, grads) in enumerate(run_simulated(rank, dp=ranks)):
        torch.testing.assert_close(mixed, places.take(expected.detach(), index, 2), rtol=1e-10, atol=1e-12)
        for leaf, grad in zip(leaves, grads, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(grad, places.take(leaf.grad, index, 2), rtol=1e-10, atol=1e-12)
