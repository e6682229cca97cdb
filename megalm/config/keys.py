"""Dotted keys: how they are written, and nested tables as flat ones.

Everything that a person reads about the configuration (errors, ``--explain``, differences) names a value by its
dotted key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def quote(text: str) -> str:
    """Text as a TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_key(key: str) -> str:
    """One part of a key, quoted where TOML asks for it."""
    return key if _BARE.fullmatch(key) else quote(key)


def dotted(path: tuple[str | int, ...]) -> str:
    """``("a", "b", 1)`` to ``a.b[1]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{write_key(part)}"
    return text


def flatten(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of each value; lists and empty tables are values."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines such as ``train.lr: 0.001 -> 0.002``, in order of key. A null value counts as absent, as TOML has none."""
    before, after = ({path: v for path, v in flatten(side) if v is not None and v != {}} for side in (old, new))
    absent = object()

    def show(value: Any) -> str:
        return "(not set)" if value is absent else json.dumps(value, ensure_ascii=False, default=str)

    lines = []
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path, absent), after.get(path, absent)
        if a != b or isinstance(a, bool) != isinstance(b, bool):
            lines.append(f"{dotted(path)}: {show(a)} -> {show(b)}")
    return lines
