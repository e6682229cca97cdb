"""Hashes of checkpoint files.

They must keep up with storage, because every byte is hashed on the way out and again before it is trusted. XXH3 of 128
bits does so at about the speed of memory, where SHA-256 is several times slower than a disk. It tells damage of any
kind from what was written (the odds of an accident passing are 2^-128); it is no defence against someone who means to
deceive, and neither would SHA-256 be, whose value such a person would write anew.

The algorithm is named in the manifest: checkpoints of earlier versions have SHA-256, and are verified with it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import xxhash

from megalm.checkpoint.threads import THREADS
from megalm.errors import CheckpointError

ALGORITHM = "xxh3_128"
"""Of checkpoints written now."""
BLOCK = 1 << 22
"""Bytes hashed, and written or read, at once. They are still in the processor's cache for the second of the two; and
with smaller writes the kernel keeps the file in smaller pieces, which takes several times as long."""


class Hash(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Add data."""
        ...

    def hexdigest(self) -> str:
        """The hash of what was added, in hexadecimal."""
        ...


HASHES: dict[str, Callable[[], Hash]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
"""By the name that a manifest gives them."""

_buffers = threading.local()


def hash_file(path: Path, algorithm: str) -> str:
    """Hexadecimal hash of a file; CheckpointError where it cannot be read."""
    found = HASHES[algorithm]()
    if not hasattr(_buffers, "block"):
        _buffers.block = memoryview(bytearray(BLOCK))
    block: memoryview = _buffers.block
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                found.update(block[:count])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found.hexdigest()


def hash_files(paths: Sequence[Path], algorithm: str) -> list[str]:
    """The same of several files at once, in their order."""
    if len(paths) < 2:
        return [hash_file(path, algorithm) for path in paths]
    with ThreadPoolExecutor(min(THREADS, len(paths)), "megalm-hash") as pool:
        return list(pool.map(lambda path: hash_file(path, algorithm), paths))
