"""dropout_add of csrc/: shapes, gradients, calls.

A mask is drawn again for backward, except on the processor, whose forward keeps it for one, in a bit for each feature:
there drawing takes several times as long as all the rest.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megalm.errors import UsageError
from megalm.ops.dropout import DropoutAddress, threshold_of
from megalm.ops.native.ops import Operations, registrar
from megalm.parallel import rng

OWN = "megalm"
"""The namespace whose operations keep masks on the processor; the emulator's are CUDA's, on the processor too."""


def register(namespace: str) -> None:
    """Shapes and gradients of the operations."""
    fake, gradient = registrar(namespace)
    ops = Operations(namespace)

    @fake("dropout_add")
    def _(
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        spans: Tensor,
        key_low: int,
        key_high: int,
        threshold: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        kept = x.new_empty((x.shape[0] if keep else 0, -(-x.shape[1] // 16) * 2), dtype=torch.uint8)
        return torch.empty_like(x, memory_format=torch.contiguous_format), kept

    @fake("dropout_add_backward")
    def _(
        dy: Tensor,
        kept: Tensor | None,
        spans: Tensor,
        key_low: int,
        key_high: int,
        threshold: int,
        with_bias: bool,
    ) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        return dx, dy.new_empty(dy.shape[1] if with_bias else 0)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, residual, bias, spans, *ctx.mask, kept = inputs
        ctx.added, ctx.biased = residual is not None, bias is not None
        ctx.set_materialize_grads(False)  # of the mask, which has none
        ctx.save_for_backward(spans, output[1] if kept else None)

    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        spans, kept = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        dx = dbias = None
        if dy is not None and (needs_x or needs_bias):
            dx, dbias = ops.dropout_add_backward(dy, kept, spans, *ctx.mask, ctx.biased and needs_bias)
        return (
            *(dx, dy if ctx.added else None, dbias if ctx.biased and needs_bias else None),
            *(None, None, None, None, None),
        )

    gradient("dropout_add", backward, keep)


def span_table(address: DropoutAddress, device: torch.device) -> Tensor:
    """The spans as the operations read them: int64 (spans, 5), first row, slot, view, position, step.

    All layers of a microbatch share one, so the last ones are kept: a copy to the device is made once.
    """
    found = _recent.get((address, device))
    if found is None:
        rows, row = [], 0
        for span in address.spans:
            rows.append((row, span.slot, span.view, span.start, address.step))
            row += span.stop - span.start
        found = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5).to(device)
        # What is made while torch traces or infers is of no use to others.
        if type(found) is torch.Tensor and not found.is_inference():
            _recent.put((address, device), found)
    return found


class _Recent:
    """The last few tables."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tables: dict[tuple[DropoutAddress, torch.device], Tensor] = {}

    def get(self, key: tuple[DropoutAddress, torch.device]) -> Tensor | None:
        return self._tables.get(key)

    def put(self, key: tuple[DropoutAddress, torch.device], table: Tensor) -> None:
        # Ranks may be threads of one process: a new dictionary takes the old one's place whole.
        kept = list(self._tables.items())[-(self._size - 1) :]
        self._tables = {**dict(kept), key: table}


_recent = _Recent(32)


@functools.lru_cache(maxsize=4096)
def signed_key(seed: int, site: str) -> tuple[int, int]:
    """The site's Philox key as two signed 64-bit integers, which is what an operation can be given."""
    low, high = (word - 2**64 if word >= 2**63 else word for word in rng.key(seed, "dropout", site))
    return low, high


class Dropouts:
    """The functions of megalm.ops.dropout through a namespace's operations."""

    def __init__(self, namespace: str) -> None:
        self._ops = Operations(namespace)
        self._keeps = namespace == OWN

    def dropout(self, x_TF: Tensor, p: float, address: DropoutAddress, site: str) -> Tensor:
        return x_TF if threshold_of(p) == 0 else self._call(x_TF, None, p, address, site, None)

    def dropout_add(
        self,
        x_TF: Tensor,
        residual_TF: Tensor,
        p: float,
        address: DropoutAddress,
        site: str,
        bias_F: Tensor | None = None,
    ) -> Tensor:
        return self._call(x_TF, residual_TF, p, address, site, bias_F)

    def _call(
        self,
        x: Tensor,
        residual: Tensor | None,
        p: float,
        address: DropoutAddress,
        site: str,
        bias: Tensor | None,
    ) -> Tensor:
        if x.dim() != 2 or x.shape[0] != address.tokens:
            raise UsageError(
                f"dropout {site!r}: expected ({address.tokens}, features), a row for each token of the address; "
                f"found {tuple(x.shape)}"
            )
        table = span_table(address, x.device)
        wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        keep = wanted and self._keeps and x.device.type == "cpu"
        out: Tensor = self._ops.dropout_add(
            x, residual, bias, table, *signed_key(address.seed, site), threshold_of(p), keep
        )[0]
        return out
