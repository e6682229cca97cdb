"""The finished work on one piece of the inputs: a small folder that is complete or absent.

It holds the tokens of every document that passed the filters, and what is needed to decide later which of them stay and
in which part: a hash of the text, for near duplicates a signature. Its name is a hash of everything that decides its
contents, so that what an interrupted run finished is found again, and found only where it is right.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import unicodedata
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from megalm.data.cleaning.cleaner import Cleaning
from megalm.data.cleaning.duplicates import PLACES
from megalm.data.format import item_bytes
from megalm.data.reading.inputs import InputFile, printable
from megalm.data.reading.options import Documents
from megalm.data.reading.units import Unit
from megalm.errors import DataError
from megalm.plugin.contract.tokenizer import Tokenizer

_FORMAT = 2
RECORD = np.dtype([("key", "<u8"), ("hash", "<u8", (2,)), ("tokens", "<i8"), ("sentences", "<i8")])
"""A document: hash that decides its part (0 where there is one part), hash of its text, tokens, sentences."""
NAME = "shard.json"
_READ = 1 << 18


@dataclass(frozen=True)
class Work:
    """Everything but the tokenizer that decides what becomes of a piece."""

    documents: Documents
    text_key: str
    skip: bool
    max_document: int
    sentences: bool
    cleaning: Cleaning
    split: bool = True
    """Whether there are several parts, which documents' hashes decide between."""


@dataclass(frozen=True)
class Job:
    """One piece to work on, or (``unit`` None) a file to hash."""

    file: InputFile
    unit: Unit | None

    def key(self, work: Work, tokenizer: Tokenizer) -> str:
        """Name of its shard."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "path": printable(Path(os.path.abspath(self.file.path))),
            "size": self.file.size,
            "mtime": self.file.mtime_ns,
        }
        if self.unit is not None:
            content |= {
                "unit": [self.unit.start, self.unit.stop, self.file.kind, self.file.packing],
                "tokenizer": tokenizer.identity,
                "unicode": unicodedata.unidata_version,
                "versions": _versions(
                    "megalm", *tokenizer.libraries, *(["py3langid"] if work.cleaning.languages else [])
                ),
                "work": {**asdict(work), "cleaning": work.cleaning.model_dump(mode="json")},
            }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _versions(*distributions: str) -> dict[str, str]:
    """Of libraries that decide what becomes of a text; those that are not installed decide nothing."""
    found = {}
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass
class Shard:
    """What a shard's ``shard.json`` says."""

    sha256: str
    """Of the file; empty where this is a piece of it, and the file is hashed by a job of its own."""
    documents: int = 0
    """Documents read, those that were removed or have no tokens included."""
    dropped: int = 0
    """Documents without a token."""
    removed: dict[str, int] = field(default_factory=dict)
    scrubbed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)
    """Bytes and CRC-32 of each file: accidents are to be found, as in the store."""

    @classmethod
    def read(cls, folder: Path) -> Shard | None:
        """The shard in ``folder``; None where there is none, or its files have not the sizes that they should."""
        try:
            found = cls(**json.loads((folder / NAME).read_bytes()))
            whole = all((folder / name).stat().st_size == size for name, (size, _) in found.files.items())
        except (OSError, ValueError, TypeError):
            return None
        return found if whole else None


class ShardData:
    """The arrays of a shard, mapped. DataError where a file was altered."""

    def __init__(self, folder: Path, shard: Shard, vocab_size: int) -> None:
        self._folder, self._shard = folder, shard
        self.records = self._map("records", RECORD)
        self.tokens = self._map("tokens", np.dtype(f"<u{item_bytes(vocab_size)}"))
        self.sentences = self._map("sentences", np.dtype("<i8"))

    def signatures(self) -> np.ndarray:
        """(documents, PLACES) uint32."""
        return self._map("signatures", np.dtype("<u4")).reshape(-1, PLACES)

    def verify(self) -> None:
        """Compare every file with its CRC-32."""
        for name, (_, expected) in self._shard.files.items():
            found = 0
            buffer = memoryview(bytearray(_READ))
            with open(self._folder / name, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    found = crc32(buffer[:count], found)
            if found != expected:
                raise DataError(
                    f"{self._folder / name}: the intermediate file was altered; remove {self._folder} and prepare again"
                )

    def _map(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        count = self._shard.files[name][0] // dtype.itemsize
        if count == 0:
            return np.zeros(0, dtype=dtype)
        return np.memmap(self._folder / name, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)
