"""rms_norm and layer_norm of csrc/: shapes, gradients, calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.ops.native.ops import Operations, registrar


def register(namespace: str) -> None:
    """Shapes and gradients of the operations."""
    fake, gradient = registrar(namespace)
    ops = Operations(namespace)

    @fake("rms_norm")
    def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float) -> tuple[Tensor, ...]:
        return _packed(x), _sum(x, residual), _row(x)

    @fake("rms_norm_backward")
    def _(
        dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float
    ) -> tuple[Tensor, ...]:
        return _packed(x), _packed(weight)

    @fake("layer_norm")
    def _(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, ...]:
        return _packed(x), _sum(x, residual), _row(x), _row(x)

    @fake("layer_norm_backward")
    def _(
        dy: Tensor,
        dsum: Tensor | None,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
        offset: float,
        with_bias: bool,
    ) -> tuple[Tensor, ...]:
        return _packed(x), _packed(weight), weight.new_empty(weight.shape[0] if with_bias else 0)

    def keep_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, residual, _, ctx.offset = inputs
        _, total, rstd = output
        ctx.added = residual is not None
        ctx.save_for_backward(total if ctx.added else x, weight, rstd)

    def rms_backward(ctx: Any, dy: Tensor, dsum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = ops.rms_norm_backward(dy, dsum if ctx.added else None, x, weight, rstd, ctx.offset)
        return dx, dweight, dx if ctx.added else None, None, None

    gradient("rms_norm", rms_backward, keep_rms)

    def keep_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, _, ctx.offset = inputs
        _, total, mean, rstd = output
        ctx.added, ctx.biased = residual is not None, bias is not None
        ctx.save_for_backward(total if ctx.added else x, weight, mean, rstd)

    def layer_backward(ctx: Any, dy: Tensor, dsum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = ops.layer_norm_backward(
            dy, dsum if ctx.added else None, x, weight, mean, rstd, ctx.offset, ctx.biased
        )
        return dx, dweight, dbias if ctx.biased else None, dx if ctx.added else None, None, None

    gradient("layer_norm", layer_backward, keep_layer)


def _packed(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(0) if residual is None else _packed(x)


def _row(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


class Norms:
    """The functions of megalm.ops.norm through a namespace's operations."""

    def __init__(self, namespace: str) -> None:
        self._ops = Operations(namespace)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
        out: Tensor = self._ops.rms_norm(x, weight, None, eps, offset)[0]
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        y, total, _ = self._ops.rms_norm(x, weight, residual, eps, offset)
        return y, total

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, offset: float = 0.0
    ) -> Tensor:
        out: Tensor = self._ops.layer_norm(x, weight, bias, None, eps, offset)[0]
        return out

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        y, total, _, _ = self._ops.layer_norm(x, weight, bias, residual, eps, offset)
        return y, total
