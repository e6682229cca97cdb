"""The references of operations on lists of tensors, against torch's optimizers, norms and plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalm.ops.multi_tensor import adamw_, clip_factor, lamb_apply_, lamb_update_, scale_, sums_of_squares


def _list(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((3, 5), (7,), ())]


def test_sums_of_squares() -> None:
    tensors = [*_list(1), *_list(2, torch.bfloat16)]
    expected = torch.tensor([np.square(t.double().numpy()).sum() for t in tensors], dtype=torch.float64)
    torch.testing.assert_close(sums_of_squares(tensors), expected, rtol=1e-12, atol=0.0)
    assert sums_of_squares([]).shape == (0,)


@pytest.mark.parametrize("shape", [(30_000, 7), (3, 100_003), (70_000, 1, 3)])
def test_the_squares_of_a_large_tensor_are_summed_in_parts(shape: tuple[int, ...]) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    for each in (x, x.transpose(0, -1)):
        (found,) = sums_of_squares([each])
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(float(np.square(each.numpy().astype(np.float64)).sum()), rel=1e-13)


def test_clipping_is_torchs() -> None:
    for scale in (0.01, 100.0):
        gradients = [scale * g for g in _list(1)]
        weights = [torch.zeros_like(g).requires_grad_() for g in gradients]
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(weights, 2.0)
        scale_(gradients, clip_factor(sums_of_squares(gradients).sum().sqrt(), 2.0), torch.zeros(()))
        for w, g in zip(weights, gradients, strict=True):
            torch.testing.assert_close(g, w.grad, rtol=1e-6, atol=0.0)


def test_scale_marks_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        found_inf = torch.zeros(())
        scale_(_list(1), torch.tensor(2.0), found_inf)
        assert found_inf.item() == 0.0
        scale_([*_list(1), torch.tensor([1.0, bad]), *_list(2)], torch.tensor(2.0), found_inf)
        assert found_inf.item() == 1.0


def test_adamw_is_torchs() -> None:
    weights = _list(1)
    theirs = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    for number in range(1, 6):
        gradients = _list(10 + number)
        for w, g in zip(theirs, gradients, strict=True):
            w.grad = 0.5 * g
        optimizer.step()
        adamw_(
            *(weights, gradients, first, second, copies),
            step=torch.tensor(number),
            lr=0.02,
            betas=(0.8, 0.95),
            eps=1e-6,
            weight_decay=0.1,
            factor=torch.tensor(0.5),
        )
        for w, truth, copy in zip(weights, theirs, copies, strict=True):
            torch.testing.assert_close(w, truth.detach(), rtol=1e-12, atol=1e-14)
            assert torch.equal(copy, w.bfloat16())


def test_lamb_is_its_formula() -> None:
    weights, gradients = _list(1), _list(2)
    weights[1].zero_()
    first, second = _list(3), [t.square() for t in _list(4)]
    before = [[t.clone() for t in group] for group in (weights, first, second)]
    updates = [torch.empty_like(w) for w in weights]
    settings = {"step": torch.tensor(4), "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    sums = lamb_update_(weights, gradients, first, second, updates, **settings)
    lamb_apply_(weights, updates, [], sums, lr=0.03)
    for w, g, (w0, m0, v0) in zip(weights, gradients, zip(*before, strict=True), strict=True):
        m, v = 0.9 * m0 + 0.1 * g, 0.99 * v0 + 0.01 * g * g
        u = (m / (1 - 0.9**4)) / ((v / (1 - 0.99**4)).sqrt() + 1e-6) + 0.1 * w0
        ratio = w0.norm() / u.norm() if w0.norm() > 0 else 1.0
        torch.testing.assert_close(w, w0 - 0.03 * ratio * u, rtol=1e-10, atol=1e-12)


def test_found_inf_keeps_everything() -> None:
    state = [_list(seed) for seed in range(1, 5)]
    before = [[t.clone() for t in group] for group in state]
    weights, gradients, first, second = state
    settings = {"step": torch.tensor(1), "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    stop = torch.ones(())
    adamw_(weights, gradients, first, second, [], lr=0.1, found_inf=stop, **settings)
    updates = [torch.ones_like(w) for w in weights]
    sums = lamb_update_(weights, gradients, first, second, updates, found_inf=stop, **settings)
    lamb_apply_(weights, updates, [], sums, lr=0.1, found_inf=stop)
    assert torch.equal(sums, torch.zeros(2, 3, dtype=torch.float64))
    for group, old in zip(state, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, old, strict=True))
