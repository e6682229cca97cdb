"""Makes the checksum pages of :mod:`megalm.data.pages` while data is written, or read for the first time."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import IO, BinaryIO
from zlib import crc32

import numpy as np

from megalm.data.format import PAGE_BYTES, data_pages
from megalm.data.pages import root_of

_HELD_BYTES = 1 << 24
"""Checksums of 16 GB of data are kept in memory; more wait in a temporary file."""


class Checksums:
    """Feed the data in order, then :meth:`write` the pages above it."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is where a temporary file may go."""
        self._spool = tempfile.SpooledTemporaryFile(max_size=_HELD_BYTES, dir=os.fspath(folder))  # noqa: SIM115
        self._crc = 0
        self._filled = 0
        self.bytes = 0
        """Data seen so far."""

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes of the data."""
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        done: list[int] = []
        at = 0
        if self._filled:
            at = min(len(view), PAGE_BYTES - self._filled)
            self._crc = crc32(view[:at], self._crc)
            self._filled += at
            if self._filled == PAGE_BYTES:
                done.append(self._crc)
                self._filled = 0
        if not self._filled:
            whole = len(view) - (len(view) - at) % PAGE_BYTES
            done += [crc32(view[start : start + PAGE_BYTES]) for start in range(at, whole, PAGE_BYTES)]
            self._crc, self._filled = crc32(view[whole:]), len(view) - whole
        self._spool.write(_packed(done))

    def write(self, out: BinaryIO) -> bytes:
        """Append the checksum pages to ``out`` and return the root. Ends the object."""
        if self._filled:
            self._spool.write(_packed([self._crc]))
        self._spool.seek(0)
        level: IO[bytes] = self._spool
        pages = data_pages(self.bytes)
        while True:
            pages = max(1, data_pages(4 * pages))
            above: list[int] = []
            page = b""
            for _ in range(pages):
                page = level.read(PAGE_BYTES).ljust(PAGE_BYTES, b"\0")
                above.append(crc32(page))
                out.write(page)
            level.close()
            if pages == 1:
                return root_of(page)
            level = io.BytesIO(_packed(above))

    def close(self) -> None:
        """Give up."""
        self._spool.close()


def _packed(values: list[int]) -> bytes:
    """The checksums as they stand in the file."""
    return np.array(values, dtype="<u4").tobytes()
