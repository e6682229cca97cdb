"""Writing TOML. The standard library only reads it, and the resolved configuration is a tree of plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalm.config.keys import quote, write_key


def dumps(table: Mapping[str, Any]) -> str:
    """TOML text that reads back as the same table. None, which TOML lacks, is left out; so are empty tables at the top.

    TypeError for None inside a list and for values other than text, numbers, booleans, lists and tables.
    """
    return "\n".join(_table(table, ())).strip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    plain = {k: v for k, v in table.items() if v is not None and (not isinstance(v, Mapping) or (path and not v))}
    if plain and path:
        yield ""
        yield f"[{'.'.join(map(write_key, path))}]"
    for key, value in plain.items():
        yield f"{write_key(key)} = {write_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _table(value, (*path, key))


def write_value(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(write_value, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{write_key(k)} = {write_value(v)}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(pairs)}}}"
    raise TypeError(f"cannot be written as TOML: {value!r}")
