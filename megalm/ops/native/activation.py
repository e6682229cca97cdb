"""Gated and biased activations of csrc/: shapes, gradients, calls.

Backward computes the activation again from what the forward was given: nothing else is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.native.ops import Operations, registrar

KINDS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}
"""Numbered as csrc/include/activation.h numbers them."""


def register(namespace: str) -> None:
    """Shapes and gradients of the operations."""
    fake, gradient = registrar(namespace)
    ops = Operations(namespace)

    @fake("gated_activation")
    def _(x: Tensor, kind: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    @fake("gated_activation_backward")
    def _(dy: Tensor, x: Tensor, kind: int) -> Tensor:
        return _packed(x)

    @fake("bias_activation")
    def _(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
        return _packed(x)

    @fake("bias_activation_backward")
    def _(dy: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
        return _packed(x), x.new_empty(0 if bias is None else x.shape[-1])

    def keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.kind = inputs
        ctx.save_for_backward(x)

    def gated_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ops.gated_activation_backward(dy, x, ctx.kind), None

    gradient("gated_activation", gated_backward, keep_gated)

    def keep_biased(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.kind = inputs
        ctx.save_for_backward(x, bias)

    def biased_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        dx, dbias = ops.bias_activation_backward(dy, x, bias, ctx.kind)
        return dx, None if bias is None else dbias, None

    gradient("bias_activation", biased_backward, keep_biased)


def _packed(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Activations:
    """The functions of megalm.ops.activation through a namespace's operations."""

    def __init__(self, namespace: str) -> None:
        self._ops = Operations(namespace)

    def gated(self, x: Tensor, kind: str) -> Tensor:
        out: Tensor = self._ops.gated_activation(x, KINDS[kind])
        return out

    def bias_activation(self, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        out: Tensor = self._ops.bias_activation(x, bias, KINDS[kind])
        return out
