"""Run with a library of emulated kernels: compares its norms with float64, and ends with status 3 where they differ."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megalm.ops.native import norm
from tests.kernels.backends import Backend
from tests.kernels.test_norm import _compare

SHAPES = [(3, 8), (64, 8), (7, 1000), (2, 4096), (9, 33), (3, 2056)]


def main() -> int:
    """0 where all is right."""
    torch.ops.load_library(sys.argv[1])
    norm.register("megalm_emu")
    backend = Backend("emulator", "megalm_emu", torch.device("cpu"))
    try:
        for shape in SHAPES:
            for layer in (False, True):
                _compare(backend, shape, torch.float32, layer=layer, bias=layer, added=not layer)
    except AssertionError as error:
        sys.stdout.write(f"differs: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
