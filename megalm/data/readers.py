"""Input files as streams of documents, with errors that say where.

Text files are read as bytes, line by line, and decoded here: Python's text mode hides the byte offset of a wrong
character, and replaces or passes what must be refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

from megalm.errors import DataError

Documents = Literal["blank-line", "line", "file"]
"""How a text file is cut: at empty lines, at every line, or not at all. A row of a JSONL file is always a document."""
DOCUMENTS: tuple[str, ...] = get_args(Documents)

_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Source(io.RawIOBase):
    """An input file that counts and hashes the bytes read from it. ``tick`` is called with the bytes of each read."""

    def __init__(self, path: Path, tick: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.path = path
        self.size = check_input(path)
        self.count = 0
        self._digest = hashlib.sha256()
        self._tick = tick
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        self.count += count
        if self._tick is not None:
            self._tick(count)
        return count

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()

    @property
    def sha256(self) -> str:
        """Hex digest of what was read so far."""
        return self._digest.hexdigest()


def check_input(path: Path) -> int:
    """Size of an input file. DataError unless it is a regular, non-empty file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: is a folder; name the files in it, for instance {path}/*.txt")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is not a regular file; write its contents to a file first")
    if status.st_size == 0:
        raise DataError(f"{path}: is empty")
    return status.st_size


def read_documents(source: Source, documents: Documents, text_key: str) -> Iterator[str]:
    """Documents of one input: text or JSONL (by suffix .jsonl, .ndjson or .json), either of them compressed with gzip
    (by content). Documents without a visible character are left out.

    Raises DataError, naming file and byte offset or line, for what is not valid UTF-8 text or JSONL.
    """
    path = source.path
    buffered = io.BufferedReader(source, 1 << 20)
    zipped = buffered.peek(2)[:2] == _GZIP_MAGIC
    stream: io.BufferedIOBase = gzip.GzipFile(fileobj=buffered, mode="rb") if zipped else buffered
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    lines = _lines(path, stream, zipped)
    found = False
    pieces = _json_rows(path, lines, text_key) if kind in _JSON_SUFFIXES else _cut(lines, documents)
    for document in pieces:
        if document and not document.isspace():
            found = True
            yield document
    if not found:
        raise DataError(f"{path}: holds no text")


def _lines(path: Path, stream: io.BufferedIOBase, zipped: bool) -> Iterator[str]:
    """Lines with their ends, line breaks as "\\n"."""
    where = "byte offset {} of the uncompressed text" if zipped else "byte offset {}"
    offset = 0
    while True:
        try:
            raw = stream.readline()
        except EOFError:
            raise DataError(
                f"{path}: the gzip file is truncated: it ends at byte {path.stat().st_size}, "
                f"{offset} bytes of text into it"
            ) from None
        except (OSError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read after {where.format(offset)}: {error}") from None
        if not raw:
            return
        start = offset
        offset += len(raw)
        if start == 0 and raw.startswith(_BOM):
            start, raw = len(_BOM), raw[len(_BOM) :]
        nul = raw.find(b"\0")
        if nul >= 0:
            raise DataError(
                f"{path}: {where.format(start + nul)} holds a NUL byte: the file is binary, or text in UTF-16; "
                "convert it to UTF-8 text"
            )
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: {where.format(start + error.start)} holds 0x{raw[error.start]:02x}, which is not valid UTF-8 "
                f"({error.reason}); convert the file to UTF-8"
            ) from None
        yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _cut(lines: Iterator[str], documents: Documents) -> Iterator[str]:
    if documents == "line":
        for line in lines:
            yield line.rstrip("\n")
        return
    held: list[str] = []
    for line in lines:
        if documents == "blank-line" and line.isspace():
            if held:
                yield "".join(held).rstrip("\n")
                held.clear()
        else:
            held.append(line)
    yield "".join(held).strip("\n")


def _json_rows(path: Path, lines: Iterator[str], text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}, column {error.colno}: not valid JSON: {error.msg}; expected one object a line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not usable JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f'{where}: expected an object with key "{text_key}", found a {_json_type(row)}')
        if text_key not in row:
            keys = ", ".join(f'"{key}"' for key in sorted(row)[:10]) or "no keys"
            raise DataError(f'{where}: no key "{text_key}", only {keys}; name the key of the text with --text-key')
        text = row[text_key]
        if not isinstance(text, str):
            raise DataError(f'{where}: "{text_key}" is a {_json_type(text)}, expected a string')
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f'{where}: character {error.start} of "{text_key}" is half of a surrogate pair, which is not valid text'
            ) from None
        yield text


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
