"""A piece of a text file in decoded blocks that end between documents, with errors that say where.

Bytes are read in blocks, cut between documents, and decoded here: Python's text mode hides the byte offset of a wrong
character, and replaces or passes what must be refused. Where unusable documents are to be skipped, a block that holds
one is taken apart, so that only the documents at fault are left out, and each is counted.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from megalm.data.extras import zstd_stream
from megalm.data.reading.inputs import InputFile
from megalm.data.reading.options import Reading
from megalm.data.reading.source import Source
from megalm.data.reading.units import BLANK_LINES, Unit
from megalm.errors import DataError

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(rb"\n(?:[ \t\r\f\v\n]|\xc2\xa0|\xe3\x80\x80)*")


class Blocks:
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
        for whole, offset in self.raw():
            yield from self.decode(whole, offset)

    def raw(self) -> Iterator[tuple[bytes, int]]:
        """The blocks as bytes, for who can tell himself whether they are text, and asks :meth:`decode` of others."""
        # Grows and loses its beginning in place, where bytes would be copied whole for each block of a long document.
        offset, held, dropping = self.start, bytearray(), False
        line, seen = -1, 0  # the last line break before ``seen``
        for chunk in self._chunks():
            fresh = max(0, len(held) - 8)
            line, seen = max(line, held.rfind(b"\n", seen, fresh)), fresh
            held += chunk
            cut = self._last_boundary(held, fresh, line)
            if cut and dropping:
                first = self._boundary.search(held)  # type: ignore[union-attr]  # where there is a cut
                skip = first.end() if first is not None else cut
                del held[:skip]
                line, seen = -1, 0
                offset, dropping, cut = offset + skip, False, cut - skip
            if cut:
                whole = bytes(memoryview(held)[:cut])
                del held[:cut]
                line, seen = -1, 0
                yield whole, offset
                offset += cut
            if not dropping and len(held) > self._reading.max_document:
                self._too_long(offset)
                dropping = True
            if dropping and len(held) > 8:
                offset += len(held) - 8
                del held[:-8]
                line, seen = -1, 0
        if held and not dropping:
            yield bytes(held), offset

    def _last_boundary(self, held: bytearray, fresh: int, line: int) -> int:
        """End of the last boundary that does not reach the end of what is held, 0 where there is none. ``line``: the
        last line break before ``fresh``, -1 where there is none."""
        if self._boundary is None:
            return 0
        if self._boundary is not BLANK_LINES:
            return held.rfind(b"\n", fresh) + 1
        at = held.rfind(b"\n\n", fresh, len(held) - 1)
        if at >= 0:
            return at + 2
        found = 0
        blank = _BLANK.match(held, line) if line >= 0 else None
        for match in self._boundary.finditer(held, line if blank is not None and blank.end() >= fresh else fresh):
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

    def decode(self, raw: bytes, offset: int) -> Iterator[tuple[str, int]]:
        """A block, or a document of one, that begins at ``offset``, as text. Nothing where it is skipped."""
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
                yield from self.decode(raw[start:end], offset + start)
            start = end
