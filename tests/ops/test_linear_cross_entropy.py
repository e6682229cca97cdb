"""Linear cross-entropy against F.cross_entropy of whole logits, in one chunk and in many."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import megalm.ops.linear_cross_entropy as module
from megalm.errors import UsageError
from megalm.ops.linear_cross_entropy import linear_cross_entropy
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


def chunks_of(monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int | None = None, itemsize: int = 8) -> None:
    """Chunks of so many tokens; or of so many rows of the vocabulary, with all tokens."""
    monkeypatch.setattr(module, "CHUNK_BYTES", tokens * V * itemsize)
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1 if rows is None else 10**9)
    monkeypatch.setattr(module, "COLUMN_BYTES", 1)
    monkeypatch.setattr(module, "FEWEST_COLUMNS", rows or 1)


@pytest.fixture(
    params=[(1, None), (5, None), (10**9, None), (0, 1), (0, 4), (0, 100)],
    ids=["a token", "several tokens", "all", "a row", "several rows", "all rows"],
)
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, *request.param)


def truth_of(
    tensors: list[torch.Tensor], labels: torch.Tensor, smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    logits = F.linear(*tensors)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return losses + z_loss * logits.logsumexp(dim=-1).square() * (labels != -100)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("uniform", [True, False], ids=["one number", "a number for each token"])
@pytest.mark.parametrize(("bias", "smoothing", "z_loss"), [(False, 0.0, 0.0), (True, 0.0, 0.0), (True, 0.2, 0.01)])
def test_equals_torch(bias: bool, smoothing: float, z_loss: float, uniform: bool) -> None:
    found, expected = inputs(0, bias), inputs(0, bias)
    labels = labels_for()
    weights = torch.tensor(0.7, dtype=torch.float64) if uniform else torch.rand(T, dtype=torch.float64)
    losses = linear_cross_entropy(
        *found[:2],
        labels,
        GROUP,
        vocab_size=V,
        bias_V=found[2] if bias else None,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )
    truth = truth_of(expected, labels, smoothing, z_loss)
    torch.testing.assert_close(losses, truth, rtol=1e-12, atol=1e-12)
    assert losses[::4].eq(0).all()
    # Of a sum every loss has the same gradient.
    (losses.sum() * weights if uniform else (losses * weights).sum()).backward()
    (truth * weights).sum().backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("uniform", [True, False], ids=["one number", "a number for each token"])
def test_second_backward(uniform: bool) -> None:
    """What was computed ahead is given away by the first."""
    found, expected = inputs(0, True), inputs(0, True)
    labels = labels_for()
    weights = torch.ones(()) if uniform else torch.rand(T, dtype=torch.float64)
    losses = linear_cross_entropy(*found[:2], labels, vocab_size=V, bias_V=found[2])
    total = losses.sum() if uniform else (losses * weights).sum()
    truth = (truth_of(expected, labels) * weights).sum()
    for _ in range(3):
        total.backward(retain_graph=True)
        truth.backward(retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("uniform", [True, False], ids=["one number", "a number for each token"])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_some_are_frozen(trained: tuple[int, ...], uniform: bool) -> None:
    found, expected = inputs(0, True), inputs(0, True)
    for both in (found, expected):
        for i, t in enumerate(both):
            t.requires_grad_(i in trained)
    labels = labels_for()
    weights = torch.ones(()) if uniform else torch.rand(T, dtype=torch.float64)
    losses = linear_cross_entropy(*found[:2], labels, vocab_size=V, bias_V=found[2])
    (losses.sum() if uniform else (losses * weights).sum()).backward()
    (truth_of(expected, labels) * weights).sum().backward()
    for a, b in zip(found, expected, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_evaluation_computes_no_gradients() -> None:
    h, weight = inputs(0, False)
    labels, calls = labels_for(), []

    def gradient_(*_: object, **__: object) -> None:
        calls.append(1)

    kernels = module.CrossEntropyKernels(gradient_=gradient_)
    with torch.no_grad():
        losses = linear_cross_entropy(h, weight, labels, vocab_size=V, kernels=kernels)
    torch.testing.assert_close(losses, truth_of([h, weight], labels).detach(), rtol=1e-12, atol=1e-12)
    assert not losses.requires_grad
    linear_cross_entropy(h.detach(), weight.detach(), labels, vocab_size=V, kernels=kernels)
    assert not calls


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("uniform", [True, False], ids=["one number", "a number for each token"])
def test_excluded_ids(uniform: bool) -> None:
    found, expected = inputs(0, False), inputs(0, False)
    labels = labels_for()
    excluded = (labels + 3) % V
    excluded[1] = -1
    losses = linear_cross_entropy(*found, labels, vocab_size=V, excluded_T=excluded)
    logits = F.linear(*expected)
    hidden = F.one_hot(excluded.clamp(min=0), V).bool() & (excluded >= 0)[:, None]
    truth = F.cross_entropy(logits.masked_fill(hidden, -torch.inf), labels, reduction="none")
    torch.testing.assert_close(losses, truth, rtol=1e-12, atol=1e-12)
    weights = torch.ones(()) if uniform else torch.rand(T, dtype=torch.float64)
    (losses.sum() if uniform else (losses * weights).sum()).backward()
    (truth * weights).sum().backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(UsageError, match="no id can be excluded"):
        linear_cross_entropy(*found, labels, vocab_size=V, excluded_T=excluded, label_smoothing=0.1)


@pytest.mark.usefixtures("chunked")
def test_gradcheck() -> None:
    h, weight, bias = inputs(1, True, tokens=3)
    labels = torch.tensor([0, -100, V - 1])
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
@pytest.mark.parametrize("options", [(0.0, 0.0), (0.2, 0.01)])
def test_vocabulary_over_three_ranks(options: tuple[float, float]) -> None:
    """Uneven shards that must still agree on their chunks; the input's gradient is a part on each rank."""
    expected = inputs(5, True)
    labels = labels_for()
    smoothing, z_loss = options
    truth = truth_of(expected, labels, smoothing, z_loss)
    truth.sum().backward()
    ranges = even_ranges(V, 3)

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        first, last = ranges[parallel.tp.index]
        h, weight, bias = expected
        shard = [t.detach().clone().requires_grad_() for t in (h, weight[first:last], bias[first:last])]
        losses = linear_cross_entropy(
            *shard[:2],
            labels,
            parallel.tp,
            vocab_size=V,
            bias_V=shard[2],
            first_row=first,
            label_smoothing=smoothing,
            z_loss=z_loss,
        )
        losses.sum().backward()
        return {"losses": losses, **{f"grad{i}": t.grad for i, t in enumerate(shard) if t.grad is not None}}

    found = run_processes(rank, tp=3, timeout=20)
    for out in found:
        torch.testing.assert_close(out["losses"], truth.detach(), rtol=1e-12, atol=1e-12)
    joined = [sum(out["grad0"] for out in found), *(torch.cat([o[f"grad{i}"] for o in found]) for i in (1, 2))]
    for a, b in zip(joined, expected, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokens", "rows"), [(2, None), (0, 3)], ids=["of tokens", "of rows"])
def test_many_chunks_in_bfloat16_are_as_exact_as_one(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int | None
) -> None:
    """Gradients are added up in float32; in bfloat16 their error would grow with the chunks."""
    draw = torch.Generator().manual_seed(0)
    h, weight = torch.randn(256, 16, generator=draw), torch.randn(V, 16, generator=draw)
    labels = torch.randint(V, (256,), generator=draw)
    bias = torch.zeros(V)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (h, weight, bias)]
        (linear_cross_entropy(*leaves[:2], labels, vocab_size=V, bias_V=leaves[2]).sum() / 3).backward()
        assert all(t.grad is not None and t.grad.dtype == dtype for t in leaves)
        return [t.grad.double() for t in leaves if t.grad is not None]

    chunks_of(monkeypatch, 256)
    exact, one = gradients(torch.float64), gradients(torch.bfloat16)
    chunks_of(monkeypatch, tokens, rows, itemsize=2)
    for truth, a, b in zip(exact, one, gradients(torch.bfloat16), strict=True):
        assert (b - truth).norm() <= 1.5 * (a - truth).norm()


@pytest.mark.parametrize(("tokens", "rows"), [(10**4, None), (1000, None), (0, 6)], ids=["all", "tokens", "rows"])
def test_float16_gradients_need_not_fit_before_they_are_scaled(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int | None
) -> None:
    """Of 4096 tokens with one label the sum is beyond float16; their mean is not."""
    chunks_of(monkeypatch, tokens, rows, itemsize=2)
    h = torch.full((4096, 2), 60.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(V, 2, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(h, weight, torch.zeros(4096, dtype=torch.int64), vocab_size=V).sum().div(4096).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0].float(), torch.full((2,), 60.0 * (1 / V - 1)), rtol=2e-3, atol=0.0)
