"""Packed rows: every token once, rows full, documents whole wherever that is possible."""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import pytest

from megalm.data.pack import Piece, packed_reference, packed_row, packed_rows
from megalm.native.helpers import helpers


class Lengths:
    """A corpus of documents of given lengths, as far as packing looks at it."""

    def __init__(self, lengths: list[int]) -> None:
        self.bounds = [0, *accumulate(lengths)]
        self.num_tokens = self.bounds[-1]

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        return np.array(self.bounds[start:stop])

    def document_at(self, position: int) -> int:
        return bisect_right(self.bounds, position) - 1


def test_rows_hold_every_token_once(campaign_seed: int) -> None:
    r = random.Random(campaign_seed)
    for _ in range(60):
        length, window = r.randint(1, 40), r.randint(1, 9)
        longest = r.choice([3, length, 5 * length])
        corpus = Lengths([r.randint(1, longest) for _ in range(r.randint(1, 120))])
        count = packed_rows(corpus, length)  # type: ignore[arg-type]
        assert count == corpus.num_tokens // length
        seen: list[int] = []
        numbers = list(range(count))
        r.shuffle(numbers)
        for n in numbers:
            row = packed_row(corpus, n, length, window)  # type: ignore[arg-type]
            assert sum(piece.stop - piece.start for piece in row) == length
            for piece in row:
                document = corpus.document_at(piece.start)
                assert corpus.document_at(piece.stop - 1) == document
                assert piece.ends == (piece.stop == corpus.bounds[document + 1])
                assert n // window == piece.start // length // window, "from the row's own window"
                seen.extend(range(piece.start, piece.stop))
        assert sorted(seen) == list(range(count * length))
        with pytest.raises(IndexError):
            packed_row(corpus, count, length, window)  # type: ignore[arg-type]


def test_documents_that_fit_are_not_cut() -> None:
    """Best fit by hand: rows of 10, one window of 3."""
    corpus = Lengths([7, 6, 5, 5, 4, 3])
    rows = [packed_row(corpus, n, 10, 3) for n in range(3)]  # type: ignore[arg-type]
    assert sorted(sorted(p.stop - p.start for p in row) for row in rows) == [[3, 7], [4, 6], [5, 5]]
    assert all(piece.ends for row in rows for piece in row)


def test_fewer_cuts_than_the_stream(campaign_seed: int) -> None:
    r = random.Random(campaign_seed)
    corpus = Lengths([min(2000, max(1, int(r.lognormvariate(4, 1)))) for _ in range(3000)])
    length, count = 512, packed_rows(corpus, 512)  # type: ignore[arg-type]
    pieces = [p for n in range(count) for p in packed_row(corpus, n, length, 32)]  # type: ignore[arg-type]
    cuts = sum(not piece.ends for piece in pieces)
    in_stream = sum((n * length) not in set(corpus.bounds) for n in range(1, count))
    assert cuts < 0.55 * in_stream


@pytest.mark.skipif(isinstance(helpers(), str), reason=f"no helpers: {helpers()}")
def test_the_helper_equals_the_reference(campaign_seed: int) -> None:
    native, r = helpers(), random.Random(campaign_seed)
    assert not isinstance(native, str)
    for _ in range(300):
        length, rows = r.randint(1, 40), r.randint(1, 40)
        longest = r.choice([3, length, 5 * length])
        start = r.randint(0, 9)
        edges, stop = [start], start + length * rows
        while edges[-1] < stop:
            edges.append(edges[-1] + r.randint(1, longest))
        for row in range(rows):
            expected = packed_reference(np.array(edges), stop, row, rows, length)
            assert [Piece(*each) for each in native.packed_row(np.array(edges), stop, row, rows, length)] == expected


@pytest.mark.skipif(isinstance(helpers(), str), reason=f"no helpers: {helpers()}")
@pytest.mark.parametrize(
    ("edges", "stop", "rows"), [([0], 8, 2), ([0, 4], 8, 2), ([0, 9], 8, 1), ([5, 9], 4, 2), ([0, 7, 1, 9], 8, 2)]
)
def test_windows_that_documents_do_not_fill(edges: list[int], stop: int, rows: int) -> None:
    native = helpers()
    assert not isinstance(native, str)
    with pytest.raises(ValueError, match="do not fill"):
        native.packed_row(np.array(edges), stop, 0, rows, 4)
