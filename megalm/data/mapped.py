"""A file mapped for reading, that notices when somebody changes it underneath.

A mapping of a file that shrinks ends the process with a signal that Python cannot catch, and one of a file that is
written anew in place shows a mixture of both. So readers ask :meth:`MappedFile.stamp` before they touch the memory:
a shorter file is an error, another stamp tells them to trust nothing that they had checked before. (Files of megalm's
own are never changed in place: they are renamed over the old one, whose mapping stays whole.)
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
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
            raise unreadable(path, error, remedy) from None
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
            raise unreadable(path, error, remedy) from None

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


def unreadable(path: Path, error: OSError | ValueError, remedy: str) -> DataError:
    """What to say where a file cannot be opened or mapped: it need not be the file's fault."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "allow more with ulimit -n (a corpus takes up to twelve), or join corpora into larger ones"
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return DataError(f"{path}: cannot be read: {reason}; {remedy}")


def make_room(corpora: int) -> None:
    """Let this process have the files of so many more corpora open, as far as its hard limit goes.

    A corpus is two parts of two files, or of three where its ids are linked, and a mapped file takes two descriptors:
    its own, and Python's mapping's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + 12 * corpora
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
