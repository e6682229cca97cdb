"""Linear layers whose weight gradients may wait.

A pipeline's neighbour waits for the gradient of a stage's input, and nobody for those of its weights. Inside
``with later.collect():`` a linear layer's backward therefore computes only the former and leaves the latter to
:meth:`WeightGradients.compute`. Norms, embeddings and the vocabulary's head, which have no products to put off or whose
products serve both, are not put off. (Qi et al., "Zero Bubble Pipeline Parallelism", 2024.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F


class WeightGradients:
    """Gradients of weights that were put off, of one forward."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Linear layers that run inside put their weight gradients off."""
        token = _collecting.set(self)
        try:
            yield
        finally:
            _collecting.reset(token)

    def add(self, work: Callable[[], None]) -> None:
        """Put work off."""
        self._waiting.append(work)

    def compute(self) -> None:
        """Compute what was put off, in that order, and add it to the parameters' gradients."""
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            work()


_collecting: ContextVar[WeightGradients | None] = ContextVar("megalm_weight_gradients", default=None)


def computed_again_alike() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a forward and of its recomputation, as torch.utils.checkpoint takes them: what is computed again puts
    off what was put off before. On CUDA that happens in a thread of autograd's, which has no context of its own."""
    later = _collecting.get()
    return nullcontext(), nullcontext() if later is None else later.collect()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``: (..., in), (out, in) and (out) to (..., out)."""
    later = _collecting.get()
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if later is None or not trains or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    out: torch.Tensor = _Later.apply(x, weight, bias, later)
    return out


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, later: WeightGradients
    ) -> torch.Tensor:
        # Of what is saved, recomputation gives back copies; the gradient has to reach the parameters themselves.
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.later = weight, bias, later
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        _, weight_moves, bias_moves, _ = ctx.needs_input_grad
        weight, bias = ctx.weight, ctx.bias
        ctx.weight = ctx.bias = None

        def compute() -> None:
            rows = grad.reshape(-1, grad.shape[-1])
            if weight_moves:
                torch.autograd.backward(weight, rows.t() @ x.reshape(-1, x.shape[-1]))
            if bias_moves:
                torch.autograd.backward(bias, rows.sum(dim=0))

        ctx.later.add(compute)
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None
