"""A stream of documents as a row of small corpora ("blocks"), so that objectives see what they always see.

A stream has no address and no end that could be known: consecutive documents are collected until they have as many
tokens as a block is to have, and that is a corpus, in memory. Samples are shuffled within it. Where a block begins is
known by the documents before it, which is all that is needed to begin there again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.data.sentences import split_sentences
from megalm.data.writer import check_ids
from megalm.errors import DataError
from megalm.plugin.contract.source import StreamSource
from megalm.plugin.contract.tokenizer import Tokenizer

_CHARACTERS = 1 << 20
"""Text that is encoded at once."""


@dataclass(frozen=True)
class Stream:
    """A source, and how its documents become blocks."""

    source: StreamSource
    block_tokens: int
    """A block ends with the document that brings it to so many tokens, end-of-document tokens included."""
    sentences: bool
    """Documents are split into sentences; else each is one."""
    epochs: int
    """How often the stream may be read; 0: as often as it takes."""


@dataclass(frozen=True)
class Place:
    """Where a block begins."""

    epoch: int = 0
    documents: int = 0
    """Documents of the epoch before it."""


@dataclass(frozen=True)
class Block:
    """Consecutive documents in memory. Implements the ``Corpus`` protocol of the objective contract."""

    begin: Place
    end: Place
    """Where the next block begins."""
    tokens: np.ndarray
    """int64 (tokens,), end-of-document tokens included."""
    documents: np.ndarray
    """int64 (documents + 1,): where documents begin, and the end."""
    firsts: np.ndarray
    """int64 (documents + 1,): number of each document's first sentence, and that of all."""
    sentences: np.ndarray
    """int64 (sentences + 1,): where sentences begin, and the end."""
    eos: int | None

    @property
    def num_tokens(self) -> int:
        """End-of-document tokens included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Those that have tokens."""
        return len(self.documents) - 1

    @property
    def num_sentences(self) -> int:
        """Those that have tokens."""
        return len(self.sentences) - 1

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int64; IndexError outside."""
        if not 0 <= start <= stop <= len(self.tokens):
            raise IndexError(f"tokens [{start}, {stop}) of a block of {self.num_tokens}")
        return self.tokens[start:stop].copy()

    def document(self, index: int) -> tuple[int, int]:
        """Token range of a document."""
        return _pair(self.documents, index, "document")

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of the documents' token offsets, of which there is one more than documents: int64."""
        return _entries(self.documents, start, stop)

    def document_sentences(self, index: int) -> tuple[int, int]:
        """Range of the numbers of a document's sentences."""
        return _pair(self.firsts, index, "document")

    def sentence(self, index: int) -> tuple[int, int]:
        """Token range of a sentence, without the end-of-document token."""
        start, stop = _pair(self.sentences, index, "sentence")
        last = self.eos is not None and self.document(self.document_at(start))[1] == stop
        return start, stop - last

    def document_at(self, position: int) -> int:
        """Number of the document that holds a token position."""
        return _holder(self.documents, position)

    def sentence_at(self, position: int) -> int:
        """Number of the sentence that holds a token position."""
        return _holder(self.sentences, position)

    def packed(self) -> tuple[np.ndarray, dict[str, int]]:
        """All of it as int32 (any,), to be sent, and the numbers that :func:`unpacked` needs."""
        lengths = (np.diff(self.firsts), np.diff(self.sentences))
        sizes = {
            "epoch": self.begin.epoch,
            "documents": self.begin.documents,
            "next_epoch": self.end.epoch,
            "next_documents": self.end.documents,
            "tokens": self.num_tokens,
            "kept": self.num_documents,
        }
        return np.concatenate((self.tokens, *lengths)).astype(np.int32), sizes


def unpacked(values: np.ndarray, sizes: dict[str, int], eos: int | None) -> Block:
    """What :meth:`Block.packed` gave."""
    tokens, rest = np.split(values.astype(np.int64), [sizes["tokens"]])
    counts, lengths = np.split(rest, [sizes["kept"]])
    firsts, sentences = _offsets(counts), _offsets(lengths)
    begin, end = Place(sizes["epoch"], sizes["documents"]), Place(sizes["next_epoch"], sizes["next_documents"])
    return Block(begin, end, tokens, sentences[firsts], firsts, sentences, eos)


def read_blocks(stream: Stream, tokenizer: Tokenizer, place: Place) -> Iterator[Block]:
    """Blocks from ``place`` on, through the epochs. DataError where the stream gives nothing, or what is no text;
    TokenizerError where an id is outside the vocabulary."""
    while not stream.epochs or place.epoch < stream.epochs:
        found = place.documents > 0
        for block in _epoch(stream, tokenizer, place):
            found, place = True, block.end
            yield block
        if not found:
            raise DataError(f"data.source: {stream.source.identity} has no documents with text")
        if place.documents:  # a block ended exactly with the stream
            place = Place(place.epoch + 1)


def _epoch(stream: Stream, tokenizer: Tokenizer, begin: Place) -> Iterator[Block]:
    """The blocks of the rest of an epoch."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    tokens, seen = 0, begin.documents
    for ids, lengths in _encoded(stream, tokenizer, begin.documents):
        seen += 1
        if len(ids):
            held.append((ids, lengths))
            tokens += len(ids)
        if tokens >= stream.block_tokens:
            end = Place(begin.epoch, seen)
            yield _block(begin, end, held, tokenizer.special.eos)
            begin, held, tokens = end, [], 0
    if held:
        yield _block(begin, Place(begin.epoch + 1), held, tokenizer.special.eos)


def _encoded(stream: Stream, tokenizer: Tokenizer, skip: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each document its ids, with the end-of-document token, and the tokens of its sentences; both are empty where
    it has no tokens."""
    for texts in _batches(stream.source, skip, min(_CHARACTERS, 4 * stream.block_tokens)):
        documents = [split_sentences(text) if stream.sentences else [text] for text in texts]
        ids, lengths = tokenizer.encode_documents(documents)
        check_ids(ids, tokenizer.vocab_size)
        starts, first = _offsets(lengths), 0
        for document in documents:
            last = first + len(document)
            found, sizes = ids[starts[first] : starts[last]], lengths[first:last]
            sizes = sizes[sizes > 0].astype(np.int64)
            if len(found) and tokenizer.special.eos is not None:
                found = np.append(found, tokenizer.special.eos)
                sizes[-1] += 1
            yield found, sizes
            first = last


def _batches(source: StreamSource, skip: int, characters: int) -> Iterator[list[str]]:
    """Documents from number ``skip`` on, as many together as have some text."""
    held: list[str] = []
    size = 0
    given: Iterator[object] = source.documents(skip)
    for number, text in enumerate(given, skip):
        if not isinstance(text, str):  # a plugin's mistake, which nothing else would name
            kind = type(text).__name__
            raise DataError(f"data.source: document {number} of {source.identity} is of type {kind}, expected str")
        held.append(text)
        size += len(text)
        if size >= characters:
            yield held
            held, size = [], 0
    if held:
        yield held


def _block(begin: Place, end: Place, held: list[tuple[np.ndarray, np.ndarray]], eos: int | None) -> Block:
    ids, lengths = zip(*held, strict=True)
    firsts = _offsets(np.array([len(each) for each in lengths]))
    sentences = _offsets(np.concatenate(lengths))
    return Block(begin, end, np.concatenate(ids).astype(np.int64), sentences[firsts], firsts, sentences, eos)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)))


def _pair(offsets: np.ndarray, index: int, what: str) -> tuple[int, int]:
    if not 0 <= index < len(offsets) - 1:
        raise IndexError(f"{what} {index} of {len(offsets) - 1}")
    return int(offsets[index]), int(offsets[index + 1])


def _entries(offsets: np.ndarray, start: int, stop: int) -> np.ndarray:
    if not 0 <= start <= stop <= len(offsets):
        raise IndexError(f"entries [{start}, {stop}) of {len(offsets)} offsets")
    return offsets[start:stop].copy()


def _holder(offsets: np.ndarray, position: int) -> int:
    if not 0 <= position < offsets[-1]:
        raise IndexError(f"token {position} of {offsets[-1]}")
    return int(np.searchsorted(offsets, position, side="right")) - 1
