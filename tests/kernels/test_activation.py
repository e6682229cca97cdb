"""Gated and biased activations against float64, on every backend."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megalm.ops import activation as reference
from megalm.ops.native.activation import KINDS, Activations

from .backends import (
    DTYPES,
    TOLERANCE,
    Backend,
    check_against_float64,
    check_compiled,
    check_registration,
    on_threads,
)

SHAPES = [(1, 1), (3, 8), (2, 3, 136), (7, 1000), (2, 4096), (9, 33), (300, 64), (1, 20000), (5, 2056)]


def _compare_gated(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    x = backend.draw(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=1, scale=2.0)
    check_against_float64(
        lambda x: (Activations(backend.namespace).gated(x, kind),),
        lambda x: (reference.gated(x, kind),),
        [x],
        tolerance=TOLERANCE[dtype],
    )


def _compare_biased(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, kind: str, *, bias: bool) -> None:
    x = backend.draw(*shape, dtype=dtype, seed=1, scale=2.0)
    b = [backend.draw(shape[-1], dtype=dtype, seed=2)] if bias else []
    check_against_float64(
        lambda x, b=None: (Activations(backend.namespace).bias_activation(x, b, kind),),
        lambda x, b=None: (reference.bias_activation(x, b, kind),),
        [x, *b],
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in KINDS:
        _compare_gated(backend, shape, dtype, kind)
        _compare_biased(backend, shape, dtype, kind, bias=True)
        _compare_biased(backend, shape, dtype, kind, bias=False)


def test_drawn_shapes(backend: Backend, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    for _ in range(200 if full else 15):
        shape = (draw.randint(1, 150), draw.choice([draw.randint(1, 300), 8 * draw.randint(1, 300)]))
        kind, dtype = draw.choice(list(KINDS)), draw.choice(DTYPES)
        _compare_gated(backend, shape, dtype, kind)
        _compare_biased(backend, shape, dtype, kind, bias=draw.random() < 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_values_far_from_zero(backend: Backend, kind: str) -> None:
    """Each element has its own tolerance, absolute below 1: no large one hides the others."""
    x = torch.cat((torch.linspace(-40, 40, 20_001), torch.tensor([-1e4, 1e4, -3e18, 3e18, 0.0]))).to(backend.device)
    wide = x.double().requires_grad_()
    x.requires_grad_()
    found = Activations(backend.namespace).bias_activation(x, None, kind)
    truth = reference.bias_activation(wide, None, kind)
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=1e-6)
    (slope,), (true_slope,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(truth.sum(), wide)
    torch.testing.assert_close(slope.double(), true_slope, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_not_finite(backend: Backend, kind: str) -> None:
    """A bad value becomes what torch makes of it, and spoils no other."""
    native, bad = Activations(backend.namespace), torch.tensor([float("nan"), float("inf"), -float("inf")])
    for x in (torch.ones(200), torch.full((200,), -1.0)):
        x[5:8] = bad
        x = x.to(backend.device).requires_grad_()
        for run in (
            lambda module, x: module.bias_activation(x, None, kind),
            lambda module, x: module.gated(torch.cat((x, torch.ones_like(x))), kind),
            lambda module, x: module.gated(torch.cat((torch.ones_like(x), x)), kind),
        ):
            found, truth = run(native, x), run(reference, x.double())
            torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
            slopes = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (found, truth)]
            torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 16), (4, 0)], ids=str)
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    native = Activations(backend.namespace)
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    bias = torch.ones(shape[-1], device=backend.device, requires_grad=True)
    y = native.bias_activation(x, bias, "gelu")
    y.sum().backward()
    assert y.shape == shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))  # type: ignore[arg-type]
    z = native.gated(x, "silu")
    z.sum().backward()
    assert z.shape == (*shape[:-1], shape[-1] // 2)


def test_not_contiguous(backend: Backend) -> None:
    native = Activations(backend.namespace)
    x, bias = backend.draw(24, 6, dtype=torch.float32, seed=1), backend.draw(48, dtype=torch.float32, seed=2)
    check_against_float64(
        lambda x, b: (native.bias_activation(x.t(), b[::2], "gelu").t(), native.gated(x.t(), "silu").t()),
        lambda x, b: (reference.bias_activation(x.t(), b[::2], "gelu").t(), reference.gated(x.t(), "silu").t()),
        [x, bias],
        tolerance=2e-6,
    )


def test_not_aligned(backend: Backend) -> None:
    """What starts off 16 bytes is read in another way."""
    native = Activations(backend.namespace)
    x, bias = backend.draw(4 * 64 + 1, dtype=torch.float32, seed=1), backend.draw(65, dtype=torch.float32, seed=2)
    check_against_float64(
        lambda x, b: (native.bias_activation(x[1:].view(4, 64), b[1:], "silu"), native.gated(x[1:], "gelu")),
        lambda x, b: (reference.bias_activation(x[1:].view(4, 64), b[1:], "silu"), reference.gated(x[1:], "gelu")),
        [x, bias],
        tolerance=2e-6,
    )


def test_same_bits_again(backend: Backend) -> None:
    """On any number of threads."""
    native = Activations(backend.namespace)
    x, bias = backend.draw(200, 256, dtype=torch.float32, seed=1), backend.draw(256, dtype=torch.float32, seed=2)

    def run() -> tuple[Tensor, ...]:
        y = native.gated(native.bias_activation(x, bias, "gelu"), "silu")
        return (y, *torch.autograd.grad(y.square().sum(), [x, bias]))

    assert all(torch.equal(a, b) for a, b in zip(on_threads(1, run), on_threads(2, run), strict=True))


def test_the_gradient_of_a_bias_is_not_rounded_on_the_way(backend: Backend) -> None:
    """In bfloat16 a sum of 5000 ones would stop at 256."""
    x = torch.ones(5000, 8, device=backend.device, dtype=torch.bfloat16)
    bias = torch.zeros(8, device=backend.device, dtype=torch.bfloat16, requires_grad=True)
    Activations(backend.namespace).bias_activation(x, bias, "relu").sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 5000.0))  # type: ignore[arg-type]


def test_refuses_what_does_not_fit(backend: Backend) -> None:
    native = Activations(backend.namespace)
    x = torch.ones(2, 8, device=backend.device)
    with pytest.raises(RuntimeError, match="two halves"):
        native.gated(x[:, :7], "silu")
    with pytest.raises(RuntimeError, match="the size of x's last dimension"):
        native.bias_activation(x, x[0, :7], "gelu")
    with pytest.raises(RuntimeError, match="one dtype"):
        native.bias_activation(x, x[0].bfloat16(), "gelu")
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        native.gated(x.double(), "silu")
    with pytest.raises(RuntimeError, match="no activation of number"):
        getattr(torch.ops, backend.namespace).gated_activation(x, 9)
    with pytest.raises(RuntimeError, match="the shape of its half"):
        getattr(torch.ops, backend.namespace).gated_activation_backward(x, x, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    ops = getattr(torch.ops, backend.namespace)
    x, bias = backend.draw(3, 4, 40, dtype=dtype, seed=1), backend.draw(40, dtype=dtype, seed=2)
    check_registration(ops.gated_activation, (x, 2))
    check_registration(ops.gated_activation, (x.transpose(0, 1), 0))
    check_registration(ops.bias_activation, (x, bias, 1))
    check_registration(ops.bias_activation, (x.transpose(0, 1), None, 3))
    plain, b = x.detach(), bias.detach()
    check_registration(ops.gated_activation_backward, (plain[..., :20], plain, 2))
    check_registration(ops.bias_activation_backward, (plain, plain, b, 0))
    check_registration(ops.bias_activation_backward, (plain, plain, None, 0))


def test_compiles_whole(backend: Backend) -> None:
    native = Activations(backend.namespace)
    x, bias = backend.draw(6, 64, dtype=torch.float32, seed=1), backend.draw(32, dtype=torch.float32, seed=2)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return native.bias_activation(native.gated(x * 2, "silu"), bias, "gelu").sin().sum()

    check_compiled(run, [x, bias])
