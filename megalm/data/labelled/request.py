"""What is to be read of a file, and how the readers add what they find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalm.data.labelled.records import Place, Records
from megalm.errors import DataError
from megalm.plugin.contract.records import FieldSpec
from megalm.plugin.suggest import did_you_mean

ID = "id"
"""A record may have a name of its own, which predictions repeat."""


@dataclass(frozen=True)
class Request:
    """Which fields are wanted, and where they are.

    ``columns``: the column, key or place of a field that is called otherwise; ``only``: columns with the values that a
    row must have to be read. Without ``labelled``, fields that are labels may be missing.
    """

    fields: Mapping[str, FieldSpec]
    columns: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)
    labelled: bool = True
    skip: bool = False
    """Leave out and count rows that cannot be read, instead of stopping."""
    header: bool | None = None
    """Of tables: the first row names the columns; default: it does unless columns are given by number."""

    def __post_init__(self) -> None:
        for name in self.columns:
            if name != ID and name not in self.fields:
                raise DataError(
                    f"a column is given for {name!r}, which the head does not read; it reads "
                    f"{', '.join(self.fields)}{did_you_mean(name, self.fields)}"
                )

    def column(self, name: str) -> str:
        """Where a field is."""
        return self.columns.get(name, name)

    def optional(self, name: str) -> bool:
        """Whether a field may be missing from a whole file."""
        return name not in self.columns and (name == ID or (self.fields[name].label and not self.labelled))

    @property
    def wanted(self) -> tuple[str, ...]:
        """The fields, and the record's own name."""
        return (*self.fields, ID)


class RowError(Exception):
    """A row that cannot be read: why in general, and in particular."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def add(records: Records, request: Request, place: Place, row: dict[str, Any] | RowError) -> None:
    """Keep a row, or say what is wrong with it: DataError, or a count where such rows are skipped."""
    if not isinstance(row, RowError):
        records.rows.append(row)
        records.places.append(place)
    elif request.skip:
        records.skipped[row.reason] += 1
    else:
        raise DataError(f"{place}: {row.message}")
