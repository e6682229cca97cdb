"""Which part a document belongs to: decided by its text alone.

So the split needs no seed, does not depend on the order of the inputs, stays when documents are added, and puts equal
documents on the same side, where they cannot leak from training into validation.
"""

from __future__ import annotations

import hashlib

import numpy as np

_SPAN = 1 << 64


class Split:
    """Sends a share of the documents to validation: those whose hash is below a limit."""

    def __init__(self, validation: float) -> None:
        self._limit = int(validation * _SPAN)
        self._lowest = _SPAN
        self._highest = -1

    @staticmethod
    def key(text: str) -> int:
        """64-bit hash of a document."""
        return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")

    def held_out(self, keys: np.ndarray) -> np.ndarray:
        """Which documents go to validation: (documents,) bool from (documents,) uint64."""
        if self._limit <= 0:
            return np.zeros(len(keys), dtype=bool)
        return np.asarray(keys <= np.uint64(self._limit - 1))

    def note_range(self, lowest: int, highest: int) -> None:
        """Remember the keys of documents that were kept, for :meth:`narrow`."""
        self._lowest = min(self._lowest, lowest)
        self._highest = max(self._highest, highest)

    @property
    def one_document(self) -> bool:
        """All documents noted are equal: two parts cannot both have one."""
        return self._lowest >= self._highest

    @property
    def one_sided(self) -> bool:
        """All documents noted are on the same side."""
        return self._lowest >= self._limit or self._highest < self._limit

    def narrow(self) -> None:
        """Move the limit, so that neither part is empty: validation gets at least the lowest hash, never the
        highest."""
        self._limit = min(max(self._limit, self._lowest + 1), self._highest)
