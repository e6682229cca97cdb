"""cross_entropy_statistics and cross_entropy_gradient_ of csrc/: shapes, calls.

They have no gradients of their own: megalm.ops.cross_entropy differentiates the loss that is made of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.ops import cross_entropy as reference
from megalm.ops.native.ops import Operations, registrar


def register(namespace: str) -> None:
    """Shapes of the operations."""
    fake, _gradient = registrar(namespace)

    @fake("cross_entropy_statistics")
    def _(logits: Tensor, labels: Tensor, first_row: int, total: bool) -> Tensor:
        return logits.new_empty((4, logits.shape[0]), dtype=torch.float32)

    @fake("cross_entropy_gradient_")
    def _(
        logits: Tensor,
        labels: Tensor,
        first_row: int,
        maximum: Tensor,
        factor: Tensor,
        scale: Tensor,
        smooth: float,
        confidence: float,
    ) -> None:
        return None


class CrossEntropies:
    """The kernels of megalm.ops.cross_entropy through a namespace's operations; float64 by the references."""

    def __init__(self, namespace: str) -> None:
        self._ops = Operations(namespace)

    def statistics(self, logits: Tensor, labels: Tensor, first_row: int, *, total: bool) -> Tensor:
        if logits.dtype == torch.float64:
            return reference.statistics(logits, labels, first_row, total=total)
        out: Tensor = self._ops.cross_entropy_statistics(logits, labels, first_row, total)
        return out

    def gradient_(
        self,
        logits: Tensor,
        labels: Tensor,
        first_row: int,
        maximum: Tensor,
        factor: Tensor,
        scale: Tensor,
        *,
        smooth: float,
        confidence: float,
    ) -> None:
        if logits.dtype == torch.float64:
            reference.gradient_(logits, labels, first_row, maximum, factor, scale, smooth=smooth, confidence=confidence)
            return
        self._ops.cross_entropy_gradient_(logits, labels, first_row, maximum, factor, scale, smooth, confidence)

    def kernels(self) -> reference.CrossEntropyKernels:
        """Both, as the losses take them."""
        return reference.CrossEntropyKernels(self.statistics, self.gradient_)
