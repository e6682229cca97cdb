"""masked_softmax of csrc/: shapes, gradient, calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.native.ops import Operations, registrar


def register(namespace: str) -> None:
    """Shapes and gradients of the operations."""
    fake, gradient = registrar(namespace)
    ops = Operations(namespace)

    @fake("masked_softmax")
    def _(x: Tensor, mask: Tensor | None, scale: float, causal: bool, first_query: int) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @fake("masked_softmax_backward")
    def _(dy: Tensor, y: Tensor, scale: float) -> Tensor:
        return torch.empty_like(y, memory_format=torch.contiguous_format)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale = inputs[2]
        ctx.save_for_backward(output)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return ops.masked_softmax_backward(dy, y, ctx.scale), None, None, None, None

    gradient("masked_softmax", backward, keep)


class Softmaxes:
    """The function of megalm.ops.softmax through a namespace's operations."""

    def __init__(self, namespace: str) -> None:
        self._ops = Operations(namespace)

    def masked_softmax(
        self,
        x_BNQK: Tensor,
        mask_BK: Tensor | None = None,
        *,
        scale: float = 1.0,
        causal: bool = False,
        first_query: int = 0,
    ) -> Tensor:
        out: Tensor = self._ops.masked_softmax(x_BNQK, mask_BK, scale, causal, first_query)
        return out
