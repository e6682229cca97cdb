"""Cross-entropy of logits, whole and in shards, against F.cross_entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.errors import UsageError
from megalm.ops.cross_entropy import Loss, cross_entropy, merge, no_statistics, statistics
from megalm.parallel.layout import even_ranges
from megalm.parallel.mesh import ParallelContext
from megalm.testing.processes import run_processes

T, V = 13, 7
OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-2), (1.0, 0.0)]


def drawn(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (T,), generator=draw)
    labels[::4] = -100
    return torch.randn(T, V, generator=draw, dtype=torch.float64).mul_(scale).requires_grad_(), labels


def truth(logits: Tensor, labels: Tensor, smoothing: float, z_loss: float) -> Tensor:
    out = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return out + z_loss * logits.logsumexp(dim=-1).square() * (labels != -100)


@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_equals_torch(smoothing: float, z_loss: float, overwrite: bool) -> None:
    logits, labels = drawn()
    weights = torch.rand(T, dtype=torch.float64)
    expected = truth(logits, labels, smoothing, z_loss)
    (true_grad,) = torch.autograd.grad((expected * weights).sum(), logits)
    copy = (logits * 1.0) if overwrite else logits
    found = cross_entropy(copy, labels, label_smoothing=smoothing, z_loss=z_loss, overwrite=overwrite)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad((found * weights).sum(), logits)
    torch.testing.assert_close(grad, true_grad, rtol=1e-12, atol=1e-12)


def test_overwritten_logits_cannot_serve_twice() -> None:
    logits, labels = drawn()
    copy = logits * 1.0
    loss = cross_entropy(copy, labels, overwrite=True).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(copy, logits.grad)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parts_of_the_vocabulary_merge() -> None:
    logits, labels = drawn()
    wide = logits.detach()
    whole = statistics(wide, labels, 0, total=True)
    found = no_statistics(T, wide)
    for first, last in ((0, 0), (0, 2), (2, 2), (2, 6), (6, V)):
        found = merge(found, statistics(wide[:, first:last], labels, first, total=True))
    torch.testing.assert_close(found, whole, rtol=1e-13, atol=1e-13)


def test_part_of_nothing_but_minus_infinity() -> None:
    logits, labels = drawn()
    wide = logits.detach().clone()
    wide[:, 3:] = -math.inf
    labels = labels.clamp(max=2)
    parts = [statistics(part, labels, first, total=False) for part, first in ((wide[:, 3:], 3), (wide[:, :3], 0))]
    found = Loss(V).losses(merge(*parts), labels)
    torch.testing.assert_close(found, F.cross_entropy(wide, labels, reduction="none"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_spoil_their_token_alone(bad: float) -> None:
    logits, labels = drawn()
    wide = logits.detach().clone()
    wide[1, 5] = wide[4, 0] = bad  # the latter's label is ignored
    wide[2] = -math.inf
    wide.requires_grad_()
    losses = cross_entropy(wide, labels)
    (grad,) = torch.autograd.grad(losses.sum(), wide)
    spoilt = torch.zeros(T, dtype=torch.bool)
    spoilt[[1, 2]] = True
    assert torch.equal(losses.isnan(), spoilt)
    assert torch.equal(grad.isnan().any(dim=1), spoilt)
    assert grad[::4].eq(0).all()


def test_labels_outside_the_vocabulary_are_not_scored_silently() -> None:
    logits, _ = drawn()
    losses = cross_entropy(logits, torch.tensor([V, -1, -100, *[0] * (T - 3)]))
    assert losses.isnan().tolist() == [True, True, *[False] * (T - 2)]


def test_no_tokens_and_everything_ignored() -> None:
    empty = torch.zeros(0, V, requires_grad=True)
    losses = cross_entropy(empty, torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,)
    logits, _ = drawn()
    losses = cross_entropy(logits, torch.full((T,), 3), ignore=3, label_smoothing=0.1)
    losses.sum().backward()
    assert losses.eq(0).all()
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match=r"from 0 to 1; found 1\.5"):
        Loss(3, label_smoothing=1.5)
    with pytest.raises(UsageError, match="at least 0; found nan"):
        Loss(3, z_loss=math.nan)


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
def test_shards_equal_the_whole(size: int) -> None:
    """Uneven shards; one of them has nothing but -inf for a token."""
    logits, labels = drawn()
    ranges = even_ranges(V, size)
    wide = logits.detach().clone()
    wide[1, ranges[0][0] : ranges[0][1]] = -math.inf
    labels[1] = V - 1
    wide.requires_grad_()
    expected = truth(wide, labels, 0.0, 0.1)
    (true_grad,) = torch.autograd.grad(expected.sum(), wide)
    finite = logits.detach().requires_grad_()
    smoothed = truth(finite, labels, 0.2, 0.1)
    (smoothed_grad,) = torch.autograd.grad(smoothed.sum(), finite)

    def rank(parallel: ParallelContext) -> dict[str, Tensor]:
        first, last = ranges[parallel.tp.index]
        out = {}
        for name, values, smoothing in (("plain", wide, 0.0), ("smoothed", finite, 0.2)):
            shard = values.detach()[:, first:last].clone().requires_grad_()
            losses = cross_entropy(
                shard,
                labels,
                parallel.tp,
                vocab_size=V,
                first_row=first,
                label_smoothing=smoothing,
                z_loss=0.1,
            )
            (grad,) = torch.autograd.grad(losses.sum(), shard)
            out |= {name: losses.detach(), f"{name} grad": grad}
        return out

    found = run_processes(rank, tp=size, timeout=20)
    for name, losses, grad in (("plain", expected, true_grad), ("smoothed", smoothed, smoothed_grad)):
        for each in found:
            torch.testing.assert_close(each[name], losses.detach(), rtol=1e-12, atol=1e-12)
        joined = torch.cat([each[f"{name} grad"] for each in found], dim=1)
        torch.testing.assert_close(joined, grad, rtol=1e-12, atol=1e-12)
