"""The texts in rows of JSONL and Parquet, each row at fault named, or skipped and counted.

pydantic's parser reads JSONL, the fastest at hand. What it does not make a text of is given to json's, which finds what
half a pair's escape spells, and says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from megalm.data.extras import parquet_file
from megalm.data.reading.blocks import Blocks
from megalm.data.reading.inputs import InputFile
from megalm.data.reading.options import Reading
from megalm.data.reading.units import Unit
from megalm.errors import DataError

_READ = 1 << 20


def json_rows(blocks: Blocks, reading: Reading) -> Iterator[str]:
    """Texts of the rows of JSONL. DataError with file and line where one is at fault and not to be skipped."""
    rows, key = 0, reading.text_key
    for block, start in blocks.raw():
        lines = block.split(b"\n")
        for index, line in enumerate(lines):
            if not line:
                continue
            try:  # the parser takes UTF-8 alone, and hands out nothing else
                text = from_json(line, cache_strings="none")[key]
            except (ValueError, TypeError, KeyError, RecursionError):
                text = None
            if type(text) is str:
                yield text
                continue
            offset = start + sum(map(len, lines[:index])) + index
            try:
                yield from _row_texts(blocks.decode(line, offset), key)
            except _Unusable as error:
                if not reading.skip:
                    number = _lines_before(blocks.path, blocks.start) + rows + index + 1
                    raise DataError(f"{blocks.path}: line {number}{error.message}") from None
                reading.skipped[error.reason] += 1
        rows += len(lines) - 1


class _Unusable(Exception):
    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message


def _row_texts(lines: Iterable[tuple[str, int]], text_key: str) -> Iterator[str]:
    for line, _ in lines:
        if line and not line.isspace():
            yield _row_text(line, text_key)


def _row_text(line: str, text_key: str) -> str:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise _Unusable(
            "not valid JSON", f", column {error.colno}: not valid JSON: {error.msg}; expected one object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _Unusable("not valid JSON", f": not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise _Unusable("not an object", f': expected an object with key "{text_key}", found a {_json_type(row)}')
    if text_key not in row:
        keys = ", ".join(f'"{key}"' for key in sorted(row)[:10]) or "no keys"
        raise _Unusable(
            "without the text", f': no key "{text_key}", only {keys}; name the key of the text with --text-key'
        )
    text = row[text_key]
    if not isinstance(text, str):
        raise _Unusable("text is not a string", f': "{text_key}" is a {_json_type(text)}, expected a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # only an escape can spell half of a pair
        raise _Unusable(
            "not valid UTF-8",
            f': character {error.start} of "{text_key}" is half of a surrogate pair, which is not valid text',
        ) from None
    return text


def _lines_before(path: Path, offset: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(_READ, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count


def parquet_rows(file: InputFile, unit: Unit, reading: Reading) -> Iterator[str]:
    """Texts of row groups. DataError with file and row where one is at fault and not to be skipped."""
    parquet = parquet_file(file.path)
    names = parquet.schema_arrow.names
    if reading.text_key not in names:
        problem = f'no column "{reading.text_key}", only {", ".join(names[:10])}; name it with --text-key'
        if not reading.skip:
            raise DataError(f"{file.path}: {problem}")
        reading.skipped["rest of a damaged file"] += 1
        return
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(unit.start))
    batches = parquet.iter_batches(1024, list(range(unit.start, unit.stop)), [reading.text_key], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # the library raises many kinds
            if not reading.skip:
                raise DataError(f"{file.path}: cannot be read after row {row}: {error}") from None
            reading.skipped["rest of a damaged file"] += 1
            return
        if batch is None:
            return
        for value in batch.column(0):
            row += 1
            try:
                yield _parquet_text(value, reading.text_key)
            except _Unusable as error:
                if not reading.skip:
                    raise DataError(f"{file.path}: row {row}{error.message}") from None
                reading.skipped[error.reason] += 1


def _parquet_text(value: Any, text_key: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise _Unusable("not valid UTF-8", f": not valid UTF-8: {error}") from None
    if not isinstance(text, str):
        raise _Unusable("text is not a string", f': "{text_key}" is a {_json_type(text)}, expected a string')
    return text


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
