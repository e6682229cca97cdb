"""What a process owns and threads would share: random generators, and torch's per-thread settings.

The generators are exchanged at every change of turn. Every rank starts with those of the caller, as forked processes
would. Settings that torch keeps per thread (gradients on, autocast, default device) do not reach a new thread by
themselves, so they are read in the caller and made in each rank.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Generators:
    """States of the process-wide random generators."""

    python: Any
    numpy: Any
    torch_cpu: torch.Tensor
    torch_cuda: torch.Tensor | None

    @classmethod
    def save(cls, device: torch.device) -> Generators:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None:
            torch.cuda.set_rng_state(self.torch_cuda, device)


@dataclass(frozen=True)
class ThreadSettings:
    """torch's settings of the thread that starts the simulation."""

    gradients: bool
    autocast: dict[str, tuple[bool, torch.dtype]]
    default_device: torch.device
    device: torch.device

    @classmethod
    def read(cls, device: torch.device) -> ThreadSettings:
        kinds = {"cpu", device.type}
        autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
        return cls(torch.is_grad_enabled(), autocast, torch.get_default_device(), device)

    def apply(self) -> None:
        """Make them in a rank's thread."""
        # Backward on threads of autograd's own would communicate from a thread that is no rank.
        torch.autograd.set_multithreading_enabled(False)
        # OpenMP keeps a pool for each thread that calls it: one thread a rank, as for ranks that share a host.
        torch.set_num_threads(1)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.default_device.type != "cpu":
            torch.set_default_device(self.default_device)
        torch.set_grad_enabled(self.gradients)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_enabled(kind, enabled)
