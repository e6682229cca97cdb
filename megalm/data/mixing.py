"""The 64-bit finaliser of SplitMix64 (Steele, Lea and Flood 2014): one to one, and every input bit reaches every output
bit. The order of samples and the hashes of near duplicates are made of it."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """Of a number below 2**64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def mix_many(x: np.ndarray) -> np.ndarray:
    """Of uint64 arrays, whose products wrap as the mask has them wrap."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    out: np.ndarray = x ^ x >> np.uint64(31)
    return out
