"""metrics.jsonl: one JSON object a line, appended as the run goes.

The file is the run's memory between processes, so three things are settled here. A line is written whole and flushed,
so a killed run loses at most its last line, and readers ignore a last line that is torn. A resumed run first drops
the steps that it is about to repeat, so that each step stands once. And every line is valid JSON, which has no NaN: a
value that is not finite is written as the string "nan", "inf" or "-inf", which says more than null and is read back
as the float.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from megalm import files
from megalm.errors import DataError

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""How values that JSON lacks are written."""


def encode(value: Any) -> Any:
    """``value`` with each float that is not finite, at any depth, replaced by its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`."""
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON of ``value`` in UTF-8-able text, keys in the given order. Raises TypeError for what JSON cannot hold."""
    return json.dumps(encode(value), ensure_ascii=False, allow_nan=False, indent=indent)


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of ``path`` in order; none where it does not exist. A last line without its newline is ignored.

    Raises DataError, naming file and line, where a complete line is not a JSON object with an integer ``step``.
    """
    return [record for record, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = decode(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a line of JSON ({error}); mend or remove the file") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise DataError(f"{path}:{number}: expected an object with an integer 'step'; mend or remove the file")
        found.append((record, line))
    return found


class MetricsFile:
    """Appends to metrics.jsonl. Used on rank 0; the folder must exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def truncate_after(self, step: int) -> None:
        """Drop the objects of steps later than ``step``, and a torn last line. Atomic; comes before :meth:`append`."""
        self.close()
        if not self.path.exists():
            return
        kept = [line for record, line in _lines(self.path) if record["step"] <= step]
        data = b"".join(kept)
        if len(data) != self.path.stat().st_size:
            files.write_text(self.path, data.decode("utf-8"))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one object; it must hold an integer ``step``. The line has left this process when this returns."""
        if type(record.get("step")) is not int:
            raise TypeError(f"a metrics record needs an integer 'step', got {record.get('step')!r}")
        line = dumps(record) + "\n"
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Sync to disk and close. A later :meth:`append` opens the file again."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
