"""Reads a token store: memory-mapped, checked, never copied.

Whatever happened to the files, a reader gets the right tokens or a DataError that names the file and the offset.
Opening checks headers, sizes and the index, and is quick; :meth:`TokenStore.verify` hashes everything. Ids are
compared with the vocabulary on every read, because an id that is out of range ends in a crash, or in silence, far
from here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megalm.data.format import HEADER_BYTES, IndexHeader, TokensHeader
from megalm.data.manifest import Manifest, PartRecord
from megalm.data.writer import record_file
from megalm.errors import DataError, TokenizerError
from megalm.plugin.contract.tokenizer import Tokenizer

PARTS = ("train", "validation")
TOKENIZER_FOLDER = "tokenizer"
_CHUNK = 1 << 20


class TokenStore:
    """One part of a token store. Implements the ``Corpus`` protocol of the objective contract.

    Positions are token offsets into the part's stream of documents. Use :meth:`open`.
    """

    def __init__(self, folder: Path, part: str, manifest: Manifest) -> None:
        self.folder = folder
        self.part = part
        self.manifest = manifest
        record = manifest.parts[part]
        self._tokens_path = folder / f"{part}.tokens"
        self._index_path = folder / f"{part}.index"
        header = _open_tokens(self._tokens_path, record, manifest)
        index = _open_index(self._index_path, record, manifest)
        self._itemsize = header.itemsize
        self._tokens = _map(self._tokens_path, f"<u{header.itemsize}", header.tokens)
        arrays = _map(self._index_path, "<i8", index.entries)
        ends = (index.documents + 1, 2 * (index.documents + 1))
        self._documents, self._firsts, self._sentences = arrays[: ends[0]], arrays[ends[0] : ends[1]], arrays[ends[1] :]
        self._eos_tokens = 0 if index.eos is None else 1
        self._check_index(index, arrays)

    @classmethod
    def open(cls, folder: Path | str, part: str) -> TokenStore:
        """Open ``part`` ("train" or "validation") of the store in ``folder``.

        Raises DataError, naming file and offset, for a store that is missing, truncated, altered or of another format.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if part not in manifest.parts:
            raise DataError(
                f'{folder}: has no part "{part}", only {", ".join(sorted(manifest.parts))}; '
                "prepare it with another --validation share"
            )
        return cls(folder, part, manifest)

    @property
    def num_tokens(self) -> int:
        """Length of the stream, end-of-document tokens included."""
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents, at least 1."""
        return len(self._documents) - 1

    @property
    def num_sentences(self) -> int:
        """Number of sentences, at least one a document."""
        return len(self._sentences) - 1

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.manifest.tokenizer.vocab_size

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64. IndexError outside of the stream, DataError for an id outside the
        vocabulary."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.num_tokens}")
        tokens = self._tokens[start:stop].astype(np.int64)
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            at = int(np.argmax(tokens >= self.vocab_size))
            offset = HEADER_BYTES + self._itemsize * (start + at)
            raise DataError(
                f"{self._tokens_path}: offset {offset} holds token {tokens[at]}, outside the vocabulary of "
                f"{self.vocab_size}; the file was altered, prepare the data again"
            )
        return tokens

    def document(self, index: int) -> tuple[int, int]:
        """Token range of a document, its end-of-document token included."""
        _check(index, self.num_documents, "document")
        return int(self._documents[index]), int(self._documents[index + 1])

    def document_sentences(self, index: int) -> tuple[int, int]:
        """Range of the numbers of a document's sentences, never empty."""
        _check(index, self.num_documents, "document")
        return int(self._firsts[index]), int(self._firsts[index + 1])

    def sentence(self, index: int) -> tuple[int, int]:
        """Token range of a sentence, without the end-of-document token."""
        _check(index, self.num_sentences, "sentence")
        stop = int(self._sentences[index + 1])
        if self._eos_tokens:
            after = int(np.searchsorted(self._firsts, index + 1))
            if int(self._firsts[after]) == index + 1:
                stop -= 1
        return int(self._sentences[index]), stop

    def document_at(self, position: int) -> int:
        """Number of the document that holds a token position."""
        _check(position, self.num_tokens, "token")
        return int(np.searchsorted(self._documents, position, side="right")) - 1

    def sentence_at(self, position: int) -> int:
        """Number of the sentence that holds a token position; an end-of-document token belongs to the last one."""
        _check(position, self.num_tokens, "token")
        return int(np.searchsorted(self._sentences, position, side="right")) - 1

    def document_lengths(self) -> np.ndarray:
        """Tokens of every document, end-of-document token included: (documents,) int64."""
        return np.diff(self._documents)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """TokenizerError unless ``tokenizer`` is the one that the data was made with."""
        made_with = self.manifest.tokenizer
        if tokenizer.identity != made_with.identity:
            raise TokenizerError(
                f"{self.folder}: made with tokenizer {made_with.component} {made_with.identity[:16]}, "
                f"not with {tokenizer.identity[:16]}; use the tokenizer in {self.folder / TOKENIZER_FOLDER}, "
                "or prepare the data again"
            )

    def verify(self) -> None:
        """Read this part's files completely and compare their hashes with the manifest. DataError where they differ."""
        for path in (self._tokens_path, self._index_path):
            expected, found = self.manifest.parts[self.part].files[path.name], record_file(path)
            if found != expected:
                raise DataError(
                    f"{path}: its contents were altered: SHA-256 of its {found.bytes} bytes (from offset 0) is "
                    f"{found.sha256}, the manifest says {expected.sha256}; prepare the data again"
                )
        for start in range(0, self.num_tokens, _CHUNK):
            self.stream(start, min(start + _CHUNK, self.num_tokens))

    def _check_index(self, header: IndexHeader, arrays: np.ndarray) -> None:
        path = self._index_path
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(arrays), _CHUNK):
            digest.update(arrays[start : start + _CHUNK].tobytes())
        if digest.digest() != header.digest:
            raise DataError(
                f"{path}: altered between offset {HEADER_BYTES} and {header.file_bytes}: the checksum of the index "
                "does not match; prepare the data again"
            )
        base = HEADER_BYTES
        for array, end in (
            (self._documents, header.tokens),
            (self._firsts, header.sentences),
            (self._sentences, header.tokens),
        ):
            falling = np.flatnonzero(array[1:] <= array[:-1])
            at = int(falling[0]) + 1 if len(falling) else 0 if array[0] != 0 else len(array) - 1
            if len(falling) or array[0] != 0 or array[-1] != end:
                raise DataError(
                    f"{path}: offset {base + 8 * at} holds {array[at]}, but entries must rise from 0 to {end}; "
                    "prepare the data again"
                )
            base += 8 * len(array)
        if np.any(self._sentences[self._firsts] != self._documents):
            raise DataError(f"{path}: documents do not start where their first sentences do; prepare the data again")


def _check(index: int, count: int, what: str) -> None:
    if not 0 <= index < count:
        raise IndexError(f"{what} {index} of {count}")


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    """The file's contents after the header. A plain array on the mapping: slicing np.memmap itself is slow."""
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,)).view(np.ndarray)


def _header(path: Path, record: PartRecord) -> bytes:
    """The header's bytes, once the file has the size that the manifest promises."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; prepare the data again") from None
    if path.name not in record.files:
        raise DataError(f"{path}: the manifest does not know this file; prepare the data again")
    expected = record.files[path.name].bytes
    if size != expected:
        raise DataError(
            f"{path}: ends at offset {size}, but the manifest promises {expected} bytes: it is "
            f"{'truncated' if size < expected else 'too long'}; prepare the data again"
        )
    return raw


def _open_tokens(path: Path, record: PartRecord, manifest: Manifest) -> TokensHeader:
    header = TokensHeader.unpack(path, _header(path, record))
    _agree(path, "tokens", header.tokens, record.tokens)
    _agree(path, "vocabulary size", header.vocab_size, manifest.tokenizer.vocab_size)
    _agree(path, "bytes", record.files[path.name].bytes, header.file_bytes)
    return header


def _open_index(path: Path, record: PartRecord, manifest: Manifest) -> IndexHeader:
    header = IndexHeader.unpack(path, _header(path, record))
    _agree(path, "documents", header.documents, record.documents)
    _agree(path, "sentences", header.sentences, record.sentences)
    _agree(path, "tokens", header.tokens, record.tokens)
    _agree(path, "end-of-document id", header.eos, manifest.tokenizer.eos)
    _agree(path, "bytes", record.files[path.name].bytes, header.file_bytes)
    return header


def _agree(path: Path, what: str, header: int | None, manifest: int | None) -> None:
    if header != manifest:
        raise DataError(
            f"{path}: the header (offset 0 to {HEADER_BYTES}) says {what} {header}, the manifest {manifest}: the files "
            "are of different stores; prepare the data again"
        )
