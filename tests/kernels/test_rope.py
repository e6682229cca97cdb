"""rope against float64, on every backend."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megalm.ops import rope as reference
from megalm.ops.native.rope import Rope

from .backends import DTYPES, TOLERANCE, Backend, check_against_float64, check_compiled, check_registration

# (batch, seq, heads, head_dim), rotary_dim
SHAPES = [
    ((1, 1, 1, 2), 2),
    ((2, 3, 5, 64), 64),
    ((2, 5, 4, 32), 16),
    ((1, 7, 9, 128), 128),
    ((2, 3, 3, 10), 6),
    ((2, 3, 3, 11), 4),
    ((1, 2, 6, 80), 48),
    ((1, 300, 1, 16), 16),
    ((2, 2, 2, 24), 0),
]


def _angles(backend: Backend, rows: int, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if rotary_dim == 0:
        return (torch.empty(rows, 0, dtype=dtype, device=backend.device),) * 2
    cos, sin = reference.rope_angles(torch.arange(rows) * 3 + 1, rotary_dim, 100.0, dtype)
    return cos.to(backend.device), sin.to(backend.device)


def _compare(
    backend: Backend,
    shape: tuple[int, ...],
    rotary_dim: int,
    dtype: torch.dtype,
    *,
    interleaved: bool,
    angles: torch.dtype = torch.float32,
    positions: Tensor | None = None,
    extra: int = 0,
) -> None:
    """``extra`` heads lie between those that are turned, as keys' and values' do in a fused projection."""
    batch, seq, heads, head_dim = shape
    x = backend.draw(batch, seq, heads + extra, head_dim, dtype=dtype, seed=1)
    rows = seq if positions is None else int(positions.max()) + 1
    cos, sin = _angles(backend, rows, rotary_dim, angles)
    at = None if positions is None else positions.to(backend.device)
    native = Rope(backend.namespace)
    check_against_float64(
        lambda x: (native.rope(x[:, :, :heads], cos, sin, positions=at, interleaved=interleaved),),
        lambda x: (
            reference.rope(
                x[:, :, :heads], cos.cpu().double(), sin.cpu().double(), positions=positions, interleaved=interleaved
            ),
        ),
        [x],
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rotary_dim"), SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_equals_float64(
    backend: Backend, shape: tuple[int, ...], rotary_dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    _compare(backend, shape, rotary_dim, dtype, interleaved=interleaved)
    _compare(backend, shape, rotary_dim, dtype, interleaved=interleaved, angles=dtype, extra=2)


def test_drawn_shapes(backend: Backend, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    for _ in range(200 if full else 20):
        dtype, step = draw.choice(DTYPES), draw.choice([1, 2, 8, 16])
        head_dim = step * draw.randint(2, 9)
        rotary_dim = 2 * draw.randint(1, head_dim // 2) if draw.random() < 0.5 else head_dim // 2 * 2
        shape = (draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9), head_dim)
        positions = None
        if draw.random() < 0.5:
            size = shape[:2] if draw.random() < 0.5 else shape[1:2]
            positions = torch.randint(0, 30, size, generator=torch.Generator().manual_seed(draw.randrange(1000)))
        _compare(
            backend,
            shape,
            rotary_dim,
            dtype,
            interleaved=draw.random() < 0.5,
            angles=draw.choice([torch.float32, dtype]),
            positions=positions,
            extra=draw.choice([0, 0, 1, 3]),
        )


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_positions_are_rows_of_the_tables(backend: Backend, interleaved: bool) -> None:
    """A rank of context parallelism has positions that do not follow each other."""
    native = Rope(backend.namespace)
    x = backend.draw(2, 4, 3, 32, dtype=torch.float32, seed=1).detach()
    cos, sin = _angles(backend, 20, 32, torch.float32)
    for positions in (torch.tensor([0, 1, 18, 19]), torch.tensor([[5, 4, 3, 2], [0, 0, 19, 7]])):
        found = native.rope(x, cos, sin, positions=positions.to(backend.device), interleaved=interleaved)
        for b, row in enumerate(positions.expand(2, 4)):
            expected = native.rope(x[b : b + 1], cos[row], sin[row], interleaved=interleaved)
            assert torch.equal(found[b : b + 1], expected)


def test_any_strides(backend: Backend) -> None:
    """Gradients come transposed from attention; of the last dimension alone a copy is made."""
    native, (cos, sin) = Rope(backend.namespace), _angles(backend, 5, 16, torch.float32)
    x = backend.draw(2, 3, 5, 16, dtype=torch.float32, seed=1)
    one = backend.draw(1, 1, 1, 16, dtype=torch.float32, seed=2)
    swapped = backend.draw(16, 5, 3, 2, dtype=torch.float32, seed=3)
    views = (lambda t: t.transpose(1, 2), lambda t: t.expand(2, 5, 3, 16), lambda t: t.permute(3, 1, 2, 0))
    for view, tensor in zip(views, (x, one, swapped), strict=True):
        check_against_float64(
            lambda t, view=view: (native.rope(view(t), cos, sin).transpose(1, 2),),
            lambda t, view=view: (reference.rope(view(t), cos.cpu().double(), sin.cpu().double()).transpose(1, 2),),
            [tensor],
            tolerance=2e-6,
        )


@pytest.mark.parametrize("shift", [1, 4])
def test_not_aligned(backend: Backend, shift: int) -> None:
    """Heads, or angles, that start off 16 bytes are read in another way."""
    native = Rope(backend.namespace)
    x = backend.draw(2 * 3 * 2 * 32 + shift, dtype=torch.bfloat16, seed=1)
    table = torch.randn(2, 3 * 16 + shift, device=backend.device)
    cos, sin = (row[shift:].view(3, 16) for row in table)
    for interleaved in (False, True):
        check_against_float64(
            lambda x, i=interleaved: (native.rope(x[shift:].view(2, 3, 2, 32), cos, sin, interleaved=i),),
            lambda x, i=interleaved: (
                reference.rope(x[shift:].view(2, 3, 2, 32), cos.cpu().double(), sin.cpu().double(), interleaved=i),
            ),
            [x],
            tolerance=6e-3,
        )


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)], ids=str)
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    y = Rope(backend.namespace).rope(x, *_angles(backend, shape[1], 8, torch.float32))
    y.sum().backward()
    assert y.shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_not_finite(backend: Backend, bad: float, interleaved: bool) -> None:
    """A bad value spoils itself and its partner; one that is copied stays what it is."""
    x = torch.ones(1, 2, 2, 24, device=backend.device)
    x[0, 1, 0, 3] = x[0, 0, 1, 20] = bad
    y = Rope(backend.namespace).rope(x, *_angles(backend, 2, 16, torch.float32), interleaved=interleaved)
    wrong = torch.zeros(1, 2, 2, 24, dtype=torch.bool)
    wrong[0, 1, 0, 3] = wrong[0, 1, 0, 2 if interleaved else 11] = wrong[0, 0, 1, 20] = True
    assert torch.equal(~y.isfinite().cpu(), wrong)
    torch.testing.assert_close(y[0, 0, 1, 20], x[0, 0, 1, 20], equal_nan=True)


@pytest.mark.parametrize("dim", [24, 11])
def test_positions_outside_the_tables_give_nan(backend: Backend, dim: int) -> None:
    x = torch.ones(1, 4, 2, dim, device=backend.device)
    positions = torch.tensor([0, 5, -1, 4], device=backend.device)
    y = Rope(backend.namespace).rope(x, *_angles(backend, 5, 8, torch.float32), positions=positions)
    assert y[0, [1, 2]].isnan().all()
    assert y[0, [0, 3]].isfinite().all()


def test_refuses_what_does_not_fit(backend: Backend) -> None:
    native = Rope(backend.namespace)
    x = torch.ones(1, 3, 2, 8, device=backend.device)
    cos, sin = _angles(backend, 3, 8, torch.float32)
    with pytest.raises(RuntimeError, match="batch, seq, heads, head_dim"):
        native.rope(x[0], cos, sin)
    with pytest.raises(RuntimeError, match="of one dtype"):
        native.rope(x, cos, sin[:, :2])
    with pytest.raises(RuntimeError, match="float32 or have the dtype of x"):
        native.rope(x, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(RuntimeError, match="more features"):
        native.rope(x[..., :6], cos, sin)
    with pytest.raises(RuntimeError, match="a row for each position"):
        native.rope(x, cos[:2], sin[:2])
    with pytest.raises(RuntimeError, match="positions must be int64"):
        native.rope(x, cos, sin, positions=torch.zeros(2, dtype=torch.int64, device=backend.device))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        native.rope(x.double(), cos, sin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    rope = getattr(torch.ops, backend.namespace).rope
    x = backend.draw(2, 3, 4, 32, dtype=dtype, seed=1)
    cos, sin = _angles(backend, 3, 16, dtype)
    positions = torch.tensor([[0, 2, 1], [1, 1, 1]], device=backend.device)
    check_registration(rope, (x, cos, sin, None, False, False))
    check_registration(rope, (x[:, :, :2], cos.float(), sin.float(), positions, True, True))
    check_registration(rope, (x.transpose(1, 2)[:, :3], cos, sin, positions[0], False, False))


def test_compiles_whole(backend: Backend) -> None:
    native, (cos, sin) = Rope(backend.namespace), _angles(backend, 3, 16, torch.float32)
    x = backend.draw(2, 3, 4, 16, dtype=torch.float32, seed=1)
    check_compiled(lambda x: native.rope((x * 2)[:, :, :3], cos, sin, interleaved=True).sin().sum(), [x])
