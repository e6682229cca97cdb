"""Characters of a text and the tokens that stand for them, for heads that point into texts.

The tokenizer contract tells no offsets. It tells which tokens are those of consecutive segments of a text, so a text is
given in segments of one word, one mark of punctuation, or one character of a script that writes no spaces. A place in
the text is known to the segment. Where a token reaches over several segments, it stands for all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from megalm.api import Tokenizer

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_SEGMENT = re.compile(rf"\s*(?:[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s])")


@dataclass(frozen=True)
class Pieces:
    """The tokens of a text, and the characters [start, stop) that each stands for: (tokens,) int64 each. White space
    around words belongs to no token.
    """

    ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, first: int, last: int) -> Pieces:
        """Tokens [first, last)."""
        return Pieces(self.ids[first:last], self.starts[first:last], self.stops[first:last])

    def covering(self, start: int, stop: int) -> tuple[int, int] | None:
        """Tokens [first, last) that stand for any of the characters [start, stop); those of the word before where that
        is white space. None where the text has none there.
        """
        first = int(np.searchsorted(self.stops, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        if first >= last:  # white space between two words
            first, last = last - 1, last
        while first > 0 and self.starts[first - 1] == self.starts[first]:
            first -= 1
        while 0 < last < len(self) and self.starts[last] == self.starts[last - 1]:
            last += 1
        return (first, last) if 0 <= first < last else None


def read_pieces(tokenizer: Tokenizer, text: str) -> Pieces:
    """The tokens of a text, without white space at its end; none where the tokenizer has none for anything in it."""
    found = list(_SEGMENT.finditer(text.rstrip()))
    segments = [match[0] for match in found]
    bounds = [(match.end() - len(match[0].lstrip()), match.end()) for match in found]
    lists = tokenizer.encode_segments([segments])[0] if segments else []
    own = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
    ids = np.array([token for tokens in lists for token in tokens], dtype=np.int64)
    if len(own) == 0:
        return Pieces(ids, ids, ids)
    # A token reaches to where the next one's segment begins.
    last = np.maximum(own, np.append(own[1:], len(lists)) - 1)
    starts, stops = np.array(bounds, dtype=np.int64).T
    return Pieces(ids, starts[own], stops[last])
