"""A keyed bijection on range(n): the order of an epoch's samples, computed one at a time.

A shuffled list of n samples costs memory on every rank and must be rebuilt on resume. A Feistel network costs
neither: it is a bijection on pairs of equally wide halves whatever its round function is. Where its domain is larger
than n, a value outside is sent through again until one falls inside ("cycle walking", Black and Rogaway 2002), which
keeps it a bijection and takes fewer than four turns on average, except for the smallest n. The frozen vectors in the
tests are part of the contract: another order would change what every resumed run sees.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from megalm.data.mixing import mix, mix_many
from megalm.native.helpers import helpers

_ROUNDS = 8
_LEAST_HALF_BITS = 3
_GREATEST_NATIVE_HALF_BITS = 31  # the helper computes in 64 bits


class Permutation:
    """A bijection on range(n), chosen by the key: any integers and strings, such as (seed, epoch, name)."""

    def __init__(self, n: int, *key: int | str) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} items")
        self.n = n
        self._half = max(_LEAST_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        text = json.dumps(key, separators=(",", ":")).encode("ascii")
        digest = hashlib.shake_256(b"megalm permutation\0" + text).digest(8 * _ROUNDS)
        self._key_bytes = digest
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __call__(self, index: int) -> int:
        """The image of ``index``; IndexError outside of range(n)."""
        if not 0 <= index < self.n:
            raise IndexError(f"item {index} of a permutation of {self.n}")
        native = helpers() if self._half <= _GREATEST_NATIVE_HALF_BITS else ""
        if isinstance(native, str):
            return self.reference(index)
        image: int = native.permuted(index, self.n, self._half, self._key_bytes)
        return image

    def reference(self, index: int) -> int:
        """The same in Python, for an index inside."""
        value = self._encipher(index)
        while value >= self.n:
            value = self._encipher(value)
        return value

    def many(self, indices: np.ndarray) -> np.ndarray:
        """The images of whole numbers, int64 (any length), at a fraction of the time each; IndexError outside of
        range(n)."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= self.n):
            raise IndexError(f"items from {indices.min()} to {indices.max()} of a permutation of {self.n}")
        values = self._encipher_many(indices.astype(np.uint64))
        outside = np.flatnonzero(values >= np.uint64(self.n))
        while outside.size:
            again = self._encipher_many(values[outside])
            values[outside] = again
            outside = outside[again >= np.uint64(self.n)]
        return values.astype(np.int64)

    def _encipher(self, value: int) -> int:
        left, right = value >> self._half, value & self._low
        for key in self._keys:
            left, right = right, left ^ (mix(right ^ key) >> (64 - self._half))
        return left << self._half | right

    def _encipher_many(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(self._half), values & np.uint64(self._low)
        for key in self._keys:
            left, right = right, left ^ (mix_many(right ^ np.uint64(key)) >> np.uint64(64 - self._half))
        return left << np.uint64(self._half) | right
