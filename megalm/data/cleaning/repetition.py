"""How much of a document repeats itself: what marks menus, spam and text that a program went on writing.

Two measures after Rae et al. 2021 (Gopher, appendix A), of which the larger counts: the share of characters in lines
that repeat an earlier line, and the share of five-word runs that repeat an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalm.data.cleaning.shingles import shingles


def repetition(texts: Sequence[str]) -> list[float]:
    """Share of each document that repeats itself, in [0, 1)."""
    if not texts:
        return []
    hashes, owner = shingles(texts)
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    again = np.zeros(len(hashes), dtype=np.int64)
    again[1:] = (hashes[1:] == hashes[:-1]) & (owner[1:] == owner[:-1])
    total = np.bincount(owner, minlength=len(texts))
    repeats = np.bincount(owner, weights=again, minlength=len(texts)) / np.maximum(total, 1)
    return [max(float(share), _repeated_lines(text)) for text, share in zip(texts, repeats, strict=True)]


def _repeated_lines(text: str) -> float:
    seen: set[str] = set()
    repeated = whole = 0
    for line in text.split("\n"):
        line = line.strip()
        whole += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / whole if whole else 0.0
