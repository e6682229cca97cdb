"""RUN.toml with ``--set`` on top, as one table that remembers where each value came from."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.keys import dotted
from megalm.config.positions import Path as KeyPath
from megalm.config.positions import key_lines
from megalm.errors import ConfigError

_PLACE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")


@dataclass
class Source:
    """The raw configuration and the origin of its values."""

    file: str
    """RUN.toml as the user named it."""
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    sets: dict[KeyPath, str] = field(default_factory=dict)
    """Values from the command line, each with its ``key=value``."""

    def place(self, path: KeyPath) -> str:
        """Where a message about a key points: ``--set key=value``, ``FILE:LINE`` of the key or of the nearest table
        around it, else ``FILE``."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.sets:
                return f"--set {self.sets[path[:end]]}"
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return self.file

    def origin(self, path: KeyPath) -> str | None:
        """``--set`` or ``FILE:LINE`` for a value that was given (as itself, or as part of a list), None for others."""
        if path in self.sets:
            return "--set"
        return f"{self.file}:{self.lines[path]}" if path in self.lines else None

    def order(self, path: KeyPath) -> tuple[int, int]:
        """Sorts problems as the file has them, those of the command line last."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.sets:
                return (1, list(self.sets).index(path[:end]))
            if path[:end] in self.lines:
                return (0, self.lines[path[:end]])
        return (0, 10**9)


def read_source(path: Path, overrides: Sequence[str]) -> Source:
    """Read the file and apply ``key=value`` pairs. ConfigError with every problem of their syntax."""
    problems: list[str] = []
    data: dict[str, Any] = {}
    text = _read(path, problems)
    if text is not None:
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            problems.append(_syntax(path, text, error))
        except RecursionError:
            problems.append(f"{path}: values are nested too deeply")
    readable = not problems
    source = Source(str(path), data, key_lines(text) if text is not None and readable else {})
    for pair in overrides:
        try:
            keys, value = parse_override(pair)
            if readable:
                _assign(source, keys, value, pair)
        except ValueError as error:
            problems.append(f"--set {pair}: {error}")
    if problems:
        raise ConfigError(problems)
    return source


def _read(path: Path, problems: list[str]) -> str | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        problems.append(f"{path}: no such file; name the TOML file of the run")
    except IsADirectoryError:
        problems.append(f"{path}: is a directory; name the TOML file of the run")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
    else:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            problems.append(f"{path}:{line}: is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}")
    return None


def _syntax(path: Path, text: str, error: tomllib.TOMLDecodeError) -> str:
    message = str(error)
    match = _PLACE.search(message)
    line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
    if match is not None:
        message = message[: match.start()]
        if match[1]:
            line, column = int(match[1]), int(match[2])
    return f"{path}:{line}:{column}: is not valid TOML: {message[:1].lower()}{message[1:]}"


def parse_override(pair: str) -> tuple[tuple[str, ...], Any]:
    """``a.b=value`` to its keys and value: TOML where it is TOML, else text. ValueError for what is no pair."""
    name, equals, text = pair.partition("=")
    if not equals:
        raise ValueError("expected key=value, such as train.lr=3e-4")
    keys: list[str] = []
    try:
        table: Any = tomllib.loads(f"{name.strip()} = 0")
        while isinstance(table, dict) and len(table) == 1:
            ((key, table),) = table.items()
            keys.append(key)
    except (tomllib.TOMLDecodeError, RecursionError):
        table = None
    if table != 0 or not keys:
        raise ValueError(f'"{name.strip()}" is not a dotted key such as train.lr; quote odd parts: objective."a:b".c')
    try:
        values = tomllib.loads(f"value = {text.strip()}")
        if values.keys() == {"value"}:
            return tuple(keys), values["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        pass
    return tuple(keys), text.strip()


def _assign(source: Source, keys: tuple[str, ...], value: Any, pair: str) -> None:
    """Set one value; a table is merged, key by key."""
    table = source.data
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError(f"{dotted(keys[:depth])} is a value, not a table that could hold {dotted(keys[depth:])}")
    for path, leaf in _leaves(keys, value):
        inner = source.data
        for key in path[:-1]:
            nested = inner.get(key)
            inner[key] = inner = nested if isinstance(nested, dict) else {}
        inner[path[-1]] = leaf
        for known in [p for p in source.lines if p[: len(path)] == path]:
            del source.lines[known]
        source.sets[path] = pair


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    else:
        yield path, value
