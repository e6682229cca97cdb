"""Writes one part of a token store, in constant memory, from arrays of many documents at a time.

Tokens go straight to their file, with their checksums on the way; the three arrays of the index grow in files of their
own and are joined at the end, because their lengths are known only then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megalm.data.checksums import Checksums
from megalm.data.format import HEADER_BYTES, PAGE_BYTES, IndexHeader, TokensHeader, item_bytes, seal_of
from megalm.data.manifest import FileRecord, PartRecord
from megalm.errors import TokenizerError

_COPY_BYTES = 1 << 20
_LONG = 256
"""Documents of so many tokens are copied one by one; of shorter ones a mask is cheaper."""


class PartWriter:
    """``PART.tokens`` and ``PART.index`` in an existing folder. Call :meth:`add`, then :meth:`close`."""

    def __init__(self, folder: Path, part: str, vocab_size: int, eos: int | None) -> None:
        self.folder = folder
        self.part = part
        self.vocab_size = vocab_size
        self.eos = eos
        self._dtype = np.dtype(f"<u{item_bytes(vocab_size)}")
        self._file = PagedFile(folder / f"{part}.tokens")
        self._index = IndexWriter(folder, part)

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return self._index.documents

    def add(self, ids: np.ndarray, sentences: np.ndarray, documents: np.ndarray) -> int:
        """Append many documents at once, and return how many of them had tokens; those without are left out.

        ``ids``: (tokens,) integers, without end-of-document tokens; ``sentences``: (sentences,) tokens of each;
        ``documents``: (documents,) sentences of each. Raises ValueError where the three do not fit together,
        TokenizerError where an id is outside the vocabulary.
        """
        ids, sentences, documents = np.asarray(ids), np.asarray(sentences), np.asarray(documents)
        if (
            ids.ndim != 1
            or ids.dtype.kind not in "iu"
            or (len(sentences) and int(sentences.min()) < 0)
            or (len(documents) and int(documents.min()) < 0)
            or int(sentences.sum()) != len(ids)
            or int(documents.sum()) != len(sentences)
        ):
            raise ValueError(
                f"{ids.dtype} ids of shape {ids.shape}, sentences of {int(sentences.sum())} tokens, documents of "
                f"{int(documents.sum())} sentences of {len(sentences)}: these do not fit together"
            )
        if not len(ids):
            return 0
        check_ids(ids, self.vocab_size)
        # Documents' ends in sentences and tokens, before empty ones are dropped.
        token_ends = np.concatenate(([0], np.cumsum(sentences, dtype=np.int64)))
        document_ends = token_ends[np.concatenate(([0], np.cumsum(documents, dtype=np.int64)))]
        lengths = np.diff(document_ends)
        owner = np.repeat(np.arange(len(documents)), documents)[sentences > 0]
        kept = lengths > 0
        counts = np.bincount(owner, minlength=len(documents))[kept]
        extra = 0 if self.eos is None else 1
        place = np.cumsum(kept) - 1
        starts = token_ends[:-1][sentences > 0] + extra * place[owner]
        if self.eos is not None:
            ids = _with_ends(ids.astype(self._dtype, copy=False), document_ends[1:][kept], self.eos)
        self._index.append(lengths[kept] + extra, counts, starts)
        self._file.write(np.ascontiguousarray(ids, dtype=self._dtype).data.cast("B"))
        return int(kept.sum())

    def close(self) -> PartRecord:
        """Complete both files and return their record."""
        tokens, size = self._index.tokens, self._dtype
        self._file.close(lambda root: TokensHeader(size.str, tokens, self.vocab_size, False, root).pack())
        self._index.close(self.eos)
        names = (f"{self.part}.tokens", f"{self.part}.index")
        return PartRecord(
            documents=self._index.documents,
            sentences=self._index.sentences,
            tokens=tokens,
            files={name: record_file(self.folder / name) for name in names},
        )

    def abandon(self) -> None:
        """Close and remove everything that was written."""
        self._file.abandon()
        self._index.abandon()


def _with_ends(ids: np.ndarray, ends: np.ndarray, eos: int) -> np.ndarray:
    """The ids with ``eos`` after each end of a document."""
    if len(ids) < _LONG * len(ends):
        return np.insert(ids, ends, eos)
    result = np.empty(len(ids) + len(ends), dtype=ids.dtype)
    start = 0
    for number, end in enumerate(ends.tolist()):
        result[start + number : end + number] = ids[start:end]
        result[end + number] = eos
        start = end
    return result


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """TokenizerError where one of the integers, (tokens,), is no id of the vocabulary."""
    if not len(ids):
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise TokenizerError(
            f"the tokenizer returned id {wrong}, outside its vocabulary of {vocab_size}; this is a fault of its plugin"
        )


class IndexWriter:
    """``PART.index`` in an existing folder."""

    def __init__(self, folder: Path, part: str) -> None:
        self._path = folder / f"{part}.index"
        self.tokens = self.documents = self.sentences = 0
        self._spools = [_Spool(folder / f"{part}.index.{name}") for name in ("documents", "firsts", "sentences")]

    def append(self, lengths: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
        """More documents, all int64: (documents,) tokens of each, (documents,) sentences of each, and (sentences,)
        token offset of each sentence from the first of these documents. Nothing is empty."""
        documents, firsts, sentences = self._spools
        documents.append(self.tokens + np.cumsum(lengths) - lengths)
        firsts.append(self.sentences + np.cumsum(counts) - counts)
        sentences.append(self.tokens + starts)
        self.documents += len(lengths)
        self.sentences += len(starts)
        self.tokens += int(lengths.sum())

    def close(self, eos: int | None) -> None:
        """Join the arrays and complete the file. ``eos`` ends every document, where there is one."""
        for spool, end in zip(self._spools, (self.tokens, self.sentences, self.tokens), strict=True):
            spool.append(np.array([end], dtype=np.int64))
        file = PagedFile(self._path)
        for spool in self._spools:
            spool.drain(file)
        file.close(lambda root: IndexHeader(eos, self.documents, self.sentences, self.tokens, root).pack())

    def abandon(self) -> None:
        """Remove everything that was written."""
        for spool in self._spools:
            spool.remove()


class PagedFile:
    """A file of the store: a page for the header, pages of data, and the checksum pages, which are made on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115  # closed by close() or abandon()
        self._file.write(bytes(HEADER_BYTES))
        self.checksums = Checksums(path.parent)

    def write(self, data: bytes | memoryview) -> None:
        """Append to the data."""
        self.checksums.feed(data)
        self._file.write(data)

    def close(self, header: Callable[[bytes], bytes]) -> None:
        """Complete the file; ``header`` makes the header page from the root."""
        if short := -self._file.tell() % PAGE_BYTES:
            self.write(bytes(short))
        root = self.checksums.write(self._file)
        self._file.seek(0)
        self._file.write(header(root))
        self._file.close()

    def abandon(self) -> None:
        """Close and remove the file."""
        self.checksums.close()
        self._file.close()
        self._path.unlink(missing_ok=True)


class _Spool:
    """An int64 array that grows in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "w+b")  # noqa: SIM115  # closed by remove()

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype("<i8").tobytes())

    def drain(self, out: PagedFile) -> None:
        """Copy the array to ``out`` and remove the file."""
        self._file.seek(0)
        while chunk := self._file.read(_COPY_BYTES):
            out.write(chunk)
        self.remove()

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def record_file(path: Path) -> FileRecord:
    """Size, hash and seal of a file, read in constant memory."""
    with open(path, "rb") as file:
        seal = seal_of(file.read(HEADER_BYTES))
    size, sha256 = hash_file(path)
    return FileRecord(bytes=size, sha256=sha256, seal=seal)


def hash_file(path: Path) -> tuple[int, str]:
    """(bytes, hex SHA-256) of a file, read in constant memory."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
