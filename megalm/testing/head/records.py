"""Made-up records for any head: what its fields ask for, drawn by address, so that record i is always the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megalm.parallel import rng
from megalm.plugin.contract.records import FieldSpec, Record

CLASSES = ("north", "east", "south")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
ALPHABETS = ("abcdefghij", "klmnopqrst", "äöüßéè", "中文字言语")
LONG_EVERY = 7
"""One record of this many is longer than most sequences."""


def default_labels(fields: Mapping[str, FieldSpec]) -> tuple[str, ...]:
    """Labels for a head with these fields; none where no field holds labels."""
    kinds = {field.kind for field in fields.values()}
    if "tags" in kinds:
        return TAGS
    return CLASSES if kinds & {"class", "classes"} else ()


def make_records(
    fields: Mapping[str, FieldSpec], labels: Sequence[str], count: int, *, seed: int = 0
) -> list[dict[str, Any]]:
    """``count`` records, of texts of one word to many."""
    return [_record(fields, labels, rng.generator("record", seed, number), number) for number in range(count)]


def unlabelled(records: Sequence[Record], fields: Mapping[str, FieldSpec]) -> list[dict[str, Any]]:
    """The records without what is to be predicted."""
    return [{k: v for k, v in record.items() if k not in fields or not fields[k].label} for record in records]


def _record(
    fields: Mapping[str, FieldSpec], labels: Sequence[str], draw: np.random.Generator, number: int
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    plain = {name: field for name, field in fields.items() if field.of is None}
    for name, field in [*plain.items(), *((n, f) for n, f in fields.items() if f.of is not None)]:
        record[name] = _value(field, labels, draw, record, long=number % LONG_EVERY == LONG_EVERY - 1)
    return record


def _value(
    field: FieldSpec, labels: Sequence[str], draw: np.random.Generator, record: Mapping[str, Any], *, long: bool
) -> Any:
    of = record.get(field.of or "")
    if field.kind == "words":
        return _words(draw, long)
    if field.kind == "text":
        return " ".join(_words(draw, long))
    if field.kind == "class":
        return str(draw.choice(labels))
    if field.kind == "classes":
        return [label for label in labels if draw.random() < 0.5]
    if field.kind == "number":
        return float(np.round(draw.normal(), 3))
    if field.kind == "tags":
        return [str(draw.choice(labels)) for _ in of or ()]
    if field.kind == "span":
        return _span(draw, len(of or " "))
    return [_span(draw, len(of or " ")) for _ in range(int(draw.integers(0, 3)))]


def _words(draw: np.random.Generator, long: bool) -> list[str]:
    count = int(draw.integers(30, 60)) if long else int(draw.integers(1, 7))
    alphabet = list(ALPHABETS[int(draw.integers(len(ALPHABETS)))])
    return ["".join(draw.choice(alphabet, size=int(draw.integers(1, 6)))) for _ in range(count)]


def _span(draw: np.random.Generator, length: int) -> list[int]:
    start = int(draw.integers(length))
    return [start, int(draw.integers(start + 1, length + 1))]
