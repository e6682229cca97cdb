"""The two files of a Megatron-LM indexed dataset, ``PREFIX.bin`` and ``PREFIX.idx``, as bytes. All little-endian.

``.bin``  the tokens of all sequences, without a header.
``.idx``  magic (9 bytes), version (uint64, 1), type of a token (uint8, a code), sequences (uint64), entries of the
          document array (uint64); then, unpadded, int32 tokens of each sequence; int64 byte offset of each sequence in
          ``.bin``; int64 number of each document's first sequence, and the end (documents + 1); and, in multimodal
          datasets only, an int8 mode of each sequence.

Nothing in the header says whether there are modes, but the file's size does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Type of a token by code."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_LENGTH = 2**31 - 1
"""Tokens of a sequence."""


def paths(prefix: Path | str) -> tuple[Path, Path]:
    """(``PREFIX.bin``, ``PREFIX.idx``); ``prefix`` may also be one of the two."""
    text = str(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(text + ".bin"), Path(text + ".idx")


def dtype_for(vocab_size: int) -> str:
    """The type that Megatron-LM gives a vocabulary: 2 bytes below 65,500 ids, else 4 signed; 8 beyond those."""
    if vocab_size < 65_500:
        return "<u2"
    return "<i4" if vocab_size <= 2**31 else "<i8"


@dataclass(frozen=True)
class IdxHeader:
    """The fixed part of ``PREFIX.idx``."""

    dtype: str
    sequences: int
    entries: int
    """Of the document array: documents + 1."""

    @property
    def lengths_at(self) -> int:
        """Where the arrays begin, in the order of the file."""
        return HEADER_BYTES

    @property
    def pointers_at(self) -> int:
        return self.lengths_at + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        return self.pointers_at + 8 * self.sequences

    @property
    def modes_at(self) -> int:
        return self.documents_at + 8 * self.entries

    def has_modes(self, path: Path, size: int) -> bool:
        """Whether a file of ``size`` bytes holds modes. DataError where it has neither of the two possible sizes."""
        if size in (self.modes_at, self.modes_at + self.sequences):
            return size > self.modes_at
        raise DataError(
            f"{path}: ends at offset {size}, but {self.sequences} sequences and {self.entries} document entries take "
            f"{self.modes_at} bytes, or {self.modes_at + self.sequences} with modes: the file is "
            f"{'truncated' if size < self.modes_at else 'damaged'}; write the dataset again"
        )

    def pack(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequences, self.entries)

    @classmethod
    def unpack(cls, path: Path, raw: bytes) -> IdxHeader:
        """DataError, with file and offset, where this is no header."""
        if raw[: len(MAGIC)] != MAGIC:
            raise DataError(
                f"{path}: not the index of a Megatron-LM dataset: offset 0 holds {raw[: len(MAGIC)]!r}, "
                f"expected {MAGIC!r}"
            )
        if len(raw) < HEADER_BYTES:
            raise DataError(f"{path}: truncated at offset {len(raw)}, inside its {HEADER_BYTES}-byte header")
        _, version, code, sequences, entries = _HEADER.unpack(raw[:HEADER_BYTES])
        if version != VERSION:
            raise DataError(f"{path}: version {version} at offset 9, expected {VERSION}")
        if code not in DTYPES:
            known = ", ".join(f"{number} {np.dtype(name).name}" for number, name in DTYPES.items())
            raise DataError(f"{path}: offset 17 holds type {code}, expected one of {known}")
        if entries < 1:
            raise DataError(f"{path}: offset 26 says that the document array is empty, but it holds at least a 0")
        return cls(DTYPES[code], sequences, entries)
