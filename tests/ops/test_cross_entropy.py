"""Linear cross-entropy against F.cross_entropy of whole logits, in one chunk and in many."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import megalm.ops.cross_entropy as module
from megalm.ops.cross_entropy import linear_cross_entropy
from megalm.parallel.layout import even_ranges
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.testing.processes import run_processes

T, V, H = 23, 11, 6
GROUP = single_rank().tp


def inputs(seed: int, bias: bool, tokens: int = T, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    out = [torch.randn(tokens, H, dtype=dtype), torch.randn(V, H, dtype=dtype)]
    return [t.requires_grad_() for t in out + ([torch.randn(V, dtype=dtype)] if bias else [])]


def labels_for(tokens: int = T) -> torch.Tensor:
    labels = torch.randint(V, (tokens,))
    labels[::4] = -100
    return labels


@pytest.fixture(params=[1, 5, 10**9], ids=["a token a chunk", "several chunks", "one chunk"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", request.param * V * 8)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(bias: bool) -> None:
    found, expected = inputs(0, bias), inputs(0, bias)
    labels, weights = labels_for(), torch.rand(T, dtype=torch.float64)
    losses = linear_cross_entropy(*found[:2], labels, GROUP, vocab_size=V, bias_V=found[2] if bias else None)
    truth = F.cross_entropy(F.linear(*expected), labels, reduction="none")
    torch.testing.assert_close(losses, truth, rtol=1e-12, atol=1e-12)
    assert losses[::4].eq(0).all()
    (losses * weights).sum().backward()
    (truth * weights).sum().backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunked")
def test_gradcheck() -> None:
    h, weight, bias = inputs(1, True, tokens=5)
    labels = torch.tensor([0, V - 1, -100, 3, 3])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, GROUP, vocab_size=V, bias_V=b), (h, weight, bias)
    )


def test_no_tokens() -> None:
    h, weight, bias = inputs(2, True, tokens=0)
    losses = linear_cross_entropy(h, weight, torch.zeros(0, dtype=torch.int64), GROUP, vocab_size=V, bias_V=bias)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert h.grad is not None
    assert h.grad.shape == (0, H)
    for t in (weight, bias):
        assert t.grad is not None
        assert t.grad.eq(0).all()


def test_all_ignored() -> None:
    h, weight = inputs(3, False)
    losses = linear_cross_entropy(h, weight, torch.full((T,), -100), GROUP, vocab_size=V)
    losses.sum().backward()
    assert losses.eq(0).all()
    assert h.grad is not None
    assert h.grad.eq(0).all()


def test_large_logits_stay_finite() -> None:
    h = torch.full((2, 1), 1e4)
    losses = linear_cross_entropy(h, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), GROUP, vocab_size=2)
    torch.testing.assert_close(losses, torch.tensor([0.0, 2e4]))


def test_bfloat16_losses_are_float32() -> None:
    h, weight = (t.detach().bfloat16().requires_grad_() for t in inputs(4, False))
    labels = labels_for()
    losses = linear_cross_entropy(h, weight, labels, GROUP, vocab_size=V)
    assert losses.dtype == torch.float32
    logits = F.linear(h, weight).float()
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert h.grad is not None
    assert h.grad.dtype == torch.bfloat16


@pytest.mark.dist
@pytest.mark.usefixtures("chunked")
def test_vocabulary_over_three_ranks() -> None:
    """Uneven shards that must still agree on their chunks; the input's gradient is a part on each rank."""
    expected = inputs(5, True)
    labels = labels_for()
    truth = F.cross_entropy(F.linear(*expected), labels, reduction="none")
    truth.sum().backward()
    ranges = even_ranges(V, 3)

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        first, last = ranges[parallel.tp.index]
        h, weight, bias = expected
        shard = [t.detach().clone().requires_grad_() for t in (h, weight[first:last], bias[first:last])]
        losses = linear_cross_entropy(*shard[:2], labels, parallel.tp, vocab_size=V, bias_V=shard[2], first_row=first)
        losses.sum().backward()
        return {"losses": losses, **{f"grad{i}": t.grad for i, t in enumerate(shard) if t.grad is not None}}

    found = run_processes(rank, tp=3, timeout=20)
    for out in found:
        torch.testing.assert_close(out["losses"], truth.detach(), rtol=1e-12, atol=1e-12)
    joined = [sum(out["grad0"] for out in found), *(torch.cat([o[f"grad{i}"] for o in found]) for i in (1, 2))]
    for a, b in zip(joined, expected, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-12, atol=1e-12)


def test_many_chunks_in_bfloat16_are_as_exact_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights' gradient is added up in float32; in bfloat16 its error would grow with the chunks."""
    draw = torch.Generator().manual_seed(0)
    h, weight = torch.randn(256, 16, generator=draw), torch.randn(11, 16, generator=draw)
    labels = torch.randint(11, (256,), generator=draw)
    bias = torch.zeros(11)

    def gradients(dtype: torch.dtype, chunk_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        w, b = weight.bfloat16().to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
        group = single_rank().tp
        linear_cross_entropy(h.bfloat16().to(dtype), w, labels, group, vocab_size=11, bias_V=b).sum().backward()
        assert w.grad is not None
        assert b.grad is not None
        assert w.grad.dtype == b.grad.dtype == dtype
        return w.grad.double(), b.grad.double()

    exact = gradients(torch.float64, 1 << 30)
    one, many = gradients(torch.bfloat16, 1 << 30), gradients(torch.bfloat16, 2 * 11 * 4)
    for truth, a, b in zip(exact, one, many, strict=True):
        assert (b - truth).norm() <= 1.5 * (a - truth).norm()
