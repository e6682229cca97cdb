"""Records in memory that know where they come from.

What is wrong with a record is found by whoever knows the head; where to look for it is known to the reader alone. So
records keep their places, and every message about one begins with file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from megalm.errors import DataError
from megalm.plugin.contract.records import FieldSpec, Record, record_problems

_SHOWN = 10


@dataclass(frozen=True)
class Place:
    """Where a record stands in a file: from line ``first`` to ``last``, counted from 1."""

    path: Path
    first: int
    last: int
    inside: str = ""
    """The way to it within a line or a document, such as ``data[0].paragraphs[2].qas[1]``."""

    def __str__(self) -> str:
        lines = f"line {self.first}" if self.first == self.last else f"lines {self.first}-{self.last}"
        return f"{self.path}: {lines}{', ' if self.inside else ''}{self.inside}"


@dataclass
class Records(Sequence[Record]):
    """Records and their places. ``skipped``: rows left out, by reason; ``mended``: what was put right, by kind."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self.rows[index], self.places[index])
        return self.rows[index]

    def take(self, order: Sequence[int]) -> Records:
        """Those of these numbers, in this order, with their places."""
        return Records([self.rows[i] for i in order], [self.places[i] for i in order])

    def where(self, index: int) -> str:
        """File and lines of a record, for messages."""
        return str(self.places[index])


def where(records: Sequence[Any], number: int) -> str:
    """How messages call a record: by file and line where they are known, else by number."""
    return records.where(number) if isinstance(records, Records) else f"record {number}"


def corpus_problems(
    records: Sequence[Record], fields: Mapping[str, FieldSpec], labels: Sequence[str], *, labelled: bool = True
) -> tuple[int, list[str]]:
    """How many records the head cannot use, and why: a line for each field of the first few."""
    bad = 0
    lines: list[str] = []
    for number, record in enumerate(records):
        found = record_problems(record, fields, labels, labelled=labelled)
        bad += bool(found)
        if len(lines) <= _SHOWN:
            lines += [f"{where(records, number)}: {text}" for text in found]
    return bad, [*lines[:_SHOWN], *["..."] * (len(lines) > _SHOWN)]


def label_names(records: Iterable[Record], fields: Mapping[str, FieldSpec]) -> tuple[str, ...]:
    """The labels that occur in fields that hold some, sorted. DataError where fields hold labels and there are none.

    Records were not checked yet: values of another type are passed over, for the check to name.
    """
    holders = [name for name, spec in fields.items() if spec.kind in ("class", "classes", "tags")]
    found: set[str] = set()
    for record in records:
        for name in holders:
            value = record.get(name)
            values = value if isinstance(value, list) else [value]
            found.update(each for each in values if isinstance(each, str))
    if holders and not found:
        raise DataError(f"no record has a label: {', '.join(map(repr, holders))} are missing everywhere")
    return tuple(sorted(found))
