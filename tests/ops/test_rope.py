"""Rotary positions are a multiplication by a complex number of modulus 1."""

from __future__ import annotations

import pytest
import torch

from megalm.ops.rope import rope, rope_angles

B, S, N, D = 2, 7, 3, 8


def by_complex_numbers(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Feature i is the real part and feature i + D / 2 the imaginary one."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_equals_the_complex_product(theta: float) -> None:
    x = torch.randn(B, S, N, D, dtype=torch.float64)
    found = rope(x, *rope_angles(torch.arange(S), D, theta, x.dtype))
    torch.testing.assert_close(found, by_complex_numbers(x, theta), rtol=1e-13, atol=1e-13)


def test_long_positions_in_float32_stay_near_the_truth() -> None:
    x = torch.randn(1, 4096, 1, 64)
    found = rope(x, *rope_angles(torch.arange(4096), 64, 10000.0, x.dtype))
    # An angle of 4096 is known to 4096 * 2^-24 in float32, the same as in every float32 implementation.
    torch.testing.assert_close(found.double(), by_complex_numbers(x.double(), 10000.0), rtol=0, atol=3e-3)


def test_gradcheck() -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_angles(torch.arange(3), 4, 100.0, x.dtype)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,))


def test_a_view_is_rotated_as_its_copy() -> None:
    """Queries and keys are a slice of the fused projection."""
    whole = torch.randn(B, S, N + 2, D, dtype=torch.float64)
    cos, sin = rope_angles(torch.arange(S), D, 100.0, whole.dtype)
    assert torch.equal(rope(whole[:, :, :N], cos, sin), rope(whole[:, :, :N].clone(), cos, sin))


def test_scores_depend_on_the_distance_only() -> None:
    q, k = (torch.randn(1, 1, 1, D, dtype=torch.float64).expand(1, 20, 1, D) for _ in range(2))
    cos, sin = rope_angles(torch.arange(20), D, 100.0, q.dtype)
    scores = rope(q, cos, sin)[0, :, 0] @ rope(k, cos, sin)[0, :, 0].t()
    torch.testing.assert_close(scores[5, 2], scores[15, 12], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(scores[5, 2], scores[5, 3])


def test_angles_of_bfloat16_are_computed_in_float32() -> None:
    cos, _ = rope_angles(torch.tensor([1001]), 2, 1.0, torch.bfloat16)
    torch.testing.assert_close(cos, torch.tensor([[1001.0]]).cos().bfloat16())


def test_interleaved_pairs_are_complex_numbers() -> None:
    x = torch.randn(B, S, N, D, dtype=torch.float64)
    cos, sin = rope_angles(torch.arange(S), D, 100.0, x.dtype)
    turned = torch.view_as_complex(x.view(B, S, N, D // 2, 2)) * torch.complex(cos, sin)[:, None]
    found = rope(x, cos, sin, interleaved=True)
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(-2), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_features_after_the_rotary_ones_are_copied(interleaved: bool) -> None:
    x = torch.randn(B, S, N, D + 3, dtype=torch.float64)
    cos, sin = rope_angles(torch.arange(S), D, 100.0, x.dtype)
    found = rope(x, cos, sin, interleaved=interleaved)
    assert torch.equal(found[..., D:], x[..., D:])
    assert torch.equal(found[..., :D], rope(x[..., :D], cos, sin, interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_of_part_of_a_head(interleaved: bool) -> None:
    x = torch.randn(2, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_angles(torch.arange(9), 4, 100.0, x.dtype)
    positions = torch.tensor([[0, 8, 2], [3, 3, 1]])
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin, positions=positions, interleaved=interleaved), (x,))


def test_positions_name_rows_of_the_tables() -> None:
    x = torch.randn(B, 4, N, D, dtype=torch.float64)
    cos, sin = rope_angles(torch.arange(30), D, 100.0, x.dtype)
    one, each = torch.tensor([0, 1, 28, 29]), torch.tensor([[5, 4, 3, 2], [0, 0, 29, 7]])
    assert torch.equal(rope(x, cos, sin, positions=one), rope(x, cos[one], sin[one]))
    found = rope(x, cos, sin, positions=each)
    for b in range(B):
        assert torch.equal(found[b : b + 1], rope(x[b : b + 1], cos[each[b]], sin[each[b]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_angles", [False, True])
def test_16_bits_are_rounded_once(dtype: torch.dtype, wide_angles: bool) -> None:
    x = torch.randn(B, 64, N, D).to(dtype)
    cos, sin = rope_angles(torch.arange(64), D, 100.0, torch.float32 if wide_angles else dtype)
    found = rope(x, cos, sin)
    assert found.dtype == dtype
    assert (found != rope(x.double(), cos.double(), sin.double()).to(dtype)).double().mean() < 0.01
