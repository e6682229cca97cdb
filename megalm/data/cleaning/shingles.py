"""Documents as sets of hashed five-word runs, a batch at a time, without a Python object for any word.

A word is a run of letters and digits, in lower case; an ideograph, a kana or a letter of another script that is written
without spaces is a word of its own. So the measure ignores punctuation, case and line breaks, and works for Chinese.
A document of fewer than five words is one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from megalm.data.mixing import mix_many

WORDS = 5
_ALONE = (
    *((0x0E00, 0x0E7F), (0x0E80, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF)),
    *((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
)
"""Thai, Lao, Tibetan, Myanmar, Khmer, kana and ideographs."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


@cache
def _kinds() -> np.ndarray:
    """By code point below 0x10000: 0 separates words, 1 is part of one, 2 is one."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(1 << 16)), np.uint8, 1 << 16)
    for first, last in _ALONE:
        kinds[first : last + 1] *= 2
    return kinds


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, owner): 64-bit hash of each run of words, and the number of its document, in order; with repeats. A
    document without words has none."""
    lowered = [text.lower() for text in texts]
    ends = np.cumsum([len(text) for text in lowered])
    codes = np.frombuffer("".join(lowered).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds = np.where(codes < 1 << 16, _kinds()[np.minimum(codes, 0xFFFF)], 2).astype(np.uint8)
    starts = kinds == 2
    starts[1:] |= (kinds[1:] == 1) & (kinds[:-1] != 1)
    if len(codes):
        starts[0] = kinds[0] > 0
        inner = ends[:-1][ends[:-1] < len(codes)]
        starts[inner] = kinds[inner] > 0
    inside = np.flatnonzero(kinds)
    if not len(inside):
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    first = np.flatnonzero(starts[inside])
    lengths = np.diff(first, append=len(inside))
    place = (np.arange(len(inside)) - np.repeat(first, lengths)).astype(np.uint64)
    words = mix_many(np.add.reduceat(mix_many(codes[inside].astype(np.uint64) + (place + np.uint64(1)) * _MIX), first))
    owner = np.searchsorted(ends, inside[first], side="right")
    return _runs(words, owner)


def _runs(words: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    runs = words.copy()
    whole = np.ones(len(words), dtype=bool)
    for step in range(1, WORDS):
        same = np.zeros(len(words), dtype=bool)
        same[:-step] = owner[step:] == owner[:-step]
        later = np.zeros_like(words)
        later[:-step] = words[step:]
        runs += np.where(same, later * np.uint64(2 * step + 1), np.uint64(0))
        whole &= same
    whole[0] = True
    whole[1:] |= owner[1:] != owner[:-1]
    return mix_many(runs)[whole], owner[whole]
