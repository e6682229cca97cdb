"""The pieces that inputs are worked on in: a function of the files alone, so that workers can share them.

An uncompressed file is cut about every 16 MiB, exactly between two documents; a Parquet file between row groups. A
compressed file cannot be entered in the middle and is one piece. What is finished of a piece outlives a kill, so their
size is also what an interruption costs at most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from megalm.data.extras import parquet_file
from megalm.data.reading.inputs import InputFile
from megalm.errors import DataError

UNIT_BYTES = 1 << 24
_CHUNK = 1 << 20
_CARRY = 1 << 12
BLANK_LINES = re.compile(rb"\n(?:(?:[ \t\r\f\v]|\xc2\xa0|\xe3\x80\x80)*\n)+")
"""One or more empty lines, with the line break before them. White space that it does not know ends documents as well,
but nothing is cut there."""
_LINE = re.compile(rb"\n")


@dataclass(frozen=True)
class Unit:
    """A piece of an input file: bytes [start, stop), or row groups of a Parquet file."""

    start: int
    stop: int
    bytes: int
    """Its share of the file on disk, for showing progress."""


def plan_units(file: InputFile, documents: str) -> list[Unit]:
    """The pieces of one file, in order. DataError where it cannot be read."""
    if file.kind == "parquet":
        cuts = _row_groups(file)
    elif file.packing or (file.kind == "text" and documents == "file"):
        cuts = [0, file.size]
    else:
        cuts = _cuts(file, BLANK_LINES if file.kind == "text" and documents == "blank-line" else _LINE)
    whole = max(1, cuts[-1])
    return [Unit(start, stop, file.size * stop // whole - file.size * start // whole) for start, stop in pairwise(cuts)]


def _cuts(file: InputFile, boundary: re.Pattern[bytes]) -> list[int]:
    cuts = [0]
    try:
        with open(file.path, "rb") as stream:
            while (aim := cuts[-1] + UNIT_BYTES) < file.size:
                stream.seek(aim - 1)
                base, held = aim - 1, b""
                while chunk := stream.read(_CHUNK):
                    held += chunk
                    # A run of empty lines that reaches the end of the chunk may go on in the next.
                    match = boundary.search(held)
                    if match is not None and (match.end() < len(held) or boundary is _LINE):
                        break
                    keep = match.start() if match is not None else max(held.rfind(b"\n"), len(held) - _CARRY, 0)
                    base, held = base + keep, held[keep:]
                else:
                    break
                if base + match.end() >= file.size:
                    break
                cuts.append(base + match.end())
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}") from None
    return [*cuts, file.size]


def _row_groups(file: InputFile) -> list[int]:
    metadata = parquet_file(file.path).metadata
    cuts, held = [0], 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= UNIT_BYTES or group + 1 == metadata.num_row_groups:
            cuts.append(group + 1)
            held = 0
    return cuts if len(cuts) > 1 else [0, 0]
