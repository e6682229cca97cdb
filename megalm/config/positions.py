"""The line of every key of a TOML file, which the standard library's parser does not tell.

The text has been parsed by ``tomllib`` when it comes here, so that it is known to be valid; this scanner only has to
find where keys and values begin. It understands bare, quoted and dotted keys, table headers, arrays of tables, inline
tables and every kind of string, and it is tested against what ``tomllib`` finds in the same text.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import tomllib

Path = tuple[str | int, ...]
"""Keys from the top; an int is an index into an array."""

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}(?!")' + r"|'''.*?'{3,5}(?!')" + r'|"(?:\\.|[^"\\])*"' + r"|'[^']*'", re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}#\n]*")


def key_lines(text: str) -> dict[Path, int]:
    """Line (from 1) of each table, key and array element of valid TOML.

    Lines are an aid to messages: of text that the scanner cannot follow, those up to there are returned.
    """
    scanner = _Scanner(text.replace("\r\n", "\n"))
    with contextlib.suppress(IndexError, ValueError):
        scanner.scan()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.newlines = [i for i, c in enumerate(text) if c == "\n"]
        self.lines: dict[Path, int] = {}
        self.arrays: dict[Path, int] = {}
        """Arrays of tables, and the index of the last table in each."""

    def scan(self) -> None:
        table: Path = ()
        while self.skip(_BLANK) < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.key_value(table)

    def skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return self.at

    def take(self, pattern: re.Pattern[str]) -> str:
        start = self.at
        return self.text[start : self.skip(pattern)]

    def line(self) -> int:
        return bisect.bisect_left(self.newlines, self.at) + 1

    def header(self) -> Path:
        line, array = self.line(), self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        keys = self.keys()
        self.at += 2 if array else 1
        path: Path = ()
        for number, key in enumerate(keys, 1):
            path = (*path, key)
            self.lines.setdefault(path, line)
            if array and number == len(keys):
                self.arrays[path] = self.arrays.get(path, -1) + 1
            if path in self.arrays:
                path = (*path, self.arrays[path])
        self.lines[path] = line
        return path

    def keys(self) -> list[str]:
        """A dotted key, and the blanks around it."""
        keys = []
        while True:
            self.skip(_SPACE)
            if self.text[self.at] in "\"'":
                keys.append(tomllib.loads(f"key = {self.take(_STRING)}")["key"])
            else:
                keys.append(self.take(_BARE_KEY))
            self.skip(_SPACE)
            if self.text[self.at] != ".":
                return keys
            self.at += 1

    def key_value(self, table: Path) -> None:
        line, path = self.line(), table
        for key in self.keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self.lines[path] = line
        self.at += 1  # the equals sign
        self.skip(_SPACE)
        self.value(path)

    def value(self, path: Path) -> None:
        first = self.text[self.at]
        if first in "\"'":
            self.skip(_STRING)
        elif first == "[":
            self.at += 1
            index = 0
            while self.next_item("]"):
                self.lines[(*path, index)] = self.line()
                self.value((*path, index))
                index += 1
        elif first == "{":
            self.at += 1
            while self.next_item("}"):
                self.key_value(path)
        elif not self.take(_SCALAR):
            raise ValueError(f"no value at offset {self.at}")

    def next_item(self, end: str) -> bool:
        """Move to the next item of an array or inline table; false at its end, which is passed."""
        self.skip(_BLANK)
        if self.text[self.at] == ",":
            self.at += 1
            self.skip(_BLANK)
        if self.text[self.at] == end:
            self.at += 1
            return False
        return True
