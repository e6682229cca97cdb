"""A token store over an indexed dataset that stays where it is.

The format says nothing of its tokenizer, has no checksums, and does not tell train from validation. So one pass over
the files writes a store beside them: a manifest with the tokenizer that the user names, an index in the store's own
form, and checksums of the ``.bin`` file, whose ids are then read in place. What the pass finds wrong is refused with
file and offset; what changes afterwards is noticed like damage of any store.

The store is a stream of documents, so the sequences must follow each other in the ``.bin`` file without gaps, as
Megatron-LM writes them; other files, and those whose parts shall lie together, can be copied instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.data.format import TokensHeader
from megalm.data.manifest import LinkRecord, PartRecord
from megalm.data.megatron.dataset import IndexedDataset
from megalm.data.megatron.ids import check_ids
from megalm.data.progress import Tick
from megalm.data.writer import IndexWriter, PagedFile, PartWriter, record_file
from megalm.errors import DataError
from megalm.plugin.contract.tokenizer import Tokenizer

_DOCUMENTS = 1 << 16
_TOKENS = 1 << 20


@dataclass(frozen=True)
class Slice:
    """Documents [first, last) of a dataset."""

    dataset: IndexedDataset
    first: int
    last: int

    @property
    def bytes(self) -> int:
        """Of the tokens."""
        first, last = self._sequences()
        lengths = self.dataset.lengths[first:last]
        counts = (int(lengths[at : at + _TOKENS].sum(dtype=np.int64)) for at in range(0, len(lengths), _TOKENS))
        return self.dataset.itemsize * sum(counts)

    @property
    def start(self) -> int:
        """Byte at which the first token stands."""
        first, last = self._sequences()
        for at in range(first, last, _TOKENS):
            full = np.flatnonzero(self.dataset.lengths[at : min(at + _TOKENS, last)])
            if len(full):
                return int(self.dataset.pointers[at + int(full[0])])
        return 0

    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs of documents, of bounded length."""
        for start in range(self.first, self.last, _DOCUMENTS):
            yield start, min(start + _DOCUMENTS, self.last)

    def _sequences(self) -> tuple[int, int]:
        return int(self.dataset.documents[self.first]), int(self.dataset.documents[self.last])


@dataclass(frozen=True)
class Linked:
    """A part that was made."""

    record: PartRecord
    dropped: int
    """Empty documents, which are no part of it."""
    eos: int | None
    """Id that ends every document; none where some lack it."""


def link_part(folder: Path, part: str, source: Slice, tokenizer: Tokenizer, tick: Tick) -> Linked:
    """Write ``PART.tokens`` (checksums) and ``PART.index`` into an existing folder, for the documents of ``source``.

    DataError, with file and offset, where the sequences do not follow each other or hold what is no id.
    """
    dataset, eos = source.dataset, tokenizer.special.eos
    index = IndexWriter(folder, part)
    start = source.start
    everywhere = eos is not None
    try:
        for first, last in source.runs():
            everywhere &= _index_run(index, dataset, first, last, start, eos)
        if not index.documents:
            raise _empty(source, part)
        index.close(eos if everywhere else None)
        digest = _checksums(folder / f"{part}.tokens", dataset, start, index.tokens, tokenizer.vocab_size, tick)
    except BaseException:
        index.abandon()
        raise
    names = (f"{part}.tokens", f"{part}.index")
    record = PartRecord(
        documents=index.documents,
        sentences=index.sentences,
        tokens=index.tokens,
        files={name: record_file(folder / name) for name in names},
        link=LinkRecord(bytes=len(dataset.bin_view), start=start, sha256=digest),
    )
    return Linked(record, source.last - source.first - index.documents, eos if everywhere else None)


def copy_part(folder: Path, part: str, source: Slice, tokenizer: Tokenizer, tick: Tick) -> Linked:
    """Write a part of a store with the ids themselves, from sequences that may lie anywhere; every document then ends
    with the tokenizer's end-of-document token, where it has one."""
    dataset, eos = source.dataset, tokenizer.special.eos
    writer = PartWriter(folder, part, tokenizer.vocab_size, eos)
    try:
        held: list[np.ndarray] = []
        counts: list[int] = []
        tokens = 0
        for number in range(source.first, source.last):
            sequences = [dataset.sequence(i) for i in range(*dataset.document(number))]
            for i, sequence in zip(range(*dataset.document(number)), sequences, strict=True):
                check_ids(sequence, tokenizer.vocab_size, dataset.bin_path, int(dataset.pointers[i]))
            full = [i for i, sequence in enumerate(sequences) if len(sequence)]
            if full and eos is not None and sequences[full[-1]][-1] == eos:
                sequences[full[-1]] = sequences[full[-1]][:-1]
            held += sequences
            counts.append(len(sequences))
            tokens += sum(map(len, sequences))
            if tokens >= _TOKENS or number + 1 == source.last:
                _add(writer, held, counts)
                tick(dataset.itemsize * tokens)
                held, counts, tokens = [], [], 0
        if not writer.documents:
            raise _empty(source, part)
        record = writer.close()
    except BaseException:
        writer.abandon()
        raise
    return Linked(record, source.last - source.first - record.documents, eos)


def _add(writer: PartWriter, sequences: Sequence[np.ndarray], counts: Sequence[int]) -> None:
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *(sequence.astype(np.int64) for sequence in sequences)])
    writer.add(ids, np.array([len(s) for s in sequences], dtype=np.int64), np.array(counts, dtype=np.int64))


def _index_run(index: IndexWriter, dataset: IndexedDataset, first: int, last: int, start: int, eos: int | None) -> bool:
    """Index documents [first, last), which stand where the indexed ones end. Whether ``eos`` ends each of them, and is
    more than all of its last sentence."""
    bounds = dataset.documents[first : last + 1].astype(np.int64)
    begin, end = int(bounds[0]), int(bounds[-1])
    lengths = dataset.lengths[begin:end].astype(np.int64)
    ends = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths)))
    expected = start + dataset.itemsize * (index.tokens + ends[:-1])
    wrong = np.flatnonzero((dataset.pointers[begin:end] != expected) & (lengths > 0))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{dataset.idx_path}: offset {dataset.header.pointers_at + 8 * (begin + at)} puts sequence {begin + at} at "
            f"offset {dataset.pointers[begin + at]} of {dataset.bin_path}, but the one before it ends at "
            f"{expected[at]}: a dataset that is used in place must have its sequences in order and without gaps; "
            "import it with --copy"
        )
    full = lengths > 0
    tokens = np.diff(ends[bounds - begin])
    kept = tokens > 0
    owner = np.repeat(np.arange(last - first), np.diff(bounds))[full]
    sentences = np.bincount(owner, minlength=last - first)[kept]
    before = index.tokens
    index.append(tokens[kept], sentences, ends[:-1][full])
    if eos is None or not kept.any():
        return eos is not None
    values = np.frombuffer(dataset.bin_view, dataset.dtype, before + int(ends[-1]), start)
    last_sentences = lengths[full][np.cumsum(sentences) - 1]
    stops = before + ends[bounds[1:] - begin][kept]
    return bool((last_sentences > 1).all() and (values[stops - 1] == eos).all())


def _checksums(path: Path, dataset: IndexedDataset, start: int, tokens: int, vocab_size: int, tick: Tick) -> str:
    """Write the checksums of ``tokens`` tokens from byte ``start`` on; SHA-256 of these bytes."""
    out = PagedFile(path)
    digest = hashlib.sha256()
    size = dataset.itemsize * tokens
    try:
        for at in range(start, start + size, dataset.itemsize * _TOKENS):
            chunk = dataset.bin_view[at : min(at + dataset.itemsize * _TOKENS, start + size)]
            check_ids(np.frombuffer(chunk, dataset.dtype), vocab_size, dataset.bin_path, at)
            out.checksums.feed(chunk)
            digest.update(chunk)
            tick(len(chunk))
        out.close(lambda root: TokensHeader(dataset.dtype, tokens, vocab_size, True, root).pack())
    except BaseException:
        out.abandon()
        raise
    return digest.hexdigest()


def _empty(source: Slice, part: str) -> DataError:
    return DataError(
        f"{source.dataset.idx_path}: documents {source.first} to {source.last} hold no tokens, and the {part} part "
        "would be empty; import another dataset, or another --validation share"
    )
