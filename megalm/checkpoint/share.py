"""Which part of a checkpoint each rank writes.

Data-parallel ranks hold the same tensors, and each of them writes its share. What one rank of every replica answers for
is laid out as one line of bytes, in the model's order, and the line is cut into as many equal parts as there are
replicas, at rows of the tensors that the cuts fall into. So ranks write equally much, whatever the sizes of the
tensors, a checkpoint gets at most one slice more for each cut, and each rank knows its part without asking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from megalm.parallel.layout import Piece, Range

Box = tuple[Range, ...]


def shares(items: Iterable[Piece], index: int, size: int) -> Iterator[tuple[Piece, Box]]:
    """The ranges that replica ``index`` of ``size`` writes; ``items`` must be owned alike on all of them."""
    mine = [(piece, piece.owned) for piece in items if piece.owned is not None]
    total = sum(_bytes(piece, box) for piece, box in mine)
    first, last = (total * n // size for n in (index, index + 1))
    start = 0
    for piece, box in mine:
        count = _bytes(piece, box)
        if size == 1 or not box or not count:
            # A cut needs rows; what has none is the first replica's.
            if size == 1 or index == 0:
                yield piece, box
            continue
        (top, bottom), *rest = box
        row = count // (bottom - top)
        # A row is whose part its first byte falls into.
        low, high = (min(max(-(-(edge - start) // row), 0), bottom - top) for edge in (first, last))
        if low < high:
            yield piece, ((top + low, top + high), *rest)
        start += count


def _bytes(piece: Piece, box: Box) -> int:
    return piece.local.element_size() * math.prod(stop - start for start, stop in box)
