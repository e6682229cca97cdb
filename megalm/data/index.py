"""An int64 array of the index, read where it lies: single entries and binary search, never the whole.

The arrays rise, so an item's bounds are two neighbours, and the item that holds a position is found by a search, which
checks a few pages.
"""

from __future__ import annotations

import numpy as np

from megalm.data.format import PAGE_BYTES
from megalm.data.pages import CheckedPages
from megalm.errors import DataError

_ENTRIES = PAGE_BYTES // 8


class IndexArray:
    """``count`` rising entries, the first at byte ``start`` of the data of ``pages``."""

    def __init__(self, pages: CheckedPages, start: int, count: int, what: str) -> None:
        """``what`` names the array's entries in messages."""
        self._pages = pages
        self._start = start
        self._values = np.frombuffer(pages.view, dtype="<i8", count=count, offset=start)
        self._what = what

    def __len__(self) -> int:
        return len(self._values)

    def pair(self, index: int, limit: int) -> tuple[int, int]:
        """Entries ``index`` and ``index + 1``. DataError unless 0 <= the first < the second <= ``limit``."""
        at = self._start + 8 * index
        self._pages.check(at, at + 16)
        first, second = int(self._values[index]), int(self._values[index + 1])
        if not 0 <= first < second <= limit:
            raise DataError(
                f"{self._pages.path}: the {self._what} at offset {self._pages.file_offset(at)} are {first} and "
                f"{second}, but they must rise, up to {limit}; {self._pages.remedy}"
            )
        return first, second

    def between(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop): int64, a view that must not be kept."""
        at = self._start + 8 * start
        self._pages.check(at, self._start + 8 * stop)
        return self._values[start:stop]

    def rising(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop): int64, a copy. DataError where they do not rise."""
        values = self.between(start, stop).copy()
        wrong = np.flatnonzero(values[1:] <= values[:-1])
        if len(wrong):
            raise self._falls(start + 1 + int(wrong[0]), int(values[wrong[0] + 1]), "")
        return values

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Entries at rising ``indices``: (indices,) int64. Checks everything from the first to the last of them."""
        found: np.ndarray = self.between(int(indices[0]), int(indices[-1]) + 1)[indices - indices[0]]
        return found

    def find(self, value: int) -> int:
        """How many entries are <= ``value``.

        Documents' lengths differ, but a place among many is about where their mean says: the search begins there, and
        widens until it holds the value on both sides.
        """
        self._pages.check(self._start, self._start)
        count = len(self._values)
        guess = min(max(count * value // max(self._at(count - 1), 1), 0), count - 1)
        low, high, width = guess, guess + 1, _ENTRIES // 2
        while low > 0 and self._at(low) > value:
            low, high, width = max(low - width, 0), low, 2 * width
        while high < count and self._at(high) <= value:
            low, high, width = high, min(high + width, count), 2 * width
        while high - low > _ENTRIES:
            middle = (low + high) // 2
            if self._at(middle) <= value:
                low = middle + 1
            else:
                high = middle
        self._pages.check_again(self._start + 8 * low, self._start + 8 * high)
        return low + int(np.searchsorted(self._values[low:high], np.int64(value), side="right"))

    def _at(self, index: int) -> int:
        at = self._start + 8 * index
        self._pages.check_again(at, at + 8)
        return int(self._values[index])

    def check_rises(self, end: int, step: int = 1 << 17) -> None:
        """DataError, with the offset, unless the entries rise strictly from 0 to ``end``. Reads everything."""
        last = len(self) - 1
        for start in range(0, len(self), step):
            values = self.between(start, min(start + step + 1, len(self)))
            wrong = np.flatnonzero(values[1:] <= values[:-1]) + 1
            if start == 0 and values[0] != 0:
                wrong = np.zeros(1, dtype=np.int64)
            elif not len(wrong) and start + len(values) > last and values[-1] != end:
                wrong = np.array([len(values) - 1])
            if len(wrong):
                raise self._falls(start + int(wrong[0]), int(values[wrong[0]]), f" from 0 to {end}")

    def _falls(self, entry: int, value: int, bounds: str) -> DataError:
        return DataError(
            f"{self._pages.path}: offset {self._pages.file_offset(self._start + 8 * entry)} holds {value}, but the "
            f"{self._what} must rise{bounds}; {self._pages.remedy}"
        )
