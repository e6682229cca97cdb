"""RUN.toml with ``--set`` on top, as one table that remembers where each value came from."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.keys import dotted
from megalm.config.positions import Path as KeyPath
from megalm.config.positions import key_lines
from megalm.errors import ConfigError

_PLACE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")
_DEEPEST = 32
_LONGEST_PAIR = 120


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
        known = self._nearest(path)
        if known in self.sets:
            return f"--set {shown(self.sets[known])}"
        return f"{self.file}:{self.lines[known]}" if known in self.lines else self.file

    def origin(self, path: KeyPath) -> str | None:
        """``--set`` or ``FILE:LINE`` for a value that was given (as itself, or as part of a list), None for others."""
        if path in self.sets:
            return "--set"
        return f"{self.file}:{self.lines[path]}" if path in self.lines else None

    def order(self, path: KeyPath) -> tuple[int, int]:
        """Sorts problems as the file has them, those of the command line last."""
        known = self._nearest(path)
        if known in self.sets:
            return (1, list(self.sets).index(known))
        return (0, self.lines.get(known, 10**9))

    def apply(self, pairs: Iterable[str]) -> list[str]:
        """Put ``key=value`` pairs of the command line on top; returns what is wrong with their syntax."""
        problems = []
        for pair in pairs:
            try:
                self._assign(*parse_override(pair), pair)
            except ValueError as error:
                problems.append(f"--set {shown(pair)}: {error}")
        return problems

    def _assign(self, keys: tuple[str, ...], value: Any, pair: str) -> None:
        """Set one value; a table is merged, key by key."""
        table = self.data
        for depth, key in enumerate(keys[:-1], 1):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ValueError(
                    f"{dotted(keys[:depth])} is a value, not a table that could hold {dotted(keys[depth:])}"
                )
        for path, leaf in _leaves(keys, value):
            inner = self.data
            for depth, key in enumerate(path[:-1], 1):
                if not isinstance(inner.get(key), dict):
                    inner[key] = {}
                    self.lines.pop(path[:depth], None)
                inner = inner[key]
            inner[path[-1]] = leaf
            for known in [p for p in self.lines if p[: len(path)] == path]:
                del self.lines[known]
            self.sets[path] = pair

    def _nearest(self, path: KeyPath) -> KeyPath:
        """The key itself, what the command line puts under it, or the nearest table around it; () where none is."""
        inside = (known for known in self.sets if path and known[: len(path)] == path)
        around = (path[:end] for end in range(len(path) - 1, 0, -1))
        return next((p for p in (path, *inside, *around) if p in self.sets or p in self.lines), ())


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
        except ValueError:  # thousands of digits
            problems.append(f"{path}: holds an integer of more than 64 bits")
    source = Source(str(path), data, key_lines(text) if text is not None and not problems else {})
    problems += [f"{source.place(where)}: {dotted(where)}: {what}" for where, what in _unusable(data)]
    problems += source.apply(overrides)
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
            return raw.decode("utf-8").removeprefix("\ufeff")
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
    value: Any = text.strip()
    try:
        read = tomllib.loads(f"value = {value}")
        # Dates have no use here: they stay the text that was written.
        if read.keys() == {"value"} and not isinstance(read["value"], (datetime.date, datetime.time)):
            value = read["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        pass
    except ValueError:  # thousands of digits
        raise ValueError(f"{dotted(tuple(keys))}: is an integer of more than 64 bits") from None
    for where, what in _unusable(value, tuple(keys)):
        raise ValueError(f"{dotted(where)}: {what}")
    return tuple(keys), value


def shown(pair: str) -> str:
    """A ``key=value`` of the command line in one line of a message."""
    text = " ".join(pair.split())
    return text if len(text) <= _LONGEST_PAIR else f"{text[:_LONGEST_PAIR]}..."


def _unusable(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Where a value is none that TOML promises to hold, though the parser, or the command line, let it through."""
    if len(path) > _DEEPEST:
        yield path[:4], f"is nested more than {_DEEPEST} levels deep"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, "is an integer of more than 64 bits"
    elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        yield path, "is text that is not valid UTF-8"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _unusable(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unusable(inner, (*path, index))


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    else:
        yield path, value
