"""Tensors that start off 16 bytes, one at a time: a kernel that asks this of its rows and not of its weight reads the
weight 16 bytes at once all the same, which CUDA refuses and UndefinedBehaviorSanitizer sees.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .backends import Backend
from .calls import NAMES, called, calls


def _placed(tensor: Tensor, off: int) -> Tensor:
    """A copy that starts ``off`` elements after an address that 64 divides."""
    room = torch.empty(tensor.numel() + 64 + off, dtype=tensor.dtype, device=tensor.device)
    start = -room.data_ptr() % 64 // room.element_size() + off
    placed = room[start : start + tensor.numel()].view(tensor.shape)
    assert placed.data_ptr() % 64 == off * room.element_size()
    return placed.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_off_16_bytes(backend: Backend, name: str, dtype: torch.dtype) -> None:
    given = calls(backend.device, dtype)[name]

    def run(off: int | None) -> list[Tensor]:
        arguments = [_placed(a, int(i == off)) if isinstance(a, Tensor) else a for i, a in enumerate(given)]
        return called(backend.namespace, name, tuple(arguments))

    expected, tolerance = run(None), 2e-2 if dtype == torch.bfloat16 else 1e-5
    for i, argument in enumerate(given):
        if isinstance(argument, Tensor):
            for found, one in zip(run(i), expected, strict=True):
                torch.testing.assert_close(found, one, rtol=tolerance, atol=tolerance)
