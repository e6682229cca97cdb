"""CoNLL: a word a line with its columns, an empty line after each sentence.

Columns are divided by tabs where a file has any, else by white space. ``-DOCSTART-`` lines divide documents and are
passed over. A line ``# key = value`` says something of the sentence that follows; in a file with tabs, any other line
that begins with ``# `` and has none is passed over. Words such as ``#tag`` are words. A byte order mark alone on a
line, which joining files leaves behind, makes it no less empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalm.data.labelled.lines import read_lines
from megalm.data.labelled.records import Place, Records
from megalm.data.labelled.request import ID, Request, RowError, add
from megalm.errors import DataError

_SAYS = re.compile(r"#\s+([\w.-]+)\s*=\s*(.*?)\s*")
_DOCUMENT = "-DOCSTART-"
_MARK = "\ufeff"
_Sentence = tuple[int, list[tuple[int, list[str]]], dict[str, str]]


def read_conll(path: Path, request: Request, records: Records) -> None:
    """Add the sentences of a CoNLL file. Words are its first column and tags its last, unless ``columns`` gives
    numbers, from 1, or from the end as ``-1``.
    """
    words = [name for name, spec in request.fields.items() if spec.kind == "words"]
    tags = [name for name, spec in request.fields.items() if spec.kind == "tags"]
    others = [name for name in request.fields if name not in (*words, *tags)]
    if len(words) != 1 or others:
        raise DataError(
            f"{path}: CoNLL has words and tags, but this head reads {', '.join(request.fields)}; give the data as JSONL"
        )
    columns = {words[0]: "1"} | dict.fromkeys(tags, "-1") | dict(request.columns)
    places = {name: _number(path, name, column) for name, column in columns.items() if name != ID}
    lines = read_lines(path)
    width: tuple[int, int] | None = None
    for first, rows, says in _sentences(lines, tabs=any("\t" in line for line in lines if line.strip())):
        place = Place(path, first, rows[-1][0])
        record: dict[str, Any] = {ID: says["id"]} if "id" in says else {}
        problem = None
        for number, cells in rows:
            width = width or (number, len(cells))
            if len(cells) != width[1]:
                message = f"has {len(cells)} columns, but line {width[0]} has {width[1]}"
                problem = Place(path, number, number), RowError("another number of columns", message)
                break
        if any(says.get(key) != value for key, value in request.only.items()):
            continue
        if problem is not None:
            add(records, request, *problem)
            continue
        assert width is not None
        for name, at in places.items():
            if tags and width[1] == 1 and name in tags and not request.labelled and name not in request.columns:
                continue  # a file of words alone
            if not -width[1] <= at < width[1] or (width[1] == 1 and name in tags):
                raise DataError(
                    f"{path}: line {width[0]}: has {width[1]} columns, but column {columns[name]} is asked for, for "
                    f"the field {name!r}, beside the words"
                )
            record[name] = [cells[at] for _, cells in rows]
        add(records, request, place, record)


def _number(path: Path, name: str, column: str) -> int:
    if not re.fullmatch(r"-?[1-9]\d*", column):
        raise DataError(f"{path}: CoNLL has no names of columns; give that of {name!r} by number, found {column!r}")
    return int(column) - 1 if int(column) > 0 else int(column)


def _sentences(lines: list[str], *, tabs: bool) -> Iterator[_Sentence]:
    rows: list[tuple[int, list[str]]] = []
    says: dict[str, str] = {}
    for number, line in enumerate([*lines, ""], 1):
        if not line.strip().strip(_MARK):
            if rows:
                yield rows[0][0], rows, says
                rows, says = [], {}
        elif not rows and (said := _SAYS.fullmatch(line)) and "\t" not in line:
            says[said[1]] = said[2]
        elif (tabs and line.startswith("# ") and "\t" not in line) or line.startswith(_DOCUMENT):
            continue
        else:
            rows.append((number, line.rstrip("\r").split("\t") if tabs else line.split()))
