from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}
"""struct's letters, by Megatron-LM's codes."""


class Reference:
    """Another reader of the format, in struct alone, from the format's description."""

    def __init__(self, prefix: Path) -> None:
        idx = Path(f"{prefix}.idx").read_bytes()
        self.bin = Path(f"{prefix}.bin").read_bytes()
        assert idx[:9] == b"MMIDIDX\x00\x00"
        version, self.code, sequences, entries = struct.unpack_from("<QBQQ", idx, 9)
        assert version == 1
        at = 34
        self.lengths = struct.unpack_from(f"<{sequences}i", idx, at)
        at += 4 * sequences
        self.pointers = struct.unpack_from(f"<{sequences}q", idx, at)
        at += 8 * sequences
        self.documents = struct.unpack_from(f"<{entries}q", idx, at)
        at += 8 * entries
        self.modes = struct.unpack_from(f"<{sequences}b", idx, at) if len(idx) > at else None
        assert len(idx) == at + (sequences if self.modes else 0)

    def sequence(self, index: int) -> tuple:
        letter = FORMATS[self.code]
        return struct.unpack_from(f"<{self.lengths[index]}{letter}", self.bin, self.pointers[index])


@pytest.fixture
def reference() -> Callable[[Path], Reference]:
    return Reference


@pytest.fixture
def write_dataset() -> Callable[..., Path]:
    """Write a dataset from lists: documents of sequences of values."""

    def write(
        prefix: Path,
        documents: Sequence[Sequence[Sequence[float]]],
        code: int = 8,
        modes: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> Path:
        """``order``: in which the sequences lie in the file."""
        sequences = [sequence for document in documents for sequence in document]
        size = struct.calcsize(FORMATS[code])
        pointers = [0] * len(sequences)
        data = b""
        for i in order if order is not None else range(len(sequences)):
            pointers[i] = len(data)
            data += struct.pack(f"<{len(sequences[i])}{FORMATS[code]}", *sequences[i])
        ends = [0]
        for document in documents:
            ends.append(ends[-1] + len(document))
        idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(ends))
        idx += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        idx += struct.pack(f"<{len(sequences)}q", *pointers)
        idx += struct.pack(f"<{len(ends)}q", *ends)
        if modes is not None:
            idx += struct.pack(f"<{len(sequences)}b", *modes)
        assert size * sum(map(len, sequences)) == len(data)
        Path(f"{prefix}.bin").write_bytes(data)
        Path(f"{prefix}.idx").write_bytes(idx)
        return prefix

    return write
