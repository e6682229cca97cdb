"""``megalm data export-megatron``: a part of a token store as an indexed dataset of Megatron-LM.

Its causal datasets shuffle *sequences*, and take each for a document; its masked ones draw sentences of a document.
Hence the two forms: a sequence a document, or a sequence a sentence. The end-of-document token stays where it is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalm.data.megatron.layout import MAX_LENGTH, IdxHeader, dtype_for, paths
from megalm.data.progress import Progress, ticking
from megalm.data.store import TokenStore
from megalm.errors import DataError
from megalm.files import sync

SEQUENCES = ("documents", "sentences")
_CHUNK = 1 << 17


def export_megatron(
    store: TokenStore,
    prefix: Path | str,
    *,
    sequences: str = "documents",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Write ``store`` as ``PREFIX.bin`` and ``PREFIX.idx``; the two paths.

    ``sequences``: what is a sequence, "documents" or "sentences". The type of the tokens is the one that Megatron-LM
    chooses for the vocabulary. Memory does not depend on the store. The ``.idx`` file appears last, and goes first
    where ``overwrite`` replaces an older dataset, so that no index ever stands beside tokens that are not its own. The
    older dataset is put back where the new one cannot take its place; after a kill, when another export to the prefix
    begins.

    Raises DataError for an unknown ``sequences``, existing files, a sequence of more than 2**31 - 1 tokens, and
    where the files cannot be written; nothing is left then.
    """
    if sequences not in SEQUENCES:
        raise DataError(f"sequences {sequences}: expected one of {', '.join(SEQUENCES)}")
    targets = paths(prefix)
    suffix = f".partial-{secrets.token_hex(4)}"
    partial = [path.with_name(path.name + suffix) for path in targets]
    try:
        _recover(targets)
        for path in targets:
            if os.path.lexists(path) and not overwrite:
                raise DataError(f"{path}: exists already; choose another prefix, or replace it with --overwrite")
            if os.path.isdir(path):
                raise DataError(f"{path}: is a folder; choose another prefix")
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        dtype = dtype_for(store.vocab_size)
        with open(partial[0], "wb") as out:
            _write_tokens(out, store, dtype, progress)
        with open(partial[1], "wb") as out:
            _write_index(out, store, dtype, sequences == "documents")
        for path in partial:
            sync(path)
        _put_in_place(partial, targets)
    except OSError as error:
        raise DataError(
            f"{error.filename or targets[0]}: cannot write the dataset: {error.strerror or error}"
        ) from error
    finally:
        for path in partial:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return targets


def _aside(targets: tuple[Path, Path]) -> tuple[Path, Path]:
    tokens, index = (path.with_name(f".{path.name}.megalm-replaced") for path in targets)
    return tokens, index


def _put_in_place(partial: list[Path], targets: tuple[Path, Path]) -> None:
    aside = _aside(targets)
    try:
        for target, old in zip(reversed(targets), reversed(aside), strict=True):
            if target.exists():
                os.replace(target, old)
        for source, target in zip(partial, targets, strict=True):
            os.replace(source, target)
        sync(targets[0].parent)
    finally:
        _recover(targets)


def _recover(targets: tuple[Path, Path]) -> None:
    """After a replacement: where it was cut short, put the older dataset back, its index last; else remove that."""
    whole = targets[1].exists()
    for target, old in zip(targets, _aside(targets), strict=True):
        if old.exists() and whole:
            old.unlink()
        elif old.exists():
            os.replace(old, target)


def _write_tokens(out: BinaryIO, store: TokenStore, dtype: str, progress: Progress | None) -> None:
    tick = ticking(progress, np.dtype(dtype).itemsize * store.num_tokens)
    for start in range(0, store.num_tokens, _CHUNK):
        stop = min(start + _CHUNK, store.num_tokens)
        tick(out.write(store.stream(start, stop).astype(dtype).tobytes()))


def _write_index(out: BinaryIO, store: TokenStore, dtype: str, by_document: bool) -> None:
    count = store.num_documents if by_document else store.num_sentences
    itemsize = np.dtype(dtype).itemsize
    out.write(IdxHeader(dtype, count, store.num_documents + 1).pack())
    for offsets in _offsets(store, count, by_document):
        lengths = np.diff(offsets)
        if int(lengths.max()) > MAX_LENGTH:
            raise DataError(
                f"{store.folder}: a sequence of {int(lengths.max())} tokens, and the format holds {MAX_LENGTH} at "
                "most; export with --sequences sentences, or prepare the data in smaller documents"
            )
        out.write(lengths.astype("<i4").tobytes())
    for offsets in _offsets(store, count, by_document):
        out.write((itemsize * offsets[:-1]).astype("<i8").tobytes())
    for start in range(0, store.num_documents + 1, _CHUNK):
        stop = min(start + _CHUNK, store.num_documents + 1)
        entries = np.arange(start, stop) if by_document else store.first_sentences(start, stop)
        out.write(entries.astype("<i8").tobytes())


def _offsets(store: TokenStore, count: int, by_document: bool) -> Iterator[np.ndarray]:
    """Token offsets of the sequences, in runs that share their ends."""
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count) + 1
        yield store.document_offsets(start, stop) if by_document else store.sentence_offsets(start, stop)
