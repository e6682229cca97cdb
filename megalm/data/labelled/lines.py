"""A file's text, whole, with errors that say the line.

Labelled data is small beside what is pretrained on, so it is read whole; then a line's number is a count of
breaks.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from megalm.data.extras import zstd_stream
from megalm.data.reading.inputs import describe
from megalm.errors import DataError

_BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, plain or packed with gzip or Zstandard, with ``\\n`` as line break. DataError names file
    and line of what is no text.
    """
    raw = _unpacked(path).removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line}: holds 0x{raw[error.start]:02x}, which is not valid UTF-8 ({error.reason}); convert "
            "the file to UTF-8"
        ) from None
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise DataError(
            f"{path}: line {line}: holds a NUL byte: the file is binary, or text in UTF-16; convert it to UTF-8 text"
        )
    return text.replace("\r\n", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of :func:`read_text`, without line breaks; a break at the end starts no line."""
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return lines


def _unpacked(path: Path) -> bytes:
    packing = describe(path).packing
    failures: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        if packing == "gzip":
            with gzip.open(path, "rb") as stream:
                return stream.read()
        with open(path, "rb") as file:
            if packing == "zstd":
                unpacked, failure = zstd_stream(path, file)
                failures = (*failures, failure)
                return unpacked.read()
            return file.read()
    except failures as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
