"""Contrastive cross-entropy against a loop over queries in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megalm.ops.linear_cross_entropy as chunks
from megalm.ops.contrastive import contrastive_cross_entropy


def naive(queries: Tensor, keys: Tensor, targets: Tensor, temperature: Tensor, excluded: Tensor | None) -> Tensor:
    out = []
    for n, query in enumerate(queries):
        left = [m for m in range(len(keys)) if excluded is None or m != int(excluded[n])]
        scores = torch.stack([query @ keys[m] / temperature for m in left])
        target = int(targets[n])
        out.append(query.sum() * 0 if target == -100 else scores.logsumexp(0) - scores[left.index(target)])
    return torch.stack(out)


@pytest.fixture(params=["whole", "chunks of queries", "chunks of keys"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "whole":
        return
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * 14 * 8)
    monkeypatch.setattr(chunks, "FEWEST_TOKENS", 1 if request.param == "chunks of queries" else 1000)
    monkeypatch.setattr(chunks, "COLUMN_BYTES", 1)
    monkeypatch.setattr(chunks, "FEWEST_COLUMNS", 4)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("own_view", [False, True], ids=["all keys", "all but the own view"])
def test_equals_a_loop(own_view: bool) -> None:
    """Two views of each sample: the target is the other view."""
    draw = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(14, 5, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    targets, own = torch.arange(14) ^ 1, torch.arange(14)
    targets[3], own[5] = -100, -1
    excluded = own if own_view else None
    leaves = [queries, keys, temperature]
    found = contrastive_cross_entropy(queries, keys, targets, temperature, excluded_N=excluded)
    truth = naive(queries, keys, targets, temperature, excluded)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    weights = torch.rand(14, generator=draw, dtype=torch.float64)
    for w in (torch.ones(()), weights):
        grads = torch.autograd.grad((found * w).sum(), leaves, retain_graph=True)
        for a, b in zip(grads, torch.autograd.grad((truth * w).sum(), leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_one_tensor_as_queries_and_keys() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=draw, dtype=torch.float64).requires_grad_()
    targets, own = torch.arange(6) ^ 1, torch.arange(6)
    found = contrastive_cross_entropy(x, x, targets, 0.5, excluded_N=own).sum()
    truth = naive(x, x, targets, torch.tensor(0.5), own).sum()
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(grad, torch.autograd.grad(truth, x)[0], rtol=1e-11, atol=1e-11)


def test_no_queries() -> None:
    keys = torch.randn(4, 3, requires_grad=True)
    none = torch.zeros(0, 3, requires_grad=True)
    contrastive_cross_entropy(none, keys, torch.zeros(0, dtype=torch.int64), 0.1).sum().backward()
    assert keys.grad is not None
    assert keys.grad.eq(0).all()
