"""Randomness by address, not by stream.

Every draw is a function of what it is for (seed, purpose, name, step, slot, position, ...) and never of who draws it:
no microbatch, rank or worker number enters. So every layout, accumulation split and resume sees the same draws.

The generator is Philox4x64-10 with numpy's conventions (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): a 128-bit key, a 256-bit counter of four 64-bit words, 256 bits a block, the counter raised before each block.
The mapping from addresses to keys and counters is frozen by test vectors: changing it changes every run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading

import numpy as np

DRAWS_PER_BLOCK = 16
"""16-bit draws in one Philox block."""


def key(*address: int | str) -> tuple[int, int]:
    """The 128-bit Philox key of an address, as two unsigned 64-bit words (low, high)."""
    # Most addresses end with a count, and are otherwise those of the last call.
    counted = address and type(address[-1]) is int
    text = f"{_head(address[:-1])}{address[-1]}]" if counted else json.dumps(address)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@functools.lru_cache(maxsize=256)
def _head(address: tuple[int | str, ...]) -> str:
    """JSON of a list that begins like this and goes on."""
    return json.dumps(address)[:-1] + (", " if address else "")


def generator(*address: int | str) -> np.random.Generator:
    """A numpy generator of its own for one address, for draws whose number is not known beforehand."""
    return np.random.Generator(np.random.Philox(key=np.array(key(*address), dtype=np.uint64)))


class _Kept(threading.local):
    """A thread's generator for :func:`reused_generator`."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self.generator = np.random.Generator(self.bits)
        self.state = self.bits.state


_kept = _Kept()


def reused_generator(*address: int | str) -> np.random.Generator:
    """Draws what :func:`generator` draws, in a quarter of the time: the calling thread's one generator, set to the
    address. The next call sets it to another."""
    _kept.state["state"]["key"][:] = key(*address)
    _kept.bits.state = _kept.state
    return _kept.generator


def blocks(key_: tuple[int, int], first: int, count: int, words: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """``count`` consecutive Philox blocks: uint64 (count, 4).

    The counter of block b is (b + 1, *words): numpy raises the counter before it draws.
    """
    state = np.random.Philox(key=np.array(key_, dtype=np.uint64), counter=np.array((first, *words), dtype=np.uint64))
    return state.random_raw(4 * count).reshape(count, 4)


def normal(key_: tuple[int, int], start: int, stop: int) -> np.ndarray:
    """Standard normal values of the elements [start, stop) of a tensor: float64, by the Box-Muller transform.

    Elements 2k and 2k + 1 come from two 64-bit draws, so that any range can be drawn alone.
    """
    first, last = start // 4, -(-stop // 4)
    raw = blocks(key_, first, last - first).reshape(-1, 2)
    # 53-bit uniforms; the radius' lies in (0, 1], so that its logarithm is finite.
    u_radius = ((raw[:, 0] >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
    u_angle = (raw[:, 1] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(u_radius))
    values = np.empty((len(raw), 2))
    values[:, 0] = radius * np.cos(2.0 * np.pi * u_angle)
    values[:, 1] = radius * np.sin(2.0 * np.pi * u_angle)
    return values.reshape(-1)[start - 4 * first : stop - 4 * first]


def uniform(key_: tuple[int, int], count: int, words: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """``count`` uniform values in (0, 1): float64."""
    raw = blocks(key_, 0, -(-count // 4), words).reshape(-1)[:count]
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
