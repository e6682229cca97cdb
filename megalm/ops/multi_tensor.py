"""Norms, scaling and optimizer steps of lists of tensors, without a word from the device to the host: the references.

Whether a step happens at all (``found_inf``), by how much gradients are scaled (``factor``) and the number of the step
are tensors, so that loss scaling and clipping need no synchronisation. Kernels hold masters and moments in float32;
the references take any floating dtype, computing in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor: float64 (n,). A list of several dtypes is fine; the sum's order depends on sizes alone."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([_squares(t) for t in tensors])


_CACHED_ELEMENTS = 1 << 15


def _squares(t: Tensor) -> Tensor:
    """The sum of one. A CPU makes a copy of all of ``t`` in float64, which is six times slower than one of a few rows
    at a time, that stays in the cache."""
    parts: tuple[Tensor, ...] = (t,)
    if t.device.type == "cpu" and t.dtype != torch.float64 and t.dim() > 1 and t.numel() >= 2 * _CACHED_ELEMENTS:
        parts = t.split(max(1, _CACHED_ELEMENTS * len(t) // t.numel()))
    sums = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts])
    return sums.sum()


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of a norm are multiplied by, so that it becomes at most ``limit``: float32, 0-d, on its device.

    A norm that is not finite gives one too, and ``found_inf`` is what keeps the step from happening.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0).float().reshape(())


def scale_(tensors: Sequence[Tensor], factor: Tensor, found_inf: Tensor) -> None:
    """Multiply by ``factor`` (float32, one element) in place; ``found_inf`` (likewise) becomes 1 if a value was NaN or
    infinite before, and is left alone otherwise.
    """
    for t in tensors:
        found_inf.masked_fill_(~t.isfinite().all(), 1.0)
        t.copy_(_wide(t) * factor.to(_wide(t).dtype).reshape(()))


def adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) in place: weights, their first and second moments, and, where
    ``copies`` is not empty, rounded copies of the new weights.

    ``step`` is int64, 1 at the first; ``factor`` multiplies gradients; nothing changes where ``found_inf`` is not 0.
    """
    for i, (w, m, v) in enumerate(zip(weights, first, second, strict=True)):
        new_m, new_v, direction = _adam(gradients[i], m, v, step, betas, eps, factor)
        correction = _corrections(step, betas, w)[0]
        new_w = w * (1 - lr * weight_decay) - lr * direction / correction
        _replace(((m, new_m), (v, new_v), (w, new_w)), found_inf)
        if copies:
            _replace(((copies[i], new_w),), found_inf)


def lamb_update_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """LAMB's first stage (You et al., 2020): moments in place, each weight's update into ``updates``, and the sums of
    squares of weights and of updates: float64 (2, n), for a caller to add up over the ranks that share a tensor.
    """
    sums = []
    for w, g, m, v, u in zip(weights, gradients, first, second, updates, strict=True):
        new_m, new_v, direction = _adam(g, m, v, step, betas, eps, factor)
        new_u = direction / _corrections(step, betas, w)[0] + weight_decay * w
        _replace(((m, new_m), (v, new_v), (u, new_u)), found_inf)
        sums.append(sums_of_squares([w, new_u]))
    total = torch.stack(sums, dim=1)
    return total if found_inf is None else torch.where(found_inf.reshape(()) != 0, torch.zeros_like(total), total)


def lamb_apply_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    copies: Sequence[Tensor],
    sums: Tensor,
    *,
    lr: float,
    found_inf: Tensor | None = None,
) -> None:
    """LAMB's second stage: weights less ``lr`` * |weight| / |update| * update, by the sums of :func:`lamb_update_`.

    Where one of the sums is 0 the ratio is 1: so a caller excludes a tensor from it.
    """
    for i, (w, u) in enumerate(zip(weights, updates, strict=True)):
        of_weight, of_update = sums[0, i], sums[1, i]
        ratio = torch.where((of_weight > 0) & (of_update > 0), (of_weight / of_update).sqrt(), 1.0)
        new_w = w - (lr * ratio).to(w.dtype) * u
        _replace(((w, new_w),), found_inf)
        if copies:
            _replace(((copies[i], new_w),), found_inf)


def _adam(
    g: Tensor, m: Tensor, v: Tensor, step: Tensor, betas: tuple[float, float], eps: float, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """New moments, and the direction before its bias correction."""
    g = g.to(m.dtype) if factor is None else g.to(m.dtype) * factor.to(m.dtype).reshape(())
    m = m + (g - m) * (1 - betas[0])
    v = v + (g * g - v) * (1 - betas[1])
    return m, v, m / (v.sqrt() / _corrections(step, betas, v)[1].sqrt() + eps)


def _corrections(step: Tensor, betas: tuple[float, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """1 - beta^step of both."""
    number = step.double().reshape(())
    return (1 - betas[0] ** number).to(like.dtype), (1 - betas[1] ** number).to(like.dtype)


def _replace(pairs: Sequence[tuple[Tensor, Tensor]], found_inf: Tensor | None) -> None:
    for old, new in pairs:
        value = new.to(old.dtype)
        old.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) != 0, old, value))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
