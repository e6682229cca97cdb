"""A piece of a file as a stream, which counts and hashes what is read of it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from megalm.data.progress import Tick
from megalm.errors import DataError


class Source(io.RawIOBase):
    """Bytes [start, stop) of a file, counted and, if ``hashed``, hashed as they are read. ``tick`` is told the bytes of
    each read."""

    def __init__(self, path: Path, start: int, stop: int, tick: Tick | None = None, *, hashed: bool = False) -> None:
        super().__init__()
        self.path = path
        self.left = stop - start
        self._digest = hashlib.sha256() if hashed else None
        self._tick = tick
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
            self._file.seek(start)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: self.left]
        count = self._file.readinto(view) or 0
        if self._digest is not None:
            self._digest.update(view[:count])
        self.left -= count
        if self._tick is not None and count:
            self._tick(count)
        return count

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()

    @property
    def sha256(self) -> str:
        """Hex digest of what was read so far; empty where it was not to be hashed."""
        return self._digest.hexdigest() if self._digest is not None else ""
