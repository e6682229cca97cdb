"""The binary layout of a token store's two files, and nothing else.

Both files are a header page, pages of data, and pages of checksums (see :mod:`megalm.data.pages`), each page
``PAGE_BYTES`` long, so that a file's exact size follows from its header. The header ends in a checksum of itself and
names the root of the checksums; the manifest names the header's checksum. So a file of another store, or an older one
of this store, is refused when opened, however alike it is, and every byte of data can be checked when it is read,
without reading the rest.

``PART.tokens``  data: the ids, little-endian. Where the data is *linked*, the ids stay in a file of their own (a
                 Megatron-LM ``.bin``), and this one holds their checksums only.
``PART.index``   data: int64 arrays: token offset of each document, and the end (documents + 1); number of each
                 document's first sentence, and the end (documents + 1); token offset of each sentence, and the end
                 (sentences + 1).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalm.errors import DataError

PAGE_BYTES = 4096
"""Of the header, of what a checksum covers, and of memory: a sample of 2,048 two-byte tokens touches two pages."""
HEADER_BYTES = PAGE_BYTES
VERSION = 2
_TOKENS = struct.Struct("<8sI4sQQQ16s")
_INDEX = struct.Struct("<8sIIQQQ16s")
_TOKENS_MAGIC = b"MEGALMTK"
_INDEX_MAGIC = b"MEGALMIX"
_VERSION = struct.Struct("<8xI")
_SEAL_BYTES = 16
_NO_EOS = 0xFFFFFFFF
DTYPES = ("<u2", "<u4", "<u1", "<i1", "<i2", "<i4", "<i8", "<f4", "<f8")
"""How ids may lie in a file: the first two in stores of ``megalm data prepare``, all of them where linked."""


def _seal(body: bytes) -> bytes:
    """A header page: the body, zeros, and the checksum of both."""
    page = body.ljust(HEADER_BYTES - _SEAL_BYTES, b"\0")
    return page + hashlib.blake2b(page, digest_size=_SEAL_BYTES).digest()


def seal_of(header: bytes) -> str:
    """The checksum at the end of a header page, in hex, as the manifest names it."""
    return header[-_SEAL_BYTES:].hex()


def _unseal(path: Path, raw: bytes, layout: struct.Struct, magic: bytes) -> tuple[Any, ...]:
    if len(raw) >= _VERSION.size and raw[: len(magic)] == magic:
        (version,) = _VERSION.unpack_from(raw)
        if version == 1:
            raise DataError(
                f"{path}: format version 1 at offset 8, which has no checksums of pages; this megalm reads version "
                f"{VERSION}, prepare the data again"
            )
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


def data_pages(size: int) -> int:
    """Pages that hold ``size`` bytes."""
    return -(-size // PAGE_BYTES)


@dataclass(frozen=True)
class TokensHeader:
    """Header of ``PART.tokens``."""

    dtype: str
    """One of :data:`DTYPES`."""
    tokens: int
    vocab_size: int
    """Ids are below this."""
    linked: bool
    """Whether the ids lie in another file."""
    root: bytes
    """Of the checksums of the ids' pages, 16 bytes."""

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return np.dtype(self.dtype).itemsize

    def pack(self) -> bytes:
        linked = int(self.linked)
        fields = (self.dtype.encode("ascii"), self.tokens, self.vocab_size, linked, self.root)
        return _seal(_TOKENS.pack(_TOKENS_MAGIC, VERSION, *fields))

    @classmethod
    def unpack(cls, path: Path, raw: bytes) -> TokensHeader:
        dtype, tokens, vocab_size, linked, root = _unseal(path, raw, _TOKENS, _TOKENS_MAGIC)
        name = dtype.rstrip(b"\0").decode("ascii", errors="backslashreplace")
        if name not in DTYPES:
            raise DataError(f"{path}: offset 12 names the type {name!r}, expected one of {', '.join(DTYPES)}")
        return cls(name, tokens, vocab_size, bool(linked), root)


@dataclass(frozen=True)
class IndexHeader:
    """Header of ``PART.index``."""

    eos: int | None
    """Id of the token that ends every document, where there is one."""
    documents: int
    sentences: int
    tokens: int
    root: bytes
    """Of the checksums of the arrays' pages, 16 bytes."""

    @property
    def entries(self) -> int:
        """int64 values of data."""
        return 2 * (self.documents + 1) + self.sentences + 1

    def pack(self) -> bytes:
        eos = _NO_EOS if self.eos is None else self.eos
        counts = (self.documents, self.sentences, self.tokens)
        return _seal(_INDEX.pack(_INDEX_MAGIC, VERSION, eos, *counts, self.root))

    @classmethod
    def unpack(cls, path: Path, raw: bytes) -> IndexHeader:
        eos, documents, sentences, tokens, root = _unseal(path, raw, _INDEX, _INDEX_MAGIC)
        return cls(None if eos == _NO_EOS else eos, documents, sentences, tokens, root)
