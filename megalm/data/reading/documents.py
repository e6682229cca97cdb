"""A piece of an input as documents, whatever kind of file it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megalm.data.extras import parquet_file
from megalm.data.progress import Tick
from megalm.data.reading.blocks import Blocks
from megalm.data.reading.inputs import InputFile, describe
from megalm.data.reading.options import Reading
from megalm.data.reading.rows import json_rows, parquet_rows
from megalm.data.reading.source import Source
from megalm.data.reading.units import Unit
from megalm.errors import DataError

_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_FIRST_EMPTY_LINES = re.compile(r"(?:[^\S\n]*\n)+")
_LAST_EMPTY_LINE = re.compile(r"\n[^\S\n]*\Z")


def read_documents(path: Path, reading: Reading, tick: Tick | None = None) -> Iterator[str]:
    """Documents of a whole file, for readers that work on one file after another. Raises as :func:`read_unit`, and
    DataError where the file holds no text."""
    file = describe(path)
    stop = parquet_file(path).metadata.num_row_groups if file.kind == "parquet" else file.size
    empty = True
    with Source(path, 0, file.size, tick) as source:
        for document in read_unit(file, Unit(0, stop, file.size), reading, source):
            empty = False
            yield document
    if empty:
        raise DataError(f"{path}: holds no text")


def read_unit(file: InputFile, unit: Unit, reading: Reading, source: Source) -> Iterator[str]:
    """Documents of a piece, which ``source`` holds the bytes of: ``text`` cut as ``reading`` says, or rows. Documents
    without a visible character are left out, and counted where they are rows.

    Raises DataError, naming file and byte offset or line, for what is not valid UTF-8 text, JSONL or Parquet, or is
    too long, unless it is to be skipped.
    """
    if file.kind == "parquet":
        pieces = parquet_rows(file, unit, reading)
    else:
        blocks = Blocks(file, unit, reading, source)
        pieces = json_rows(blocks, reading) if file.kind == "jsonl" else _texts(blocks, reading)
    for document in pieces:
        if document and not document.isspace():
            yield document
        elif file.kind != "text":
            reading.skipped["empty"] += 1


def _texts(blocks: Blocks, reading: Reading) -> Iterator[str]:
    for text, _ in blocks:
        if reading.documents == "line":
            yield from text.split("\n")
        elif reading.documents == "file":
            yield text.strip("\n")
        else:
            first = _FIRST_EMPTY_LINES.match(text)
            body = text[first.end() :] if first is not None else text
            *whole, last = _EMPTY_LINES.split(body)
            yield from whole
            yield _LAST_EMPTY_LINE.sub("", last).rstrip("\n") if last[-1:].isspace() else last
