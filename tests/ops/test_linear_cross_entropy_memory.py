"""Memory of the chunked linear cross-entropy, from the storages that live while it runs on tensors of no device.

Sizes are those of real vocabularies, which nothing here computes with. Kernels that overwrite logits allocate nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megalm.ops.cross_entropy import CrossEntropyKernels
from megalm.ops.linear_cross_entropy import linear_cross_entropy

KERNELS = CrossEntropyKernels(
    statistics=lambda logits, *_, **__: logits.new_empty((4, logits.shape[0]), dtype=torch.float32),
    gradient_=lambda *_, **__: None,
)


class Living(TorchDispatchMode):
    """Bytes of storages that operations made, without those of ``given`` tensors."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in given}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def peak(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> int:
    """Of a forward and backward, gradients included."""
    h = torch.empty(tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(vocab, hidden, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Living(h, weight, labels) as living:
        loss(h, weight, labels).backward()
    assert living.now >= h.nbytes + weight.nbytes
    return living.peak


def chunked(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(h, weight, labels, vocab_size=weight.shape[0], kernels=KERNELS).sum()


def unfused(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight), labels, reduction="sum")


def test_a_quarter_of_a_million_rows_in_bfloat16() -> None:
    """Their gradients alone are 1.13 GiB, and a sum of chunks in float32 would be more."""
    assert peak(8192, 2304, 256_000, torch.bfloat16, chunked) <= 1.2 * 2**30


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.15), (torch.bfloat16, 0.17)], ids=str)
def test_share_of_what_whole_logits_take(dtype: torch.dtype, share: float) -> None:
    size = (8192, 768, 32_000, dtype)
    assert peak(*size, chunked) < share * peak(*size, unfused)
