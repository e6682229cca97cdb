"""Predictions in files: JSONL, a line for each record, in their order.

A line says which record it is for by its number, its name where it has one, and a hash of what it was predicted from.
So predictions that are read back for other records, or for the same in another order, are refused and not measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalm.data.labelled.lines import read_lines
from megalm.data.labelled.request import ID
from megalm.errors import DataError
from megalm.files import write_text
from megalm.plugin.contract.records import FieldSpec, Record

_DIGITS = 16


def write_predictions(
    path: Path, records: Sequence[Record], fields: Mapping[str, FieldSpec], predictions: Sequence[Any]
) -> None:
    """Write them, whole or not at all. ``fields``: the head's."""
    if len(records) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(records)} records")
    lines = []
    for number, (record, prediction) in enumerate(zip(records, predictions, strict=True)):
        own = {ID: record[ID]} if ID in record else {}
        line = {"record": number, **own, "of": _hash(record, fields), "prediction": prediction}
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    try:
        write_text(path, "".join(lines))
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None


def read_predictions(path: Path, records: Sequence[Record], fields: Mapping[str, FieldSpec]) -> list[Any]:
    """The predictions of a file for these records. DataError, with file and line, where they are not for them."""
    lines = read_lines(path)
    if len(lines) != len(records):
        raise DataError(f"{path}: has {len(lines)} predictions, but the data has {len(records)} records")
    found = []
    for number, (text, record) in enumerate(zip(lines, records, strict=True)):
        place = f"{path}: line {number + 1}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(line, dict) or "prediction" not in line:
            raise DataError(f"{place}: expected an object with record, of and prediction")
        if line.get("record") != number or line.get("of") != _hash(record, fields):
            raise DataError(
                f"{place}: is a prediction for record {line.get('record')} of other data, or read in another way; "
                "give the data that it was made from"
            )
        found.append(line["prediction"])
    return found


def _hash(record: Record, fields: Mapping[str, FieldSpec]) -> str:
    """Of what a prediction may depend on: everything but labels."""
    given = {name: record[name] for name, spec in fields.items() if name in record and not spec.label}
    text = json.dumps(given, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
