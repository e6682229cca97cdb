"""Writes one part of a token store, document by document, in constant memory.

Tokens go straight to their file; the three arrays of the index grow in files of their own and are joined at the end,
because their lengths are known only then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalm.data.format import HEADER_BYTES, IndexHeader, TokensHeader, item_bytes
from megalm.data.manifest import FileRecord, PartRecord
from megalm.errors import TokenizerError

_FLUSH = 1 << 18
_COPY_BYTES = 1 << 20


class PartWriter:
    """``PART.tokens`` and ``PART.index`` in an existing folder. Call :meth:`add` for each document, then
    :meth:`close`."""

    def __init__(self, folder: Path, part: str, vocab_size: int, eos: int | None) -> None:
        self.folder = folder
        self.part = part
        self.vocab_size = vocab_size
        self.eos = eos
        self.tokens = self.documents = self.sentences = 0
        self._dtype = np.dtype(f"<u{item_bytes(vocab_size)}")
        self._file = open(folder / f"{part}.tokens", "wb")  # noqa: SIM115  # closed by close() or abandon()
        self._file.write(bytes(HEADER_BYTES))
        self._buffer: list[int] = []
        self._spools = [_Spool(folder / f"{part}.index.{name}") for name in ("documents", "firsts", "sentences")]

    def add(self, document: Sequence[Sequence[int]]) -> bool:
        """Append a document given as the ids of its sentences; False, and nothing written, where it has no tokens."""
        kept = [sentence for sentence in document if len(sentence)]
        if not kept:
            return False
        documents, firsts, sentences = self._spools
        documents.append(self.tokens)
        firsts.append(self.sentences)
        for sentence in kept:
            sentences.append(self.tokens)
            self.tokens += len(sentence)
            self._buffer.extend(sentence)
        if self.eos is not None:
            self._buffer.append(self.eos)
            self.tokens += 1
        self.documents += 1
        self.sentences += len(kept)
        if len(self._buffer) >= _FLUSH:
            self._flush()
        return True

    def close(self) -> PartRecord:
        """Complete both files and return their record."""
        self._flush()
        self._file.seek(0)
        self._file.write(TokensHeader(self._dtype.itemsize, self.tokens, self.vocab_size).pack())
        self._file.close()
        for spool, end in zip(self._spools, (self.tokens, self.sentences, self.tokens), strict=True):
            spool.append(end)
        index = self.folder / f"{self.part}.index"
        digest = hashlib.blake2b(digest_size=16)
        with open(index, "wb") as out:
            out.write(bytes(HEADER_BYTES))
            for spool in self._spools:
                spool.drain(out, digest)
            out.seek(0)
            out.write(IndexHeader(self.eos, self.documents, self.sentences, self.tokens, digest.digest()).pack())
        names = (f"{self.part}.tokens", f"{self.part}.index")
        return PartRecord(
            documents=self.documents,
            sentences=self.sentences,
            tokens=self.tokens,
            files={name: record_file(self.folder / name) for name in names},
        )

    def abandon(self) -> None:
        """Close and remove everything that was written."""
        self._file.close()
        (self.folder / f"{self.part}.tokens").unlink(missing_ok=True)
        for spool in self._spools:
            spool.remove()

    def _flush(self) -> None:
        if not self._buffer:
            return
        ids = np.array(self._buffer, dtype=np.int64)
        self._buffer.clear()
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise TokenizerError(
                f"the tokenizer returned id {wrong}, outside its vocabulary of {self.vocab_size}; "
                "this is a fault of its plugin"
            )
        self._file.write(ids.astype(self._dtype).tobytes())


class _Spool:
    """An int64 array that grows in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "w+b")  # noqa: SIM115  # closed by remove()
        self._buffer: list[int] = []

    def append(self, value: int) -> None:
        self._buffer.append(value)
        if len(self._buffer) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._file.write(np.array(self._buffer, dtype="<i8").tobytes())
        self._buffer.clear()

    def drain(self, out: BinaryIO, digest: hashlib.blake2b) -> None:
        """Copy the array to ``out``, feed ``digest``, and remove the file."""
        self._flush()
        self._file.seek(0)
        while chunk := self._file.read(_COPY_BYTES):
            digest.update(chunk)
            out.write(chunk)
        self.remove()

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file, read in constant memory."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)
