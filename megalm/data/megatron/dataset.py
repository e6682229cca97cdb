"""Reads an indexed dataset of Megatron-LM as it is: memory-mapped, nothing converted, every bound checked.

Opening reads the header and the ends of the arrays, whatever the size; the rest is checked where it is read, or all at
once by :meth:`IndexedDataset.validate`. The format has no checksums, so a change that keeps every bound cannot be seen
here: :mod:`megalm.data.megatron.link` makes them once and checks them ever after.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megalm.data.mapped import MappedFile
from megalm.data.megatron.layout import HEADER_BYTES, IdxHeader, paths
from megalm.errors import DataError

_REMEDY = "write the dataset again"
_CHUNK = 1 << 20


class IndexedDataset:
    """``PREFIX.bin`` and ``PREFIX.idx``. Sequences are numbered from 0; documents are runs of sequences."""

    def __init__(self, prefix: Path | str) -> None:
        """DataError, with file and offset, where the files are missing, truncated, of another format, or do not fit
        together."""
        self.bin_path, self.idx_path = paths(prefix)
        self._idx = MappedFile(self.idx_path, _size(self.idx_path), _REMEDY)
        self.header = header = IdxHeader.unpack(self.idx_path, bytes(self._idx.view[:HEADER_BYTES]))
        modes = header.has_modes(self.idx_path, self._idx.size)
        self._bin = MappedFile(self.bin_path, _size(self.bin_path), _REMEDY)
        self.itemsize = np.dtype(header.dtype).itemsize
        view = self._idx.view
        self.lengths = np.frombuffer(view, "<i4", header.sequences, header.lengths_at)
        self.pointers = np.frombuffer(view, "<i8", header.sequences, header.pointers_at)
        self.documents = np.frombuffer(view, "<i8", header.entries, header.documents_at)
        self.modes = np.frombuffer(view, "<i1", header.sequences, header.modes_at) if modes else None
        for entry, expected in ((0, 0), (header.entries - 1, header.sequences)):
            if self.documents[entry] != expected:
                raise DataError(
                    f"{self.idx_path}: offset {header.documents_at + 8 * entry} holds document entry "
                    f"{self.documents[entry]}, but the entries must run from 0 to the {header.sequences} sequences"
                )
        if header.sequences:
            self._place(header.sequences - 1)

    @property
    def dtype(self) -> str:
        """Of the tokens, as numpy writes it."""
        return self.header.dtype

    @property
    def num_sequences(self) -> int:
        """Sequences, empty ones included."""
        return self.header.sequences

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return self.header.entries - 1

    @property
    def bin_view(self) -> memoryview:
        """The bytes of ``PREFIX.bin``."""
        return self._bin.view

    def sequence(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a sequence, by default all of it, in the type of the file: (tokens,).

        IndexError outside of the sequence, DataError where the index points outside of the file.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        self._idx.stamp()
        self._bin.stamp()
        pointer, length = self._place(int(index))
        stop = length if stop is None else int(stop)
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens [{start}, {stop}) of a sequence of {length}")
        at = pointer + self.itemsize * int(start)
        return np.frombuffer(self._bin.view, self.dtype, stop - int(start), at).copy()

    def mode(self, index: int) -> int | None:
        """Mode of a sequence, in multimodal datasets."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        return None if self.modes is None else int(self.modes[index])

    def document(self, index: int) -> tuple[int, int]:
        """Sequences [first, last) of a document; the two are equal where it is empty."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        self._idx.stamp()
        first, last = int(self.documents[index]), int(self.documents[index + 1])
        if not 0 <= first <= last <= self.num_sequences:
            raise self._falling(index)
        return first, last

    def validate(self) -> None:
        """Check every entry of the index: DataError at the first that is out of bounds. Reads the whole index."""
        for start in range(0, self.num_documents, _CHUNK):
            entries = self.documents[start : start + _CHUNK + 1]
            wrong = np.flatnonzero(
                (entries[1:] < entries[:-1]) | (entries[1:] > self.num_sequences) | (entries[:-1] < 0)
            )
            if len(wrong):
                raise self._falling(start + int(wrong[0]))
        for start in range(0, self.num_sequences, _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype(np.int64)
            pointers = self.pointers[start : start + _CHUNK]
            room = self._bin.size - lengths * self.itemsize
            wrong = np.flatnonzero((lengths < 0) | (pointers < 0) | (pointers > room))
            if len(wrong):
                self._place(start + int(wrong[0]))

    def _place(self, index: int) -> tuple[int, int]:
        """(byte offset, tokens) of a sequence, which lies within the file."""
        pointer, length = int(self.pointers[index]), int(self.lengths[index])
        if length < 0:
            raise DataError(
                f"{self.idx_path}: offset {self.header.lengths_at + 4 * index} says that sequence {index} has {length} "
                f"tokens; {_REMEDY}"
            )
        if not 0 <= pointer <= self._bin.size - self.itemsize * length:
            raise DataError(
                f"{self.idx_path}: offset {self.header.pointers_at + 8 * index} puts the {length} tokens of sequence "
                f"{index} at offset {pointer} of {self.bin_path}, which ends at {self._bin.size}: one of the two is "
                f"truncated or of another dataset; {_REMEDY}"
            )
        return pointer, length

    def _falling(self, document: int) -> DataError:
        return DataError(
            f"{self.idx_path}: offset {self.header.documents_at + 8 * document} holds the document entries "
            f"{self.documents[document]} and {self.documents[document + 1]}, which must not fall nor leave the "
            f"{self.num_sequences} sequences; {_REMEDY}"
        )


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{path}: cannot be read: {reason}; a Megatron-LM dataset is a .bin and an .idx file of one prefix"
        ) from None
