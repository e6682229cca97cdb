"""The binary layout of a token store's two files, and nothing else.

Both start with a 64-byte little-endian header that ends in a checksum of itself, so that a damaged size or type is
found before anything is mapped. The token file is as large as the corpus and is therefore checked by size when opened
and by hash on request; the index is small and its checksum is part of its header.

``PART.tokens``  header, then ``tokens`` ids of 2 or 4 bytes.
``PART.index``   header, then int64 arrays: token offset of each document, and the end (documents + 1); number of each
                 document's first sentence, and the end (documents + 1); token offset of each sentence, and the end
                 (sentences + 1).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import DataError

HEADER_BYTES = 64
VERSION = 1
_TOKENS = struct.Struct("<8sIIQQ24x")
_INDEX = struct.Struct("<8sIIQQQ16s")
_TOKENS_MAGIC = b"MEGALMTK"
_INDEX_MAGIC = b"MEGALMIX"
_CHECKSUM_BYTES = HEADER_BYTES - _TOKENS.size
_NO_EOS = 0xFFFFFFFF


def _seal(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()


def _unseal(path: Path, raw: bytes, layout: struct.Struct, magic: bytes) -> tuple[int, ...]:
    if len(raw) < HEADER_BYTES:
        raise DataError(
            f"{path}: truncated at offset {len(raw)}, inside its {HEADER_BYTES}-byte header; prepare the data again"
        )
    if raw[: len(magic)] != magic:
        raise DataError(f"{path}: not a token store file: offset 0 holds {raw[:8]!r}, expected {magic!r}")
    if _seal(raw[: layout.size]) != raw:
        raise DataError(f"{path}: the header (offset 0 to {HEADER_BYTES}) was altered: its checksum does not match")
    _, version, *fields = layout.unpack(raw[: layout.size])
    if version != VERSION:
        raise DataError(f"{path}: format version {version} at offset 8, this megalm reads version {VERSION}")
    return tuple(fields)


def item_bytes(vocab_size: int) -> int:
    """Bytes of a stored token: 2 where every id fits, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


@dataclass(frozen=True)
class TokensHeader:
    """Header of ``PART.tokens``."""

    itemsize: int
    """Bytes of a token, 2 or 4, unsigned little-endian."""
    tokens: int
    vocab_size: int
    """Ids are below this."""

    @property
    def file_bytes(self) -> int:
        """Exact size of the file."""
        return HEADER_BYTES + self.itemsize * self.tokens

    def pack(self) -> bytes:
        return _seal(_TOKENS.pack(_TOKENS_MAGIC, VERSION, self.itemsize, self.tokens, self.vocab_size))

    @classmethod
    def unpack(cls, path: Path, raw: bytes) -> TokensHeader:
        return cls(*_unseal(path, raw, _TOKENS, _TOKENS_MAGIC))


@dataclass(frozen=True)
class IndexHeader:
    """Header of ``PART.index``."""

    eos: int | None
    """Id of the token that ends every document, where the tokenizer has one."""
    documents: int
    sentences: int
    tokens: int
    digest: bytes
    """16-byte BLAKE2b of the arrays."""

    @property
    def entries(self) -> int:
        """int64 values after the header."""
        return 2 * (self.documents + 1) + self.sentences + 1

    @property
    def file_bytes(self) -> int:
        """Exact size of the file."""
        return HEADER_BYTES + 8 * self.entries

    def pack(self) -> bytes:
        eos = _NO_EOS if self.eos is None else self.eos
        counts = (self.documents, self.sentences, self.tokens)
        return _seal(_INDEX.pack(_INDEX_MAGIC, VERSION, eos, *counts, self.digest))

    @classmethod
    def unpack(cls, path: Path, raw: bytes) -> IndexHeader:
        eos, documents, sentences, tokens, digest = _unseal(path, raw, _INDEX, _INDEX_MAGIC)
        return cls(None if eos == _NO_EOS else eos, documents, sentences, tokens, digest)  # type: ignore[arg-type]
