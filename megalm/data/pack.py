"""Rows packed with whole documents, as far as they go in.

Packing a corpus best-fit needs every document's length and a table of the result. Here the corpus is cut into windows
of a fixed number of tokens, as many as fill a fixed number of rows, and each window is packed by itself: what a row
holds is a function of its number alone, so every layout and worker sees the same rows, and nothing is stored.

A window's documents go into its rows longest first, each where the least room is left over. What fits nowhere whole is
cut to fill the gaps. So each row is exactly full, every token is in exactly one row, there is no padding, and there are
as many rows as without packing; only the cuts are fewer. Documents longer than a row are cut into rows first. The
pieces of a document are apart from each other like different documents.

Each row packs its window anew: rows come in an order that a key decides, so what was packed for one is of no use to
those that follow. A helper in C++ takes some ten microseconds for it, the reference in Python a hundred times that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise, starmap

import numpy as np

from megalm.native.helpers import helpers
from megalm.plugin.contract.objective import Corpus


@dataclass(frozen=True)
class Piece:
    """A part of one document in a row: the stream's tokens [start, stop)."""

    start: int
    stop: int
    ends: bool
    """It ends its document: the token at ``stop``, if there is one, is another document's."""


def packed_rows(corpus: Corpus, length: int) -> int:
    """Rows of ``length`` tokens that the corpus fills; less than a row's tokens at its end are left out."""
    return corpus.num_tokens // length


def packed_row(corpus: Corpus, row: int, length: int, window: int) -> list[Piece]:
    """The pieces of a row, ``length`` tokens together, in their order there.

    ``window``: rows that are packed together. IndexError outside of :func:`packed_rows`.
    """
    rows = packed_rows(corpus, length)
    if not 0 <= row < rows:
        raise IndexError(f"row {row} of {rows} packed rows")
    first = row - row % window
    count = min(window, rows - first)
    start, stop = first * length, (first + count) * length
    edges = corpus.document_offsets(corpus.document_at(start), corpus.document_at(stop - 1) + 2)
    edges[0] = start
    native = helpers()
    if isinstance(native, str):
        return packed_reference(edges, stop, row - first, count, length)
    return list(starmap(Piece, native.packed_row(edges, stop, row - first, count, length)))


def packed_reference(edges: np.ndarray, stop: int, wanted: int, rows: int, length: int) -> list[Piece]:
    """What row ``wanted`` of a window of ``rows`` rows holds, which ends at ``stop``. ``edges``, int64: its start, and
    where documents end, until one does at ``stop`` or after it."""
    return _row(_pieces(edges.tolist(), stop, length), wanted, rows, length)


def _pieces(edges: list[int], stop: int, length: int) -> list[tuple[int, int, bool]]:
    """The documents of a window, cut at its ends and where they are longer than a row, longest first: (start less
    stop, start, whether the document ends there)."""
    found = []
    for begin, end in pairwise(edges):
        last = min(end, stop)
        while begin < last:
            cut = min(begin + length, last)
            found.append((begin - cut, begin, cut == end))
            begin = cut
    found.sort()
    return found


def _row(pieces: list[tuple[int, int, bool]], wanted: int, rows: int, length: int) -> list[Piece]:
    """Best fit, longest first; then the rest, longest first, cut to fill the largest gaps. What one row gets of it.

    A gap is one number, its size times ``rows`` and its row: this is the inner loop of packed training.
    """
    packed: list[Piece] = []
    gaps = [length * rows + row for row in range(rows)]
    left = []
    for negative, start, ends in pieces:
        size = -negative
        at = bisect_left(gaps, size * rows)
        if at == len(gaps):
            left.append((start, start + size, ends))
            continue
        gap, row = divmod(gaps.pop(at), rows)
        if row == wanted:
            packed.append(Piece(start, start + size, ends))
        if gap > size:
            insort(gaps, (gap - size) * rows + row)
    for start, stop, ends in left:
        while start < stop:
            gap, row = divmod(gaps.pop(), rows)
            cut = min(start + gap, stop)
            if row == wanted:
                packed.append(Piece(start, cut, ends and cut == stop))
            if gap > cut - start:
                insort(gaps, (gap - (cut - start)) * rows + row)
            start = cut
    return packed
