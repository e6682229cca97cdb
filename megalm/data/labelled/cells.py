"""A cell of a table as a value of the kind that a field holds; a cell is text, whatever it says."""

from __future__ import annotations

import re
from typing import Any

from megalm.plugin.contract.records import FieldKind

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_SPAN = re.compile(r"(\d+)[:-](\d+)")


def cell_value(text: str, kind: FieldKind) -> Any:
    """The value that a cell holds. ValueError says what was expected where it holds none.

    Words and tags are divided by spaces, labels and spans by commas; a span is ``start:stop``.
    """
    if kind == "text":
        return text
    text = text.strip()
    if kind == "class":
        return text
    if kind in ("words", "tags"):
        return text.split(" ") if text else []
    if kind == "number":
        if not _NUMBER.fullmatch(text):
            raise ValueError(f"expected a number such as 2.5, found {text!r}")
        return float(text)
    items = [item.strip() for item in text.split(",")] if text else []
    if kind == "classes":
        return items
    spans = [_span(item) for item in items]
    if kind == "span":
        if len(spans) != 1:
            raise ValueError(f"expected start:stop, found {text!r}")
        return spans[0]
    return spans


def _span(text: str) -> list[int]:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"expected start:stop in characters, such as 3:7, found {text!r}")
    return [int(match[1]), int(match[2])]
