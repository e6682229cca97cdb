"""Labelled records from files, in whichever of the formats they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from megalm.data.labelled.conll import read_conll
from megalm.data.labelled.jsonl import read_jsonl
from megalm.data.labelled.records import Records
from megalm.data.labelled.request import Request
from megalm.data.labelled.squad import read_squad
from megalm.data.labelled.table import read_csv, read_tsv
from megalm.errors import DataError
from megalm.plugin.contract.records import FieldSpec

Format = Literal["tsv", "csv", "jsonl", "conll", "squad"]
FORMATS: tuple[str, ...] = get_args(Format)
_READERS: Mapping[str, Callable[[Path, Request, Records], None]] = {
    "tsv": read_tsv,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "conll": read_conll,
    "squad": read_squad,
}
_SUFFIXES = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".conll": "conll",
    ".conllu": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".json": "squad",
}
_PACKED = (".gz", ".zst", ".zstd")


def format_of(path: Path) -> str:
    """The format that a file's name tells; DataError where it tells none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _SUFFIXES:
        raise DataError(f"{path}: the name does not tell the format; give one of {', '.join(FORMATS)}")
    return _SUFFIXES[suffixes[-1]]


def read_records(
    paths: Sequence[Path],
    fields: Mapping[str, FieldSpec],
    *,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    only: Mapping[str, str] | None = None,
    header: bool | None = None,
    labelled: bool = True,
    skip: bool = False,
) -> Records:
    """The records of files, in order, with their places.

    Args:
        paths: files in UTF-8, plain or packed with gzip or Zstandard.
        fields: a head's.
        format: default: what each file's name tells.
        columns: where a field is that the file calls otherwise: ``{"text": "sentence"}``, or by number from 1.
        only: which rows to read: ``{"split": "test"}``, by column, key, or what a CoNLL file says of a sentence.
        header: of tables: whether the first row names the columns; default: unless columns are given by number.
        labelled: without it, labels may be missing.
        skip: leave out and count rows that cannot be read.

    DataError names file and line of what cannot be read, or what no row had. What the values are worth is checked by
    whoever knows the labels, :func:`megalm.data.labelled.records.corpus_problems`.
    """
    request = Request(fields, columns or {}, only or {}, labelled, skip, header)
    records = Records()
    for path in paths:
        _READERS[format or format_of(path)](path, request, records)
    if not records:
        told = ", ".join(f"{key}={value}" for key, value in request.only.items())
        left = "; skipped: " + ", ".join(f"{n} {why}" for why, n in records.skipped.items()) if records.skipped else ""
        raise DataError(f"{', '.join(map(str, paths))}: no records{f' with {told}' if told else ''}{left}")
    return records
