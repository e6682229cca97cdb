"""A piece of an input as documents, with errors that say where.

Bytes are read in blocks, cut between documents, and decoded here: Python's text mode hides the byte offset of a wrong
character, and replaces or passes what must be refused. Where unusable documents are to be skipped, a block that holds
one is taken apart, so that only the documents at fault are left out, and each is counted.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from megalm.data.extras import parquet_file, zstd_stream
from megalm.data.inputs import InputFile, check_input, describe
from megalm.data.units import BLANK_LINES, Unit
from megalm.errors import DataError

__all__ = ["DOCUMENTS", "Documents", "Reading", "Source", "check_input", "read_documents", "read_unit"]

Documents = Literal["blank-line", "line", "file"]
"""How a text file is cut: at empty lines, at every line, or not at all. A row of JSONL or Parquet always is one."""
DOCUMENTS: tuple[str, ...] = get_args(Documents)

MAX_DOCUMENT = 1 << 27
_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_FIRST_EMPTY_LINES = re.compile(r"(?:[^\S\n]*\n)+")
_LAST_EMPTY_LINE = re.compile(r"\n[^\S\n]*\Z")


@dataclass
class Reading:
    """How inputs are read, and what was skipped."""

    documents: Documents = "blank-line"
    text_key: str = "text"
    skip: bool = False
    """Skip and count what cannot be used, instead of stopping."""
    max_document: int = MAX_DOCUMENT
    """A document of more bytes than this, a block more or less, is not read."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""


class Source(io.RawIOBase):
    """Bytes [start, stop) of a file, counted and hashed as they are read. ``tick`` is told the bytes of each read."""

    def __init__(self, path: Path, start: int, stop: int, tick: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.path = path
        self.left = stop - start
        self._digest = hashlib.sha256()
        self._tick = tick
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
            self._file.seek(start)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: self.left]
        count = self._file.readinto(view) or 0
        self._digest.update(view[:count])
        self.left -= count
        if self._tick is not None and count:
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


def read_documents(path: Path, reading: Reading, tick: Callable[[int], None] | None = None) -> Iterator[str]:
    """Documents of a whole file, for readers that work on one file after another. Raises as :func:`read_unit`, and
    DataError where the file holds no text."""
    file = describe(path)
    stop = parquet_file(path).metadata.num_row_groups if file.kind == "parquet" else file.size
    empty = True
    with Source(path, 0, file.size, tick) as source:
        for document in read_unit(file, Unit(0, 0, stop, file.size), reading, source):
            empty = False
            yield document
    if empty:
        raise DataError(f"{path}: holds no text")


def read_unit(file: InputFile, unit: Unit, reading: Reading, source: Source) -> Iterator[str]:
    """Documents of a piece, which ``source`` holds the bytes of: ``text`` cut as ``reading`` says, or rows. Documents
    without a visible character are left out, and counted where they are rows.

    Raises DataError, naming file and byte offset or line, for what is not valid UTF-8 text, JSONL or Parquet, or is
    too long, unless it is to be skipped.
    """
    if file.kind == "parquet":
        pieces = _parquet_rows(file, unit, reading)
    else:
        blocks = _Blocks(file, unit, reading, source)
        pieces = _json_rows(blocks, reading) if file.kind == "jsonl" else _texts(blocks, reading)
    for document in pieces:
        if document and not document.isspace():
            yield document
        elif file.kind != "text":
            reading.skipped["empty"] += 1


class _Blocks:
    """The text of a piece in blocks that end between documents: (text, offset of its first byte)."""

    def __init__(self, file: InputFile, unit: Unit, reading: Reading, source: Source) -> None:
        self.path = file.path
        self.start = unit.start
        self._file = file
        self._reading = reading
        self._source = source
        how = reading.documents if file.kind == "text" else "line"
        self._boundary = {"blank-line": BLANK_LINES, "line": re.compile(rb"\n"), "file": None}[how]
        self.where = "byte offset {} of the uncompressed text" if file.packing else "byte offset {}"

    def __iter__(self) -> Iterator[tuple[str, int]]:
        offset, held, dropping = self.start, b"", False
        for chunk in self._chunks():
            fresh = max(0, len(held) - 8)
            held += chunk
            cut = self._last_boundary(held, fresh)
            if cut and dropping:
                first = self._boundary.search(held)  # type: ignore[union-attr]  # where there is a cut
                skip = first.end() if first is not None else cut
                offset, held, dropping, cut = offset + skip, held[skip:], False, cut - skip
            if cut:
                yield from self._decode(held[:cut], offset)
                offset, held = offset + cut, held[cut:]
            if dropping:
                offset, held = offset + max(0, len(held) - 8), held[-8:]
            elif len(held) > self._reading.max_document:
                self._too_long(offset)
                offset, held, dropping = offset + len(held) - 8, held[-8:], True
        if held and not dropping:
            yield from self._decode(held, offset)

    def _last_boundary(self, held: bytes, fresh: int) -> int:
        """End of the last boundary that does not reach the end of what is held, 0 where there is none."""
        if self._boundary is None:
            return 0
        if self._boundary is not BLANK_LINES:
            return held.rfind(b"\n", fresh) + 1
        at = held.rfind(b"\n\n", fresh, len(held) - 1)
        if at >= 0:
            return at + 2
        found = 0
        for match in self._boundary.finditer(held, max(0, held.rfind(b"\n", 0, fresh))):
            if match.end() < len(held):
                found = match.end()
        return found

    def _too_long(self, offset: int) -> None:
        if not self._reading.skip:
            raise DataError(
                f"{self.path}: {self.where.format(offset)} starts a document of more than {self._reading.max_document} "
                "bytes; cut the text otherwise (--documents), raise --max-document-bytes, or skip such documents with "
                "--on-error skip"
            )
        self._reading.skipped["too long to read"] += 1

    def _chunks(self) -> Iterator[bytes]:
        buffered = io.BufferedReader(self._source, _BLOCK)
        try:
            yield from self._unpacked(buffered)
        finally:
            buffered.detach()  # it would close the source

    def _unpacked(self, buffered: io.BufferedReader[Any]) -> Iterator[bytes]:
        path = self.path
        stream: IO[bytes] = buffered
        failure: type[Exception] = zlib.error
        if self._file.packing == "gzip":
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=buffered, mode="rb"))
        elif self._file.packing == "zstd":
            stream, failure = zstd_stream(path, buffered)
        count = 0
        while True:
            try:
                chunk = stream.read(_BLOCK)
            except EOFError:
                problem = f"the {self._file.packing} file is truncated: it ends at byte {path.stat().st_size}, "
                problem += f"{count} bytes of text into it"
            except (OSError, failure) as error:
                problem = f"cannot be read after {self.where.format(self.start + count)}: {error}"
            else:
                if not chunk:
                    return
                count += len(chunk)
                yield chunk
                continue
            if not self._reading.skip:
                raise DataError(f"{path}: {problem}")
            self._reading.skipped["rest of a damaged file"] += 1
            return

    def _decode(self, raw: bytes, offset: int) -> Iterator[tuple[str, int]]:
        if offset == 0 and raw.startswith(_BOM):
            offset, raw = len(_BOM), raw[len(_BOM) :]
        try:
            text = raw.decode("utf-8")
            problem: tuple[int, str] | None = None
        except UnicodeDecodeError as error:
            wrong = f"0x{raw[error.start]:02x}, which is not valid UTF-8 ({error.reason})"
            problem = error.start, f"holds {wrong}; convert the file to UTF-8"
        nul = raw.find(0)
        if nul >= 0 and (problem is None or nul < problem[0]):
            problem = nul, "holds a NUL byte: the file is binary, or text in UTF-16; convert it to UTF-8 text"
        if problem is None:
            yield text.replace("\r\n", "\n") if "\r" in text else text, offset
            return
        if not self._reading.skip:
            raise DataError(f"{self.path}: {self.where.format(offset + problem[0])} {problem[1]}")
        ends = [match.end() for match in self._boundary.finditer(raw)] if self._boundary is not None else []
        if len(ends) == 0 or (len(ends) == 1 and ends[0] == len(raw)):
            self._reading.skipped["a NUL byte" if "NUL" in problem[1] else "not valid UTF-8"] += 1
            return
        start = 0
        for end in [*ends, len(raw)]:
            if start < end:
                yield from self._decode(raw[start:end], offset + start)
            start = end


def _texts(blocks: _Blocks, reading: Reading) -> Iterator[str]:
    for text, _ in blocks:
        if reading.documents == "line":
            yield from text.split("\n")
        elif reading.documents == "file":
            yield text.strip("\n")
        else:
            first = _FIRST_EMPTY_LINES.match(text)
            body = text[first.end() :] if first is not None else text
            *whole, last = _EMPTY_LINES.split(body)
            yield from whole
            yield _LAST_EMPTY_LINE.sub("", last).rstrip("\n") if last[-1:].isspace() else last


def _json_rows(blocks: _Blocks, reading: Reading) -> Iterator[str]:
    rows = 0
    for block, _ in blocks:
        lines = block.split("\n")
        for index, line in enumerate(lines):
            if not line or line.isspace():
                continue
            try:
                yield _row_text(line, reading.text_key)
            except _Unusable as error:
                if not reading.skip:
                    number = _lines_before(blocks.path, blocks.start) + rows + index + 1
                    raise DataError(f"{blocks.path}: line {number}{error.message}") from None
                reading.skipped[error.reason] += 1
        rows += len(lines) - 1


class _Unusable(Exception):
    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message


def _row_text(line: str, text_key: str) -> str:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise _Unusable(
            "not valid JSON", f", column {error.colno}: not valid JSON: {error.msg}; expected one object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _Unusable("not valid JSON", f": not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise _Unusable("not an object", f': expected an object with key "{text_key}", found a {_json_type(row)}')
    if text_key not in row:
        keys = ", ".join(f'"{key}"' for key in sorted(row)[:10]) or "no keys"
        raise _Unusable(
            "without the text", f': no key "{text_key}", only {keys}; name the key of the text with --text-key'
        )
    text = row[text_key]
    if not isinstance(text, str):
        raise _Unusable("text is not a string", f': "{text_key}" is a {_json_type(text)}, expected a string')
    if "\\u" in line:  # only an escape can spell half of a pair
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _Unusable(
                "not valid UTF-8",
                f': character {error.start} of "{text_key}" is half of a surrogate pair, which is not valid text',
            ) from None
    return text


def _lines_before(path: Path, offset: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(_BLOCK, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count


def _parquet_rows(file: InputFile, unit: Unit, reading: Reading) -> Iterator[str]:
    parquet = parquet_file(file.path)
    names = parquet.schema_arrow.names
    if reading.text_key not in names:
        problem = f'no column "{reading.text_key}", only {", ".join(names[:10])}; name it with --text-key'
        if not reading.skip:
            raise DataError(f"{file.path}: {problem}")
        reading.skipped["rest of a damaged file"] += 1
        return
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(unit.start))
    batches = parquet.iter_batches(1024, list(range(unit.start, unit.stop)), [reading.text_key], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # the library raises many kinds
            if not reading.skip:
                raise DataError(f"{file.path}: cannot be read after row {row}: {error}") from None
            reading.skipped["rest of a damaged file"] += 1
            return
        if batch is None:
            return
        for value in batch.column(0):
            row += 1
            try:
                yield _parquet_text(value, reading.text_key)
            except _Unusable as error:
                if not reading.skip:
                    raise DataError(f"{file.path}: row {row}{error.message}") from None
                reading.skipped[error.reason] += 1


def _parquet_text(value: Any, text_key: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise _Unusable("not valid UTF-8", f": not valid UTF-8: {error}") from None
    if not isinstance(text, str):
        raise _Unusable("text is not a string", f': "{text_key}" is a {_json_type(text)}, expected a string')
    return text


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
