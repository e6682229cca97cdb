"""A file mapped for reading, that notices when somebody changes it underneath.

A mapping of a file that shrinks ends the process with a signal that Python cannot catch, and one of a file that is
written anew in place shows a mixture of both. So readers ask :meth:`MappedFile.stamp` before they touch the memory:
a shorter file is an error, another stamp tells them to trust nothing that they had checked before. (Files of megalm's
own are never changed in place: they are renamed over the old one, whose mapping stays whole.)
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

from megalm.errors import DataError


class MappedFile:
    """``bytes`` of a file from its start, read-only. The descriptor is closed when the object goes."""

    def __init__(self, path: Path, size: int, remedy: str) -> None:
        """Map ``path``, which must be ``size`` bytes long. DataError otherwise, ending in ``remedy``."""
        self.path = path
        self.size = size
        self._remedy = remedy
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {_reason(error)}; {remedy}") from None
        weakref.finalize(self, os.close, self._handle)
        found = os.fstat(self._handle)
        if found.st_size != size:
            raise self._resized(found.st_size)
        if size == 0:
            self.view = memoryview(b"")
            return
        try:
            self.view = memoryview(mmap.mmap(self._handle, size, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be mapped: {_reason(error)}; {remedy}") from None

    def stamp(self) -> tuple[int, int]:
        """When the file was written last: another pair than before means that it was. DataError where its size is not
        what it was."""
        found = os.fstat(self._handle)
        if found.st_size != self.size:
            raise self._resized(found.st_size)
        return found.st_mtime_ns, found.st_ctime_ns

    def _resized(self, found: int) -> DataError:
        return DataError(
            f"{self.path}: ends at offset {found}, but {self.size} bytes were promised: it is "
            f"{'truncated' if found < self.size else 'too long'}; {self._remedy}"
        )


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
