"""Sentence boundaries in the tokens of a whole document.

Encoding sentence by sentence would change the tokens: word-boundary markers and merges depend on the neighbours. So the
document is encoded whole, and its boundaries are found through the character offsets that the library reports.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


def cut_at_segments(ids: list[int], starts: Sequence[int], segments: Sequence[str]) -> list[list[int]]:
    """Distribute a document's ids over its segments.

    ``starts`` holds the character at which each token begins, never falling; a token belongs to the segment in which it
    begins. A document without segments has none to give them to, and no ids.
    """
    if not segments:
        return []
    cuts = [bisect_left(starts, end) for end in accumulate(len(segment) for segment in segments[:-1])]
    return [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
