"""Data in checksummed pages: whatever is read was checked, and nothing else has to be.

A page is 4,096 bytes. Each has a CRC-32, the CRCs fill pages of their own, those have CRCs again, and so on up to a
single page, whose digest (the *root*) is in the file's header. To check a page is to walk from the root down to it: at
most four steps for 17 TB, and nearly always one, because pages above are remembered. Opening reads the root's page
only, so it takes the same time for every size.

CRC-32 is zlib's: in the standard library, 1.7 GB/s where BLAKE2b does 0.27 and SHA-256 0.6 (xxHash does more than 40,
but would be a dependency for what is 2.4 us a page). It finds every damage of up to 32 adjacent bits and all but one in
2**32 of others. It is for accidents: who can write to a store can also make its checksums right.

What was checked is remembered in a table of fixed size, one slot for each page number modulo ``REMEMBERED``: a quarter
of a gigabyte of pages that are in use stay known, a page that lost its slot is checked again. So the memory of a reader
is half a megabyte a file, whatever its size.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from zlib import crc32

import numpy as np

from megalm.data.format import PAGE_BYTES, data_pages
from megalm.data.mapped import MappedFile
from megalm.errors import DataError

FANOUT = PAGE_BYTES // 4
"""Checksums in a page."""
REMEMBERED = 1 << 16
"""Pages that are known to be right at a time."""
ROOT_BYTES = 16


def levels(size: int) -> list[int]:
    """Pages of checksums on each level above ``size`` bytes of data, from the widest to the single page at the top."""
    found: list[int] = []
    pages = data_pages(size)
    while pages > 1 or not found:
        pages = max(1, -(-pages // FANOUT))
        found.append(pages)
    return found


def checksum_bytes(size: int) -> int:
    """Bytes of all checksum pages above ``size`` bytes of data."""
    return PAGE_BYTES * sum(levels(size))


def root_of(top: bytes | memoryview) -> bytes:
    """The root: a digest of the top page."""
    return hashlib.blake2b(top, digest_size=ROOT_BYTES).digest()


class CheckedPages:
    """Checks pages of data before they are read. Offsets are in bytes from the start of the data."""

    def __init__(
        self, data: MappedFile, start: int, size: int, sums: MappedFile, sums_at: int, root: bytes, remedy: str
    ) -> None:
        """Data is ``size`` bytes from ``start`` of one file; its checksum pages lie from ``sums_at`` on in another, or
        in the same. DataError where the top page does not have ``root``."""
        self._files = (data,) if data is sums else (data, sums)
        self.path = data.path
        self.remedy = remedy
        self._start = start
        places = [(data, start, size)]
        for pages in levels(size):
            places.append((sums, sums_at, PAGE_BYTES * pages))
            sums_at += PAGE_BYTES * pages
        self._places = places
        self._views = [file.view[at : at + length] for file, at, length in places]
        self._sums = [np.frombuffer(view, dtype="<u4") for view in self._views[1:]]
        self._firsts = [0]
        for view in self._views[:-1]:
            self._firsts.append(self._firsts[-1] + data_pages(len(view)))
        self._root = root
        self._forget()

    def file_offset(self, offset: int) -> int:
        """Where a byte of the data stands in its file."""
        return self._start + offset

    @property
    def view(self) -> memoryview:
        """The data, unchecked."""
        return self._views[0]

    def check(self, start: int, stop: int) -> None:
        """DataError, naming file and offsets, unless the pages that hold bytes [start, stop) are as they were written.

        The caller has seen to it that the range lies within the data.
        """
        if self._stamps != [file.stamp() for file in self._files]:
            self._forget()
        self.check_again(start, stop)

    def check_windows(self, starts: np.ndarray, size: int) -> None:
        """:meth:`check` for ``size`` bytes from each of ``starts``, int64 (windows,)."""
        if self._stamps != [file.stamp() for file in self._files]:
            self._forget()
        first, last = starts // PAGE_BYTES, -((starts + size) // -PAGE_BYTES)
        pages = first[:, None] + np.arange(int((last - first).max(initial=0)))
        pages = pages[pages < last[:, None]]
        known = self._known
        for page in pages[np.frombuffer(known, dtype=np.int64)[pages % REMEMBERED] != pages].tolist():
            self._check_page(0, page)
            known[page % REMEMBERED] = page

    def check_again(self, start: int, stop: int) -> None:
        """:meth:`check` without asking the files whether they changed: for steps of one look-up."""
        known = self._known
        for page in range(start // PAGE_BYTES, -(-stop // PAGE_BYTES)):
            if known[page % REMEMBERED] != page:
                self._check_page(0, page)
                known[page % REMEMBERED] = page

    def check_all(self) -> None:
        """:meth:`check` for everything."""
        for start, stop in self.chunks():
            self.check(start, stop)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of a megabyte that cover the data."""
        size = len(self._views[0])
        for start in range(0, size, 1 << 20):
            yield start, min(start + (1 << 20), size)

    def _forget(self) -> None:
        """Trust nothing that was checked before. The stamps come last, so that no other thread takes what was known of
        the former contents for what is known of these."""
        stamps = [file.stamp() for file in self._files]
        self._known = array("q", [-1]) * REMEMBERED
        self._check_root()
        self._stamps = stamps

    def _check_page(self, level: int, page: int) -> None:
        if level == len(self._sums):
            return  # the top, which the root covers
        above = page // FANOUT
        slot = self._firsts[level + 1] + above
        if self._known[slot % REMEMBERED] != slot:
            self._check_page(level + 1, above)
            self._known[slot % REMEMBERED] = slot
        expected = int(self._sums[level][page])
        found = crc32(self._views[level][page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
        if found != expected:
            file, at, length = self._places[level]
            first, last = at + page * PAGE_BYTES, at + min((page + 1) * PAGE_BYTES, length)
            what = "the data" if level == 0 else "the table of checksums"
            raise DataError(
                f"{file.path}: altered between offset {first} and {last}: {what} there has checksum {found:08x}, not "
                f"{expected:08x}; {self.remedy}"
            )

    def _check_root(self) -> None:
        file, at, length = self._places[-1]
        if root_of(self._views[-1]) != self._root:
            raise DataError(
                f"{file.path}: altered between offset {at} and {at + length}: the top of the checksums is not the one "
                f"that the header names; {self.remedy}"
            )
