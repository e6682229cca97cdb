"""rope of csrc/: shape, gradient, call. Its gradient is itself, turned back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.native.ops import Operations, registrar


def register(namespace: str) -> None:
    """Shape and gradient of the operation."""
    fake, gradient = registrar(namespace)
    ops = Operations(namespace)

    @fake("rope")
    def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin, positions)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dx = ops.rope(dy, cos, sin, positions, ctx.interleaved, not ctx.inverse)
        return dx, None, None, None, None, None

    gradient("rope", backward, keep, twice=True)


class Rope:
    """The function of megalm.ops.rope through a namespace's operation."""

    def __init__(self, namespace: str) -> None:
        self._ops = Operations(namespace)

    def rope(
        self,
        x_BSND: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        *,
        positions: Tensor | None = None,
        interleaved: bool = False,
    ) -> Tensor:
        out: Tensor = self._ops.rope(x_BSND, cos_SD, sin_SD, positions, interleaved, False)
        return out
