"""rms_norm and layer_norm against float64, on every backend."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megalm.ops import norm as reference
from megalm.ops.native.norm import Norms

from .backends import (
    DTYPES,
    TOLERANCE,
    Backend,
    check_against_float64,
    check_compiled,
    check_registration,
    on_threads,
)

SHAPES = [(1, 1), (3, 8), (2, 3, 136), (7, 1000), (2, 4096), (9, 33), (300, 64), (2, 8192), (5, 2056)]


def _rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """``total`` as the operation stores it, with the gradient of the exact one."""
    return total + (total.to(dtype).double() - total).detach()


def _compare(
    backend: Backend,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layer: bool,
    added: bool = False,
    bias: bool = False,
    offset: float = 0.0,
) -> None:
    norms, cols, eps = Norms(backend.namespace), shape[-1], 0.01
    x = backend.draw(*shape, dtype=dtype, seed=1, shift=0.5)
    residual = backend.draw(*shape, dtype=dtype, seed=2)
    weight, b = backend.draw(cols, dtype=dtype, seed=3), backend.draw(cols, dtype=dtype, seed=4)
    inputs = [x, weight, *([residual] if added else []), *([b] if bias else [])]

    def run(module: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, *rest = tensors
        residual = rest.pop(0) if added else None
        extra = (rest.pop(0) if bias else None,) if layer else ()
        name = "layer_norm" if layer else "rms_norm"
        if residual is None:
            return (getattr(module, name)(x, weight, *extra, eps, offset=offset),)
        if x.dtype == torch.float64:
            total = _rounded(x + residual, dtype)
            return getattr(module, name)(total, weight, *extra, eps, offset=offset), total
        return getattr(module, f"add_{name}")(x, residual, weight, *extra, eps, offset=offset)

    check_against_float64(
        lambda *t: run(norms, *t), lambda *t: run(reference, *t), inputs, tolerance=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_equals_float64(backend: Backend, layer: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _compare(backend, shape, dtype, layer=layer, bias=layer)
    _compare(backend, shape, dtype, layer=layer, added=True, offset=1.0)


def test_sums_beside_what_else_is_shared(backend: Backend) -> None:
    """The widest rows of which a block has several: their sums alone are all the shared memory that there is."""
    _compare(backend, (3, 6144), torch.bfloat16, layer=True, bias=True)


def test_row_of_more_than_a_block_holds(backend: Backend) -> None:
    _compare(backend, (2, 20000), torch.bfloat16, layer=True, added=True, bias=True)


def test_drawn_shapes(backend: Backend, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    for _ in range(200 if full else 12):
        shape = (draw.randint(1, 40), draw.choice([draw.randint(1, 300), 8 * draw.randint(1, 300)]))
        layer = draw.random() < 0.5
        bias, added, offset = layer and draw.random() < 0.5, draw.random() < 0.5, draw.choice([0.0, 1.0])
        _compare(backend, shape, draw.choice(DTYPES), layer=layer, added=added, bias=bias, offset=offset)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 16)], ids=str)
def test_no_rows(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    weight = torch.ones(shape[-1], device=backend.device, requires_grad=True)
    y = Norms(backend.namespace).rms_norm(x, weight, 1e-5)
    y.sum().backward()
    assert y.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


def test_not_contiguous(backend: Backend) -> None:
    x = backend.draw(24, 6, dtype=torch.float32, seed=1)
    weight = backend.draw(48, dtype=torch.float32, seed=2)
    check_against_float64(
        lambda x, w: (Norms(backend.namespace).rms_norm(x.t(), w[::2], 1e-5),),
        lambda x, w: (reference.rms_norm(x.t(), w[::2], 1e-5),),
        [x, weight],
        tolerance=2e-6,
    )


def test_not_aligned(backend: Backend) -> None:
    """A row that starts off 16 bytes is read in another way."""
    x, weight = backend.draw(4 * 64 + 1, dtype=torch.float32, seed=1), backend.draw(65, dtype=torch.float32, seed=2)
    check_against_float64(
        lambda x, w: (Norms(backend.namespace).rms_norm(x[1:].view(4, 64), w[1:], 1e-5),),
        lambda x, w: (reference.rms_norm(x[1:].view(4, 64), w[1:], 1e-5),),
        [x, weight],
        tolerance=2e-6,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(backend: Backend, bad: float) -> None:
    """A bad value spoils its own row and no other."""
    x = torch.ones(3, 200, device=backend.device)
    x[1, 7] = bad
    for layer in (False, True):
        norms = Norms(backend.namespace)
        weight = torch.ones(200, device=backend.device)
        y = norms.layer_norm(x, weight, None, 1e-5) if layer else norms.rms_norm(x, weight, 1e-5)
        assert y[1, 7].isnan()
        assert y[[0, 2]].isfinite().all()


def test_same_bits_again(backend: Backend) -> None:
    """On any number of threads."""
    x = backend.draw(200, 256, dtype=torch.float32, seed=1)
    weight, bias = backend.draw(256, dtype=torch.float32, seed=2), backend.draw(256, dtype=torch.float32, seed=3)

    def run() -> tuple[Tensor, ...]:
        y = Norms(backend.namespace).layer_norm(x, weight, bias, 1e-5)
        return (y, *torch.autograd.grad(y.square().sum(), [x, weight, bias]))

    first = run()
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, on_threads(threads, run), strict=True))


def test_refuses_what_does_not_fit(backend: Backend) -> None:
    norms = Norms(backend.namespace)
    x = torch.ones(2, 8, device=backend.device)
    with pytest.raises(RuntimeError, match="the size of x's last dimension"):
        norms.rms_norm(x, torch.ones(7, device=backend.device), 1e-5)
    with pytest.raises(RuntimeError, match="one dtype"):
        norms.rms_norm(x, torch.ones(8, device=backend.device, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        norms.rms_norm(x.double(), torch.ones(8, device=backend.device, dtype=torch.float64), 1e-5)
    with pytest.raises(RuntimeError, match="the shape and dtype of x"):
        norms.add_rms_norm(x, x[:1], torch.ones(8, device=backend.device), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    ops = getattr(torch.ops, backend.namespace)
    x, residual = backend.draw(3, 4, 40, dtype=dtype, seed=1), backend.draw(3, 4, 40, dtype=dtype, seed=2)
    weight, bias = backend.draw(40, dtype=dtype, seed=3), backend.draw(40, dtype=dtype, seed=4)
    for added in (None, residual):
        check_registration(ops.rms_norm, (x, weight, added, 1e-5, 1.0))
        check_registration(ops.layer_norm, (x, weight, bias, added, 1e-5, 0.0))
        turned = None if added is None else added.transpose(0, 1)
        check_registration(ops.layer_norm, (x.transpose(0, 1), weight, None, turned, 1e-5, 0.0))
    _, _, rstd = ops.rms_norm(x.detach(), weight.detach(), None, 1e-5, 0.0)
    plain = [t.detach() for t in (x, x, weight, rstd)]
    check_registration(ops.rms_norm_backward, (plain[0], None, *plain[1:], 0.0))
    check_registration(ops.layer_norm_backward, (plain[0], plain[0], *plain[1:], rstd, 0.0, True))


def test_compiles_whole(backend: Backend) -> None:
    norms = Norms(backend.namespace)
    x, weight = backend.draw(6, 64, dtype=torch.float32, seed=1), backend.draw(64, dtype=torch.float32, seed=2)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return norms.rms_norm(x * 2, weight, 1e-5).sin().sum()

    check_compiled(run, [x, weight])
