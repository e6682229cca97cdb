"""Which documents repeat an earlier one, decided when all pieces are there.

Exact: equal text. Near: MinHash signatures (Broder 1997), compared where two of them share a band (locality-sensitive
hashing); documents whose signatures agree in the asked share of places are joined, and of each group the first in
reading order stays. So the outcome depends on the order of the inputs alone.

The signature is one-permutation hashing with optimal densification (Li, Owen and Zhang 2012; Shrivastava 2017): each
run of words is hashed once, whatever the length of the signature. It is our own NumPy code because signing a batch at a
time is several times faster than handing each word to a library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalm.data.cleaning.shingles import shingles
from megalm.data.mixing import mix_many

PLACES = 128
_NONE = np.uint32(0xFFFFFFFF)
_RECALL = 0.99
_PROBES = 64


def sign(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures: (documents, PLACES) uint32; all ones for a document without words."""
    hashes, owner = shingles(texts)
    signatures = np.full((len(texts), PLACES), _NONE, dtype=np.uint32)
    places = (hashes >> np.uint64(57)).astype(np.int64)
    values = (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    np.minimum.at(signatures.reshape(-1), owner * PLACES + places, np.minimum(values, _NONE - np.uint32(1)))
    return _densify(signatures)


def _densify(signatures: np.ndarray) -> np.ndarray:
    """Fill each empty place from another, chosen by a fixed random sequence of its own."""
    given = signatures.copy()
    rows, places = np.nonzero(signatures == _NONE)
    filled = (given != _NONE).any(axis=1)
    rows, places = rows[filled[rows]], places[filled[rows]]
    for probe in range(_PROBES + PLACES):
        if not len(rows):
            break
        if probe < _PROBES:
            source = mix_many((places * (_PROBES + PLACES) + probe).astype(np.uint64)) % np.uint64(PLACES)
            found = given[rows, source.astype(np.int64)]
        else:
            found = given[rows, (places + probe) % PLACES]
        signatures[rows, places] = found
        left = found == _NONE
        rows, places = rows[left], places[left]
    return signatures


def band_rows(similarity: float) -> int:
    """Places a band has, the most for which documents of that similarity meet in a band with probability 0.99."""
    for rows in range(PLACES // 2, 1, -1):
        if 1 - (1 - similarity**rows) ** (PLACES // rows) >= _RECALL:
            return rows
    return 1


def exact_repeats(hashes: np.ndarray) -> np.ndarray:
    """(documents,) bool, true where an earlier document has the same hash. ``hashes``: (documents, 2) uint64."""
    order = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    repeats = np.zeros(len(hashes), dtype=bool)
    repeats[order[1:]] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    return repeats


def near_repeats(signatures: np.ndarray, similarity: float, left_out: np.ndarray) -> np.ndarray:
    """(documents,) bool, true where a document is joined to an earlier one; those ``left_out`` take no part.

    ``signatures``: (documents, PLACES) uint32, may be memory-mapped. Memory: about 50 bytes a document.
    """
    rows = band_rows(similarity)
    parent = np.arange(len(signatures))
    alive = np.flatnonzero(~left_out)
    alive = alive[signatures[alive, 0] != _NONE]
    for first in range(0, PLACES - rows + 1, rows):
        keys = _band_keys(signatures, alive, first, rows)
        order = np.argsort(keys, kind="stable")
        keys, members = keys[order], alive[order]
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        if not len(again):
            continue
        heads = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        head_of = members[heads[np.searchsorted(heads, again, side="right") - 1]]
        before = members[again - 1]
        for earlier in (head_of, before):
            _join(parent, earlier, members[again], signatures, similarity)
    return np.fromiter((_root(parent, i) != i for i in range(len(parent))), bool, len(parent))


def _band_keys(signatures: np.ndarray, alive: np.ndarray, first: int, rows: int) -> np.ndarray:
    keys = np.zeros(len(alive), dtype=np.uint64)
    for place in range(first, first + rows):
        keys = mix_many(keys ^ signatures[alive, place].astype(np.uint64) + np.uint64(place))
    return keys


def _join(
    parent: np.ndarray, earlier: np.ndarray, later: np.ndarray, signatures: np.ndarray, similarity: float
) -> None:
    for start in range(0, len(later), 1 << 16):
        a, b = earlier[start : start + (1 << 16)], later[start : start + (1 << 16)]
        alike = (signatures[a] == signatures[b]).mean(axis=1) >= similarity
        for one, other in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
            low, high = sorted((_root(parent, one), _root(parent, other)))
            parent[high] = low


def _root(parent: np.ndarray, index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index
