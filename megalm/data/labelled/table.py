"""Tables: TSV, whose rows are lines and whose cells hold any character but a tab, and CSV as RFC 4180 has it.

TSV knows no quotes. Readers that unquote it swallow rows where a text begins with a quotation mark, and join others.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megalm.data.labelled.cells import cell_value
from megalm.data.labelled.lines import read_lines, read_text
from megalm.data.labelled.records import Place, Records
from megalm.data.labelled.request import ID, Request, RowError, add
from megalm.errors import DataError
from megalm.plugin.suggest import did_you_mean

_Row = tuple[int, int, list[str]]
_LONGEST_CELL = 1 << 30


def read_tsv(path: Path, request: Request, records: Records) -> None:
    """Add the rows of a TSV file; empty lines are passed over."""
    rows = ((number, number, line.split("\t")) for number, line in enumerate(read_lines(path), 1) if line)
    _read(path, rows, request, records)


def read_csv(path: Path, request: Request, records: Records) -> None:
    """Add the rows of a CSV file."""
    _read(path, _csv_rows(path), request, records)


def _csv_rows(path: Path) -> Iterator[_Row]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        last = 0
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}: line {last + 1}: not valid CSV: {error}") from None
            if cells is None:
                return
            first, last = last + 1, reader.line_num
            if cells:
                yield first, last, cells
    finally:
        csv.field_size_limit(limit)


def _read(path: Path, rows: Iterator[_Row], request: Request, records: Records) -> None:
    start = next(rows, None)
    if start is None:
        raise DataError(f"{path}: has no rows")
    first, _, names = start
    required = [request.column(name) for name in request.wanted if not request.optional(name)]
    header = request.header
    if header is None:
        header = not all(column.isdecimal() for column in [*required, *request.only])
    found: dict[str, int] = {}
    for name in request.wanted:
        index = _index(path, first, names, request.column(name), header, name, optional=request.optional(name))
        if index is not None:
            found[name] = index
    only = {_index(path, first, names, column, header, None): value for column, value in request.only.items()}
    if not header:
        _add(path, start, len(names), first, found, only, request, records)
    for row in rows:
        _add(path, row, len(names), first, found, only, request, records)


def _index(
    path: Path, line: int, names: Sequence[str], column: str, header: bool, field: str | None, *, optional: bool = False
) -> int | None:
    """The place of a column. DataError where it is missing and not optional."""
    what = "" if field is None else f" for the field {field!r}"
    if column.isdecimal():
        if not 1 <= int(column) <= len(names):
            raise DataError(f"{path}: line {line}: has {len(names)} columns, but column {column} is asked for{what}")
        return int(column) - 1
    if header and names.count(column) == 1:
        return names.index(column)
    if header and column in names:
        raise DataError(f"{path}: line {line}: two columns are called {column!r}; give the one{what} by number")
    if optional:
        return None
    if not header:
        raise DataError(f"{path}: without a header, columns are given by number, from 1; found {column!r}{what}")
    near = did_you_mean(column, names)
    raise DataError(
        f"{path}: line {line}: no column {column!r}{what}, only {', '.join(map(repr, names[:10]))}{near}; name the "
        "column, or give its number where the file has no header"
    )


def _add(
    path: Path,
    row: _Row,
    width: int,
    first_row: int,
    found: dict[str, int],
    only: dict[int | None, str],
    request: Request,
    records: Records,
) -> None:
    first, last, cells = row
    place = Place(path, first, last)
    if len(cells) != width:
        message = f"has {len(cells)} columns, but line {first_row} has {width}"
        add(records, request, place, RowError("another number of columns", message))
        return
    if any(index is not None and cells[index] != value for index, value in only.items()):
        return
    record: dict[str, Any] = {}
    for name, index in found.items():
        text = cells[index]
        spec = request.fields.get(name)
        if name == ID and spec is None:
            record[name] = text
            continue
        if spec is None or (spec.label and not text.strip()):
            continue  # an empty cell is a label that is not known
        try:
            record[name] = cell_value(text, spec.kind)
        except ValueError as error:
            message = f"column {index + 1}, field {name!r}: {error}"
            add(records, request, place, RowError(f"a bad {name}", message))
            return
    add(records, request, place, record)
