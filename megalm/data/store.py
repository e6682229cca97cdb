"""Reads a token store: memory-mapped, checked, never copied.

Whatever happened to the files, a reader gets the right tokens or a DataError that names the file and the offset.
Opening checks the manifest, headers and sizes, in a time that does not depend on the corpus; everything else is checked
by the page when it is touched (:mod:`megalm.data.pages`). A reader holds a few hundred kilobytes, whatever the corpus:
offsets are looked up in the mapped index. :meth:`TokenStore.verify` reads and hashes everything.

Checksums say that bytes are as they were written, so ids are compared with the vocabulary, and index entries with their
bounds, as well: an id that is out of range ends in a crash, or in silence, far from here.

The ids may lie in a file of another program (:mod:`megalm.data.megatron`), whose checksums the store holds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megalm.data.format import HEADER_BYTES, PAGE_BYTES, IndexHeader, TokensHeader, data_pages, seal_of
from megalm.data.index import IndexArray
from megalm.data.manifest import LinkRecord, Manifest, PartRecord
from megalm.data.mapped import MappedFile, unreadable
from megalm.data.pages import CheckedPages, checksum_bytes
from megalm.data.writer import record_file
from megalm.errors import DataError, TokenizerError
from megalm.native.helpers import helpers
from megalm.plugin.contract.tokenizer import Tokenizer

PARTS = ("train", "validation")
TOKENIZER_FOLDER = "tokenizer"
_AGAIN = "prepare the data again"
_IMPORT_AGAIN = "import the data again"
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
        self._remedy = _AGAIN if record.link is None else _IMPORT_AGAIN
        self._link: Path | None = None
        if record.link is not None:
            if part not in manifest.links:
                raise DataError(f"{folder}: the manifest does not say where the ids of {part} lie; {self._remedy}")
            self._link = Path(manifest.links[part])
        self._tokens_path = folder / f"{part}.tokens"
        self._index_path = folder / f"{part}.index"
        self._open_tokens(record)
        self._open_index(record)
        self._recent = (0, 0)

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
        return len(self._values)

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
        return self._vocab_size

    @property
    def eos(self) -> int | None:
        """Id that ends every document, where there is one."""
        return self._eos

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64. IndexError outside of the stream, DataError where the file was altered or an
        id is outside the vocabulary."""
        start, stop = int(start), int(stop)
        if not 0 <= start <= stop <= len(self._values):
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.num_tokens}")
        self._data.check(self._itemsize * start, self._itemsize * stop)
        tokens: np.ndarray = self._values[start:stop].astype(np.int64)
        # Seen as unsigned, a negative id is a large one.
        if tokens.size and int(tokens.view(np.uint64).max()) >= self._vocab_size:
            raise self._outside(tokens, start)
        return tokens

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each of ``starts``: int64 (starts, length). What :meth:`stream` gives of
        each, in a fraction of the time, and the same errors."""
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and not (length >= 0 <= int(starts.min()) <= int(starts.max()) <= len(self._values) - length):
            raise IndexError(
                f"windows of {length} tokens from {starts.min()} to {starts.max()} of a stream of {self.num_tokens}"
            )
        native = helpers()
        if isinstance(native, str) or self._values.dtype.kind not in "iu" or not starts.size:
            return np.array([self.stream(at, at + length) for at in starts.tolist()], dtype=np.int64).reshape(
                len(starts), length
            )
        self._data.check_windows(self._itemsize * starts, self._itemsize * length)
        found: tuple[np.ndarray, int] = native.windows(self._values, starts, length, self._vocab_size)
        tokens, wrong = found
        if wrong >= 0:
            raise self._outside(tokens[wrong], int(starts[wrong]))
        return tokens

    def _outside(self, tokens: np.ndarray, start: int) -> DataError:
        at = int(np.argmax(tokens.view(np.uint64) >= self._vocab_size))
        offset = self._data.file_offset(self._itemsize * (start + at))
        return DataError(
            f"{self._data.path}: offset {offset} holds token {tokens[at]}, outside the vocabulary of "
            f"{self._vocab_size}; the file was altered, {self._remedy}"
        )

    def document(self, index: int) -> tuple[int, int]:
        """Token range of a document, its end-of-document token included."""
        return self._documents.pair(_check(index, self.num_documents, "document"), self.num_tokens)

    def document_sentences(self, index: int) -> tuple[int, int]:
        """Range of the numbers of a document's sentences, never empty."""
        found = self._firsts.pair(_check(index, self.num_documents, "document"), self.num_sentences)
        self._recent = found
        return found

    def sentence(self, index: int) -> tuple[int, int]:
        """Token range of a sentence, without the end-of-document token."""
        index = _check(index, self.num_sentences, "sentence")
        start, stop = self._sentences.pair(index, self.num_tokens)
        if self._eos is not None and self._is_last(index):
            stop -= 1
            if stop == start:
                raise DataError(
                    f"{self._index_path}: sentence {index} at token {start} holds nothing but the end of its document; "
                    f"{self._remedy}"
                )
        return start, stop

    def document_at(self, position: int) -> int:
        """Number of the document that holds a token position."""
        found = self._documents.find(_check(position, self.num_tokens, "token")) - 1
        return self._within(found, self.num_documents, "document", position)

    def sentence_at(self, position: int) -> int:
        """Number of the sentence that holds a token position; an end-of-document token belongs to the last one."""
        found = self._sentences.find(_check(position, self.num_tokens, "token")) - 1
        return self._within(found, self.num_sentences, "sentence", position)

    def document_lengths(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Tokens of documents [first, last), by default all, end-of-document tokens included: (documents,) int64."""
        last = self.num_documents if last is None else last
        lengths: np.ndarray = np.diff(self.document_offsets(first, last + 1))
        return lengths

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of the documents' token offsets, of which there is one more than documents: int64."""
        return _slice(self._documents, start, stop)

    def first_sentences(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of the numbers of documents' first sentences; one more than documents: int64."""
        return _slice(self._firsts, start, stop)

    def sentence_offsets(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of the sentences' token offsets, of which there is one more than sentences: int64."""
        return _slice(self._sentences, start, stop)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """TokenizerError unless ``tokenizer`` is the one that the data was made with."""
        made_with = self.manifest.tokenizer
        if tokenizer.identity != made_with.identity:
            raise TokenizerError(
                f"{self.folder}: made with tokenizer {made_with.component} {made_with.identity[:16]}, "
                f"not with {tokenizer.identity[:16]}; use the tokenizer in {self.folder / TOKENIZER_FOLDER}, "
                f"or {self._remedy}"
            )

    @property
    def data_bytes(self) -> int:
        """Bytes of the ids and the index, linked ones included."""
        return len(self._data.view) + len(self._index.view)

    def check(self) -> None:
        """Read everything and compare it with its checksums, at a gigabyte a second or more. DataError, with file and
        offset, where something was altered."""
        for pages in (self._data, self._index):
            pages.check_all()

    def verify(self) -> None:
        """Read this part's files completely and compare their hashes with the manifest. DataError where they differ."""
        self.check()
        for path in (self._tokens_path, self._index_path):
            expected, found = self.manifest.parts[self.part].files[path.name], record_file(path)
            if found != expected:
                raise DataError(
                    f"{path}: its contents were altered: SHA-256 of its {found.bytes} bytes (from offset 0) is "
                    f"{found.sha256}, the manifest says {expected.sha256}; {self._remedy}"
                )
        link = self.manifest.parts[self.part].link
        if link is not None:
            self._verify_link(link)
        for start in range(0, self.num_tokens, _CHUNK):
            self.stream(start, min(start + _CHUNK, self.num_tokens))
        self._documents.check_rises(self.num_tokens)
        self._firsts.check_rises(self.num_sentences)
        self._sentences.check_rises(self.num_tokens)
        for start in range(0, self.num_documents, _CHUNK):
            stop = min(start + _CHUNK, self.num_documents)
            begins = self._documents.between(start, stop)
            wrong = np.flatnonzero(self._sentences.take(self._firsts.between(start, stop)) != begins)
            if len(wrong):
                raise DataError(
                    f"{self._index_path}: document {start + int(wrong[0])} does not start where its first sentence "
                    f"does; {self._remedy}"
                )

    def _verify_link(self, link: LinkRecord) -> None:
        digest = hashlib.sha256()
        for start, stop in self._data.chunks():
            digest.update(self._data.view[start:stop])
        if digest.hexdigest() != link.sha256:
            raise DataError(
                f"{self._link}: its contents were altered: SHA-256 of {len(self._data.view)} bytes from offset "
                f"{link.start} is {digest.hexdigest()}, the manifest of {self.folder} says {link.sha256}; "
                f"{self._remedy}"
            )

    def _open_tokens(self, record: PartRecord) -> None:
        path = self._tokens_path
        header = TokensHeader.unpack(path, self._header(path, record))
        self._agree(path, "tokens", header.tokens, record.tokens)
        self._agree(path, "vocabulary size", header.vocab_size, self.manifest.tokenizer.vocab_size)
        self._agree(path, "link", header.linked, record.link is not None)
        size = header.itemsize * header.tokens
        inside = 0 if header.linked else PAGE_BYTES * data_pages(size)
        self._agree(path, "bytes", HEADER_BYTES + inside + checksum_bytes(size), record.files[path.name].bytes)
        own = MappedFile(path, record.files[path.name].bytes, self._remedy)
        if record.link is None or self._link is None:
            data, start, covered = own, HEADER_BYTES, inside
        else:
            data = MappedFile(self._link, record.link.bytes, self._remedy)
            start, covered = record.link.start, size
            if not 0 <= start <= start + size <= record.link.bytes:
                raise DataError(f"{self._link}: ends before offset {start + size}; {self._remedy}")
        self._data = CheckedPages(data, start, covered, own, HEADER_BYTES + inside, header.root, self._remedy)
        self._itemsize, self._vocab_size = header.itemsize, header.vocab_size
        self._values = np.frombuffer(self._data.view, dtype=header.dtype, count=header.tokens)

    def _open_index(self, record: PartRecord) -> None:
        path = self._index_path
        header = IndexHeader.unpack(path, self._header(path, record))
        self._agree(path, "documents", header.documents, record.documents)
        self._agree(path, "sentences", header.sentences, record.sentences)
        self._agree(path, "tokens", header.tokens, record.tokens)
        if record.link is None or header.eos is not None:
            self._agree(path, "end-of-document id", header.eos, self.manifest.tokenizer.eos)
        inside = PAGE_BYTES * data_pages(8 * header.entries)
        size = HEADER_BYTES + inside + checksum_bytes(inside)
        self._agree(path, "bytes", size, record.files[path.name].bytes)
        own = MappedFile(path, size, self._remedy)
        self._index = CheckedPages(own, HEADER_BYTES, inside, own, HEADER_BYTES + inside, header.root, self._remedy)
        documents, sentences = header.documents + 1, header.sentences + 1
        self._documents = IndexArray(self._index, 0, documents, "offsets of documents")
        self._firsts = IndexArray(self._index, 8 * documents, documents, "documents' first sentences")
        self._sentences = IndexArray(self._index, 16 * documents, sentences, "offsets of sentences")
        self._eos = header.eos

    def _header(self, path: Path, record: PartRecord) -> bytes:
        """The header's page, once the file has the size and the header that the manifest promises."""
        try:
            with open(path, "rb") as file:
                raw = file.read(HEADER_BYTES)
            size = path.stat().st_size
        except OSError as error:
            raise unreadable(path, error, self._remedy) from None
        if path.name not in record.files:
            raise DataError(f"{path}: the manifest does not know this file; {self._remedy}")
        expected = record.files[path.name]
        if size != expected.bytes:
            raise DataError(
                f"{path}: ends at offset {size}, but the manifest promises {expected.bytes} bytes: it is "
                f"{'truncated' if size < expected.bytes else 'too long'}; {self._remedy}"
            )
        if seal_of(raw) != expected.seal:
            raise DataError(
                f"{path}: the header (offset 0 to {HEADER_BYTES}) is not the one that the manifest names: it was "
                f"altered, or the file is another store's or an older one; {self._remedy}"
            )
        return raw

    def _agree(self, path: Path, what: str, header: int | None, manifest: int | None) -> None:
        if header != manifest:
            raise DataError(
                f"{path}: the header (offset 0 to {HEADER_BYTES}) says {what} {header}, the manifest {manifest}: the "
                f"files are of different stores; {self._remedy}"
            )

    def _is_last(self, sentence: int) -> bool:
        """Whether a sentence is its document's last one: known for the document asked for last, else looked up."""
        first, last = self._recent
        if first <= sentence < last:
            return sentence + 1 == last
        document = self._firsts.find(sentence) - 1
        _, last = self.document_sentences(self._within(document, self.num_documents, "document", sentence))
        return sentence + 1 == last

    def _within(self, found: int, count: int, what: str, place: int) -> int:
        if not 0 <= found < count:
            raise DataError(
                f"{self._index_path}: no {what} holds place {place}, the index does not rise; {self._remedy}"
            )
        return found


def _check(index: int, count: int, what: str) -> int:
    if not 0 <= index < count:
        raise IndexError(f"{what} {index} of {count}")
    return int(index)


def _slice(array: IndexArray, start: int, stop: int) -> np.ndarray:
    if not 0 <= start <= stop <= len(array):
        raise IndexError(f"entries [{start}, {stop}) of {len(array)}")
    return array.rising(int(start), int(stop))
