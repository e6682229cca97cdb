"""Attention, fused and with dropout by address, against loops over heads and positions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.nn.attention import Attention
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import materialise
from megalm.ops.attention import attention, attention_with_dropout
from megalm.ops.dropout import DropoutAddress, Span, draws16, row_spans
from megalm.ops.kernels import PLAIN
from megalm.parallel.layout import Init
from megalm.parallel.mesh import single_rank

B, N, S, D = 2, 3, 5, 4
SITE = "layers.0.attention.probabilities"


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query at a time; ``keep`` (B, N, S, S) multiplies the probabilities; key head = query head // group. Causal
    attention sees the first ``prefix`` (B,) keys too."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for s in range(q.shape[2]):
                seen = torch.tensor(
                    [
                        (j <= s or not causal or (prefix is not None and j < prefix[b]))
                        and (mask is None or bool(mask[b, j]))
                        for j in range(q.shape[2])
                    ]
                )
                scores = torch.stack([q[b, n, s] @ key for key in k[b, n // group]]) / math.sqrt(q.shape[3])
                weights = torch.where(seen, (scores - scores[seen].max()).exp(), torch.zeros_like(scores))
                weights = weights / weights.sum()
                out[b, n, s] = (weights if keep is None else weights * keep[b, n, s]) @ v[b, n // group]
    return out


def qkv(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(B, N, S, D, dtype=torch.float64) for _ in range(3)]


def draws(address: DropoutAddress, head: int, length: int = S) -> torch.Tensor:
    """(rows, queries, keys): of query q and key k that of feature k % 32 at head * 2^48 + k // 32 * 2^26 + q."""
    rows = []
    for span in address.spans:
        at = [(head * 2**48 + key // 32 * 2**26 + query, key % 32) for query in range(length) for key in range(length)]
        found = {}
        for place, _ in at:
            one = DropoutAddress(address.seed, address.step, (Span(span.slot, span.view, place, place + 1),))
            found.setdefault(place, draws16(one, SITE, 32, torch.device("cpu"))[0].tolist())
        rows.append(torch.tensor([found[place][feature] for place, feature in at]).view(length, length))
    return torch.stack(rows)


CASES = [(True, None), (False, None), (False, torch.tensor([[True, True, False, True, False], [True] * 5]))]


@pytest.mark.parametrize(("causal", "mask"), CASES, ids=["causal", "bidirectional", "padded"])
def test_equals_loops(causal: bool, mask: torch.Tensor | None) -> None:
    q, k, v = qkv(0)
    found = attention(q, k, v, causal=causal, mask_BS=mask)
    torch.testing.assert_close(found, naive(q, k, v, causal, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("causal", "mask"), CASES, ids=["causal", "bidirectional", "padded"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_with_dropout_equals_loops(causal: bool, mask: torch.Tensor | None, p: float) -> None:
    q, k, v = qkv(1)
    address = DropoutAddress(3, 4, row_spans([6, 9], S, 0, B * S))
    found = attention_with_dropout(
        q, k, v, causal=causal, mask_BS=mask, p=p, address=address, site=SITE, first_head=2, kernels=PLAIN
    )
    threshold = round(p * 65536)
    heads = [draws(address, 2 + n) >= threshold for n in range(N)]
    keep = torch.stack(heads, dim=1).double() * 65536 / (65536 - threshold)
    torch.testing.assert_close(found, naive(q, k, v, causal, mask, keep), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True] * 4 + [False], [True] * 5])], ids=["whole", "padded"])
@pytest.mark.parametrize("prefix", [[0, 1], [3, 5], [2, 0]])
def test_a_prefix_is_seen_by_all(prefix: list[int], mask: torch.Tensor | None) -> None:
    """Fused, and with dropout; a prefix of one token is causal, one of all bidirectional."""
    q, k, v = qkv(2)
    first = torch.tensor(prefix)
    found = attention(q, k, v, causal=True, mask_BS=mask, prefix_B=first)
    torch.testing.assert_close(found, naive(q, k, v, True, mask, prefix=first), rtol=1e-12, atol=1e-12)
    address = DropoutAddress(3, 4, row_spans([6, 9], S, 0, B * S))
    heads = [draws(address, n) >= 26214 for n in range(N)]
    keep = torch.stack(heads, dim=1).double() * 65536 / (65536 - 26214)
    dropped = attention_with_dropout(
        q,
        k,
        v,
        causal=True,
        mask_BS=mask,
        prefix_B=first,
        p=0.4,
        address=address,
        site=SITE,
        first_head=0,
        kernels=PLAIN,
    )
    torch.testing.assert_close(dropped, naive(q, k, v, True, mask, keep, first), rtol=1e-12, atol=1e-12)


def test_padding_before_a_prefix_is_no_nan() -> None:
    """A query that may attend to nothing, or only to what comes later."""
    q, k, v = (x.requires_grad_() for x in qkv(3))
    mask, address = torch.tensor([[False] * 4 + [True]] * B), DropoutAddress(3, 4, row_spans([6, 9], S, 0, B * S))
    found = attention_with_dropout(
        q,
        k,
        v,
        causal=True,
        mask_BS=mask,
        prefix_B=torch.tensor([0, 2]),
        p=0.1,
        address=address,
        site=SITE,
        first_head=0,
        kernels=PLAIN,
    )
    found.sum().backward()
    assert all(x.isfinite().all() for x in (found, q.grad, k.grad, v.grad))


@settings(max_examples=15, deadline=None)
@given(kv_heads=st.integers(1, 3), group=st.integers(1, 3), seed=st.integers(0, 1000))
def test_grouped_queries_read_their_key_head(kv_heads: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    one, heads, init = single_rank(), kv_heads * group, Init("normal", 0.5)
    layer = Attention(
        one,
        width=6,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=D,
        causal=True,
        rope_theta=None,
        qkv_bias=True,
        out_bias=False,
        dropout=0.0,
        site=SITE,
        init=init,
        out_init=init,
        kernels=PLAIN,
    )
    materialise(layer, one, seed, torch.float64)
    x = torch.randn(B * S, 6, dtype=torch.float64)
    fused = torch.nn.functional.linear(x, layer.qkv.weight, layer.qkv.bias).view(B, S, heads + 2 * kv_heads, D)
    q, k, v = fused.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    mixed = naive(q, k, v, True, None).transpose(1, 2).reshape(B * S, heads * D)
    found = layer(x, make_microbatch({"tokens": torch.zeros(B, S, dtype=torch.int64)}, one))
    torch.testing.assert_close(found, mixed @ layer.out.weight.t(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kept", [5, 31, 33, 40, 64, 70])
def test_what_is_dropped_does_not_depend_on_how_long_rows_are_made(kept: int) -> None:
    """Rows of so many tokens, padded to 96 and to no more than they need."""
    torch.manual_seed(5)
    whole = torch.randn(3, B, N, 96, 4, dtype=torch.float64)
    found = []
    for length in (96, kept):
        q, k, v = whole[:, :, :, :length]
        mask = (torch.arange(length) < kept).expand(B, length)
        address = DropoutAddress(3, 4, row_spans([6, 9], length, 0, B * length))
        given = {"causal": False, "mask_BS": mask, "p": 0.4, "address": address, "site": SITE, "first_head": 0}
        found.append(attention_with_dropout(q, k, v, **given, kernels=PLAIN)[:, :, :kept])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
