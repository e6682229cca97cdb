"""JSONL: an object a line, whose values are those of the fields as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalm.data.labelled.answers import answer_spans
from megalm.data.labelled.lines import read_lines
from megalm.data.labelled.records import Place, Records
from megalm.data.labelled.request import Request, RowError, add
from megalm.plugin.suggest import did_you_mean

MENDED = "answers whose place was wrong"


def read_jsonl(path: Path, request: Request, records: Records) -> None:
    """Add the rows of a JSONL file; blank lines are passed over. Null is no value."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        place = Place(path, number, number)
        try:
            row = json_object(line)
            if any(str(row.get(key)) != value for key, value in request.only.items()):
                continue
            mended = 0
            record: dict[str, Any] = {}
            for name in request.wanted:
                key = request.column(name)
                if key not in row and not request.optional(name) and name in request.columns:
                    known = ", ".join(map(repr, list(row)[:10])) or "none"
                    raise RowError(
                        "a missing key",
                        f"no key {key!r} for the field {name!r}, only {known}{did_you_mean(key, list(row))}",
                    )
                if row.get(key) is None:
                    continue
                record[name] = row[key]
                spec = request.fields.get(name)
                if spec is not None and spec.kind == "spans" and isinstance(row[key], dict):
                    context = row.get(request.column(spec.of or ""))
                    record[name], wrong = answer_spans(context, row[key].get("text"), row[key].get("answer_start"))
                    mended += wrong
        except RowError as error:
            add(records, request, place, error)
            continue
        add(records, request, place, record)
        if mended:
            records.mended[MENDED] += mended


def json_object(line: str) -> dict[str, Any]:
    """The object of a line. RowError where it holds none, or text that is no Unicode."""
    try:
        row = json.loads(line.strip(), parse_constant=_no_number)
    except json.JSONDecodeError as error:
        message = f"column {error.colno}: not valid JSON: {error.msg}; expected one object a line"
        raise RowError("not valid JSON", message) from None
    except (ValueError, RecursionError) as error:
        raise RowError("not valid JSON", f"not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError("not an object", f"expected an object, found {type(row).__name__}")
    if "\\u" in line:
        check_unicode(row)
    return row


def check_unicode(value: Any) -> None:
    """RowError where any text holds half of a surrogate pair, which an escape can spell and no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"character {error.start} of {value[:40]!r} is half of a surrogate pair, which is not valid text"
            raise RowError("not valid Unicode", message) from None
    elif isinstance(value, list):
        for each in value:
            check_unicode(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            check_unicode(key)
            check_unicode(each)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")
