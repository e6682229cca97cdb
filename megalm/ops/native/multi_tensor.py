"""The operations of csrc/ on lists of tensors: shapes and calls. They have no gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm.ops.native.ops import Operations, registrar


def register(namespace: str) -> None:
    """Shapes of the operations."""
    fake, _ = registrar(namespace)

    @fake("multi_sums_of_squares")
    def sums_of_squares(tensors: list[Tensor]) -> Tensor:
        return tensors[0].new_empty(len(tensors), dtype=torch.float64)

    @fake("multi_scale_")
    def scale(tensors: list[Tensor], factor: Tensor, found_inf: Tensor) -> None:
        return None

    @fake("multi_adamw_")
    def adamw(
        weights: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        copies: list[Tensor],
        step: Tensor,
        factor: Tensor | None,
        found_inf: Tensor | None,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        return None

    @fake("multi_lamb_update_")
    def lamb_update(
        weights: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        updates: list[Tensor],
        step: Tensor,
        factor: Tensor | None,
        found_inf: Tensor | None,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> Tensor:
        return weights[0].new_empty((2, len(weights)), dtype=torch.float64)

    @fake("multi_lamb_apply_")
    def lamb_apply(
        weights: list[Tensor],
        updates: list[Tensor],
        copies: list[Tensor],
        sums: Tensor,
        found_inf: Tensor | None,
        lr: float,
    ) -> None:
        return None


class MultiTensor:
    """The functions of megalm.ops.multi_tensor through a namespace's operations."""

    def __init__(self, namespace: str) -> None:
        self._ops = Operations(namespace)

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros(0, dtype=torch.float64)
        out: Tensor = self._ops.multi_sums_of_squares(tensors)
        return out

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor, found_inf: Tensor) -> None:
        if tensors:
            self._ops.multi_scale_(tensors, factor, found_inf)

    def adamw_(
        self,
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
        if weights:
            self._ops.multi_adamw_(
                *(weights, gradients, first, second, copies, step, factor, found_inf),
                *(lr, *betas, eps, weight_decay),
            )

    def lamb_update_(
        self,
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
        out: Tensor = self._ops.multi_lamb_update_(
            *(weights, gradients, first, second, updates, step, factor, found_inf), *(*betas, eps, weight_decay)
        )
        return out

    def lamb_apply_(
        self,
        weights: Sequence[Tensor],
        updates: Sequence[Tensor],
        copies: Sequence[Tensor],
        sums: Tensor,
        *,
        lr: float,
        found_inf: Tensor | None = None,
    ) -> None:
        self._ops.multi_lamb_apply_(weights, updates, copies, sums, found_inf, lr)
