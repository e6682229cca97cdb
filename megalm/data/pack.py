"""Rows packed with whole documents, as far as they go in.

Packing a corpus best-fit needs every document's length and a table of the result. Here the corpus is cut into windows
of a fixed number of tokens, as many as fill a fixed number of rows, and each window is packed by itself: what a row
holds is a function of its number alone, so every layout and worker sees the same rows, and nothing is stored.

A window's documents go into its rows longest first, each where the least room is left over. What fits nowhere whole is
cut to fill the gaps. So each row is exactly full, every token is in exactly one row, there is no padding, and there are
as many rows as without packing; only the cuts are fewer. Documents longer than a row are cut into rows first. The
pieces of a document are apart from each other like different documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

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
    return _pack(_pieces(corpus, first * length, (first + count) * length, length), count, length)[row - first]


def _pieces(corpus: Corpus, start: int, stop: int, length: int) -> list[Piece]:
    """The documents of a window, cut at its ends and where they are longer than a row."""
    found = []
    document = corpus.document_at(start)
    while start < stop:
        _, end = corpus.document(document)
        last = min(end, stop)
        while start < last:
            cut = min(start + length, last)
            found.append(Piece(start, cut, cut == end))
            start = cut
        document += 1
    return found


def _pack(pieces: list[Piece], rows: int, length: int) -> list[list[Piece]]:
    """Best fit, longest first; then the rest, longest first, cut to fill the largest gaps."""
    packed: list[list[Piece]] = [[] for _ in range(rows)]
    gaps = [(length, row) for row in range(rows)]
    left = []
    for piece in sorted(pieces, key=lambda p: (p.start - p.stop, p.start)):
        size = piece.stop - piece.start
        at = bisect_left(gaps, (size, -1))
        if at == len(gaps):
            left.append(piece)
            continue
        gap, row = gaps.pop(at)
        packed[row].append(piece)
        if gap > size:
            insort(gaps, (gap - size, row))
    for piece in left:
        start = piece.start
        while start < piece.stop:
            gap, row = gaps.pop()
            cut = min(start + gap, piece.stop)
            packed[row].append(Piece(start, cut, piece.ends and cut == piece.stop))
            if gap > cut - start:
                insort(gaps, (gap - (cut - start), row))
            start = cut
    return packed
