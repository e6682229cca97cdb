"""Cross-entropy's two kernels against float64, on every backend, and the losses that are made of them."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops import cross_entropy as reference
from megalm.ops.cross_entropy import cross_entropy
from megalm.ops.linear_cross_entropy import linear_cross_entropy
from megalm.ops.native.cross_entropy import CrossEntropies

from .backends import DTYPES, TOLERANCE, Backend, check_registration, error

SHAPES = [(1, 1), (3, 8), (5, 33), (2, 1000), (7, 257), (40, 64), (2, 4099), (3, 9000)]


def _labels(backend: Backend, tokens: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Some are ignored."""
    labels = torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels[2::3] = -100
    return labels.to(backend.device)


def _check(
    backend: Backend,
    logits: Tensor,
    labels: Tensor,
    first_row: int = 0,
    *,
    total: bool = True,
    smooth: float = 0.01,
    confidence: float = 0.9,
) -> None:
    """Both kernels; ``logits`` are overwritten."""
    native = CrossEntropies(backend.namespace)
    tolerance = TOLERANCE[logits.dtype]
    wide = logits.detach().double().cpu()
    found = native.statistics(logits, labels, first_row, total=total)
    truth = reference.statistics(wide, labels.cpu(), first_row, total=total)
    # What is read is not rounded again, whatever the logits' dtype; a sum is compared with that of absolute values.
    for each in (reference.MAXIMUM, reference.TARGET, reference.SUM):
        assert error(found[each], truth[each]) <= 2e-6, each
    if total:
        slip = (found[reference.TOTAL].double().cpu() - truth[reference.TOTAL]).abs()
        assert (slip <= 1e-6 * wide.abs().sum(dim=-1)).all()
    assert total or found[reference.TOTAL].eq(0).all()
    scale = torch.rand(logits.shape[0], generator=torch.Generator().manual_seed(3)).to(backend.device)
    scale[1::4] = 0.0
    factor = scale * 0.7 / found[reference.SUM]
    options = {"smooth": smooth, "confidence": confidence}
    numbers = [found[reference.MAXIMUM], factor, scale]
    reference.gradient_(wide, labels.cpu(), first_row, *(x.double().cpu() for x in numbers), **options)
    native.gradient_(logits, labels, first_row, *numbers, **options)
    # Of values that may all be small beside 1.
    assert (logits.double().cpu() - wide).norm() <= tolerance * wide.norm() + 1e-12
    assert logits[1::4].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(backend: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = backend.draw(*shape, dtype=dtype, seed=1, scale=2.0).detach()
    _check(backend, logits.clone(), _labels(backend, *shape))
    _check(backend, logits, _labels(backend, *shape), total=False, smooth=0.0, confidence=1.0)


def test_a_part_of_the_vocabulary(backend: Backend) -> None:
    """Labels before, in and after it."""
    logits = backend.draw(9, 100, dtype=torch.float32, seed=1).detach()
    labels = torch.tensor([0, 699, 700, 701, 799, 800, 5000, -100, 750], device=backend.device)
    _check(backend, logits, labels, 700)


def test_drawn_shapes(backend: Backend, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    for _ in range(200 if full else 12):
        tokens, rows, first = draw.randint(1, 20), draw.randint(1, 3000), draw.choice([0, draw.randint(1, 3000)])
        dtype, scale, shift = draw.choice(DTYPES), draw.choice([0.1, 3.0, 30.0]), draw.choice([0.0, -50.0, 50.0])
        # Rows that start anywhere, as those of a part of wider logits do.
        before, after = draw.randint(0, 9), draw.randint(0, 9)
        whole = backend.draw(tokens, before + rows + after, dtype=dtype, seed=draw.randint(0, 999), scale=scale)
        logits = (whole.detach() + shift)[:, before : before + rows]
        labels = _labels(backend, tokens, first + rows + 10, seed=draw.randint(0, 999))
        _check(backend, logits, labels, first)


def test_what_lies_beside_the_logits_stays(backend: Backend) -> None:
    whole = torch.full((4, 61), 7.0, device=backend.device)
    numbers = torch.ones(4, device=backend.device)
    labels = torch.zeros(4, dtype=torch.int64, device=backend.device)
    CrossEntropies(backend.namespace).gradient_(
        whole[:, 3:50], labels, 0, numbers * 7, numbers, numbers, smooth=0.0, confidence=1.0
    )
    assert whole[:, :3].eq(7).all()
    assert whole[:, 50:].eq(7).all()
    assert whole[:, 3].eq(0).all()
    assert whole[:, 4:50].eq(1).all()


def test_no_tokens_no_rows(backend: Backend) -> None:
    native = CrossEntropies(backend.namespace)
    none = torch.zeros(0, dtype=torch.int64, device=backend.device)
    assert native.statistics(torch.zeros(0, 5, device=backend.device), none, 0, total=True).shape == (4, 0)
    labels = torch.tensor([3, -100], device=backend.device)
    logits = torch.zeros(2, 0, device=backend.device)
    found = native.statistics(logits, labels, 0, total=True)
    assert torch.equal(found.cpu(), reference.statistics(logits.cpu(), labels.cpu(), 0, total=True))
    ones = torch.ones(2, device=backend.device)
    native.gradient_(logits, labels, 0, ones, ones, ones, smooth=0.0, confidence=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(backend: Backend, dtype: torch.dtype) -> None:
    """A NaN or +inf spoils its token, -inf is a logit like others, and an ignored token's logits do not matter."""
    logits = backend.draw(7, 300, dtype=dtype, seed=1).detach()
    logits[0, 7], logits[1, 8], logits[2, 9], logits[2, 100:] = math.nan, math.inf, -math.inf, -math.inf
    logits[3] = -math.inf
    logits[4] = math.nan
    labels = torch.tensor([1, 1, 1, 1, -100, 299, 1], device=backend.device)
    logits.requires_grad_()
    kernels = CrossEntropies(backend.namespace).kernels()
    losses = cross_entropy(logits, labels, kernels=kernels)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    truth = F.cross_entropy(logits.detach().double(), labels, reduction="none")
    assert losses.isnan().tolist() == [True, True, False, True, False, False, False]
    good = [2, 4, 5, 6]
    assert error(losses[good], truth[good]) <= 2e-6
    assert torch.equal(grad.isnan().any(dim=1), losses.isnan())
    assert grad[4].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_equal_torch(backend: Backend, dtype: torch.dtype) -> None:
    logits = backend.draw(11, 777, dtype=dtype, seed=1, scale=4.0)
    labels = _labels(backend, 11, 777)
    weights = torch.rand(11, generator=torch.Generator().manual_seed(5)).to(backend.device)
    kernels = CrossEntropies(backend.namespace).kernels()
    wide = logits.detach().double().requires_grad_()
    for smoothing, z_loss in ((0.0, 0.0), (0.1, 1e-2)):
        losses = cross_entropy(logits, labels, label_smoothing=smoothing, z_loss=z_loss, kernels=kernels)
        truth = F.cross_entropy(wide, labels, reduction="none", label_smoothing=smoothing)
        truth = truth + z_loss * wide.logsumexp(-1).square() * (labels != -100)
        assert error(losses, truth) <= 2e-6
        (grad,) = torch.autograd.grad((losses * weights).sum(), logits)
        (true_grad,) = torch.autograd.grad((truth * weights).sum(), wide)
        assert (grad.double() - true_grad).norm() <= TOLERANCE[dtype] * true_grad.norm()


@pytest.mark.parametrize("rows", [None, 100], ids=["chunks of tokens", "chunks of rows"])
def test_on_a_linear_layer(backend: Backend, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.ops.linear_cross_entropy.CHUNK_BYTES", 6 * 203 * 4)
    monkeypatch.setattr("megalm.ops.linear_cross_entropy.FEWEST_TOKENS", 1 if rows is None else 1000)
    monkeypatch.setattr("megalm.ops.linear_cross_entropy.FEWEST_COLUMNS", rows)
    monkeypatch.setattr("megalm.ops.linear_cross_entropy.COLUMN_BYTES", 1)
    h, weight = (backend.draw(n, 16, dtype=torch.float32, seed=n) for n in (20, 203))
    bias = backend.draw(203, dtype=torch.float32, seed=3)
    leaves, wide = [h, weight, bias], [t.detach().double().requires_grad_() for t in (h, weight, bias)]
    labels = _labels(backend, 20, 203)
    kernels = CrossEntropies(backend.namespace).kernels()
    losses = linear_cross_entropy(
        h, weight, labels, vocab_size=203, bias_V=bias, label_smoothing=0.1, z_loss=0.01, kernels=kernels
    )
    logits = F.linear(*wide)
    truth = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    truth = truth + 0.01 * logits.logsumexp(-1).square() * (labels != -100)
    assert error(losses, truth) <= 2e-6
    for found, true in zip(
        torch.autograd.grad(losses.sum(), leaves), torch.autograd.grad(truth.sum(), wide), strict=True
    ):
        assert error(found, true) <= 2e-6


def test_same_bits_again(backend: Backend) -> None:
    logits = backend.draw(9, 5000, dtype=torch.bfloat16, seed=1).detach()
    labels = _labels(backend, 9, 5000)
    native = CrossEntropies(backend.namespace)
    threads = torch.get_num_threads()
    one = native.statistics(logits, labels, 0, total=True)
    try:
        torch.set_num_threads(2)
        assert torch.equal(one, native.statistics(logits, labels, 0, total=True))
    finally:
        torch.set_num_threads(threads)


def test_refuses_what_does_not_fit(backend: Backend) -> None:
    native = CrossEntropies(backend.namespace)
    logits = torch.zeros(3, 8, device=backend.device)
    labels = torch.zeros(3, dtype=torch.int64, device=backend.device)
    ones = torch.ones(3, device=backend.device)
    with pytest.raises(RuntimeError, match="one label for each token"):
        native.statistics(logits, labels[:2], 0, total=True)
    with pytest.raises(RuntimeError, match="labels must be int64"):
        native.statistics(logits, labels.int(), 0, total=True)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        native.statistics(logits.long(), labels, 0, total=True)
    with pytest.raises(RuntimeError, match="one for each token"):
        native.gradient_(logits, labels, 0, ones[:2], ones, ones, smooth=0.0, confidence=1.0)
    with pytest.raises(RuntimeError, match="must lie side by side"):
        native.gradient_(
            torch.zeros(8, 3, device=backend.device).t(), labels, 0, ones, ones, ones, smooth=0.0, confidence=1.0
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    ops = getattr(torch.ops, backend.namespace)
    logits = backend.draw(4, 40, dtype=dtype, seed=1).detach()
    labels = _labels(backend, 4, 40)
    check_registration(ops.cross_entropy_statistics, (logits, labels, 0, True))
    ones = torch.ones(4, device=backend.device)
    check_registration(ops.cross_entropy_gradient_, (logits, labels, 0, ones, ones, ones, 0.1, 0.9))
