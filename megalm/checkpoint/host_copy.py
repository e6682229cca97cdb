"""A rank's share of the training state, copied to host memory so that training can go on while it is written.

The copy is all that a step waits for. Its memory is taken once, touched by a thread before it is first needed (the
first touch of a page costs more than copying it), pinned where it receives from a GPU, and used again for every
checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

_ALIGNMENT = 64


class HostCopy:
    """Memory on the host for ``size`` bytes of tensors and their alignment."""

    def __init__(self, size: int, tensors: int, device: torch.device) -> None:
        self._size = size + tensors * _ALIGNMENT
        self._device = device
        self._memory: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._allocate, name="megalm-host-memory", daemon=True)
        self._thread.start()

    def _allocate(self) -> None:
        try:
            if self._device.type == "cuda":
                with torch.cuda.device(self._device):
                    self._memory = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
            else:
                self._memory = torch.zeros(self._size, dtype=torch.uint8).fill_(1)
        except BaseException as error:
            self._error = error

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the tensors, contiguous, under the same names; valid until the next call.

        Raises what taking the memory raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._memory is not None
        out, start = {}, 0
        for name, tensor in tensors.items():
            count = tensor.numel() * tensor.element_size()
            place = self._memory[start : start + count].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor, non_blocking=True)
            out[name] = place
            start += -(-count // _ALIGNMENT) * _ALIGNMENT
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return out
