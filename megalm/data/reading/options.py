"""How inputs are read, and what of them was skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

Documents = Literal["blank-line", "line", "file"]
"""How a text file is cut: at empty lines, at every line, or not at all. A row of JSONL or Parquet always is one."""
DOCUMENTS: tuple[str, ...] = get_args(Documents)

MAX_DOCUMENT = 1 << 27
"""Bytes of the longest document that is read by default."""


@dataclass
class Reading:
    """One reader's options and counts."""

    documents: Documents = "blank-line"
    text_key: str = "text"
    skip: bool = False
    """Skip and count what cannot be used, instead of stopping."""
    max_document: int = MAX_DOCUMENT
    """A document of more bytes than this, a block more or less, is not read."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""
