"""Datasets of Hugging Face's library: texts as a stream, or ids that somebody tokenised by address.

The library finds, downloads and reads them; whatever it can load works (its hub, or local JSON, Parquet, text).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from megalm.api import AddressedSource, Corpus, DataError, Settings, StreamSource


class HuggingFaceConfig(Settings):
    """What ``datasets.load_dataset`` takes."""

    path: str
    """Name of a dataset, or of a format for ``data_files``: json, parquet, text, ..."""
    name: str | None = None
    """Configuration of the dataset, where it has several."""
    data_files: str | list[str] | None = None
    """Local files, or those of the dataset to use."""
    split: str = "train"
    """Part of the dataset."""
    revision: str | None = None
    """Commit of a dataset on the hub: name one, or what a resumed run reads may have changed."""


class HuggingFaceStreamConfig(HuggingFaceConfig):
    """Settings of ``[data_source.hf_datasets]``."""

    column: str = "text"
    """Where the text is; a row is a document."""
    streaming: bool = True
    """Read while training, without a copy on disk. Without it skipping costs nothing."""


class HuggingFaceTokensConfig(HuggingFaceConfig):
    """Settings of ``[data_source.hf_tokens]``."""

    column: str = Field(default="input_ids")
    """Where the ids are, lists of integers by the run's tokenizer; a row is a document, and its end-of-document token,
    if it is to have one, is among them."""


def _load(cfg: HuggingFaceConfig, **more: Any) -> Any:
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            "Hugging Face datasets need the Python module datasets; install it with: pip install 'megalm[data]'"
        ) from None
    given = {"name": cfg.name, "data_files": cfg.data_files, "split": cfg.split, "revision": cfg.revision}
    try:
        found = library.load_dataset(cfg.path, **given, **more)
    except Exception as error:  # the library raises whatever its parts raise
        raise DataError(f"{_shown(cfg)}: cannot be loaded: {type(error).__name__}: {error}") from None
    column = getattr(cfg, "column", "")
    if found.column_names is not None and column not in found.column_names:
        raise DataError(f"{_shown(cfg)}: has no column {column!r}, only {', '.join(found.column_names)}")
    return found


def _shown(cfg: HuggingFaceConfig) -> str:
    written = cfg.model_dump(exclude_defaults=True, exclude={"path"})
    return f"{cfg.path} {json.dumps(written, sort_keys=True)}" if written else cfg.path


class HuggingFaceStream(StreamSource):
    """The texts of a dataset, in its order."""

    Config = HuggingFaceStreamConfig
    cfg: HuggingFaceStreamConfig

    @property
    def identity(self) -> str:
        return _shown(self.cfg)

    def documents(self, skip: int) -> Iterator[str]:
        rows = _load(self.cfg, streaming=self.cfg.streaming)
        if skip:
            rows = rows.skip(skip) if self.cfg.streaming else rows.select(range(min(skip, len(rows)), len(rows)))
        for row in rows:
            yield row[self.cfg.column] or ""


class HuggingFaceTokens(AddressedSource):
    """The ids of a dataset, as they lie in its memory-mapped table."""

    Config = HuggingFaceTokensConfig
    cfg: HuggingFaceTokensConfig

    @property
    def identity(self) -> str:
        return _shown(self.cfg)

    def corpus(self, vocab_size: int) -> Corpus:
        table = _load(self.cfg).data.table
        return TableCorpus(table.column(self.cfg.column), vocab_size, self.identity)


class TableCorpus:
    """A column of lists as a corpus: a row is a document and a sentence. Eight bytes a document are held in memory."""

    def __init__(self, column: Any, vocab_size: int, name: str) -> None:
        """``column``: a ``pyarrow.ChunkedArray`` of lists of integers."""
        arrow, compute = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.compute")
        self._vocab_size = vocab_size
        self._name = name
        inside = getattr(column.type, "value_type", None)
        if inside is None or not (arrow.types.is_integer(inside) or arrow.types.is_null(inside)):
            raise DataError(f"{name}: the column holds {column.type}, expected lists of integers")
        lengths = compute.fill_null(compute.list_value_length(column), 0).to_numpy().astype(np.int64)
        kept = np.flatnonzero(lengths)
        if not len(kept):
            raise DataError(f"{name}: no row has ids")
        self._column = column
        self._rows = kept
        self._offsets = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths[kept])))

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_sentences(self) -> int:
        return self.num_documents

    def stream(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens}")
        if start == stop:
            return np.zeros(0, dtype=np.int64)
        first, last = self.document_at(start), self.document_at(stop - 1) + 1
        rows = int(self._rows[first]), int(self._rows[last - 1]) + 1
        lists = self._column.slice(rows[0], rows[1] - rows[0])
        ids = np.concatenate([np.asarray(chunk.flatten(), dtype=np.int64) for chunk in lists.chunks])
        ids = ids[start - self._offsets[first] : stop - self._offsets[first]]
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            wrong = start + int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
            raise DataError(
                f"{self._name}: row {self._rows[self.document_at(wrong)]} holds id {ids[wrong - start]}, outside the "
                f"tokenizer's vocabulary of {self._vocab_size}; tokenise it with the run's tokenizer"
            )
        return ids

    def document(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return int(self._offsets[index]), int(self._offsets[index + 1])

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self._offsets):
            raise IndexError(f"entries [{start}, {stop}) of {len(self._offsets)} offsets")
        return self._offsets[start:stop].copy()

    def document_sentences(self, index: int) -> tuple[int, int]:
        self.document(index)
        return index, index + 1

    def sentence(self, index: int) -> tuple[int, int]:
        return self.document(index)

    def document_at(self, position: int) -> int:
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"token {position} of {self.num_tokens}")
        return int(np.searchsorted(self._offsets, position, side="right")) - 1

    def sentence_at(self, position: int) -> int:
        return self.document_at(position)
