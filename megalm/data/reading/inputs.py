"""Which files are read, in which order: named files, glob patterns and folders, resolved once before anything starts.

The list depends on names alone, never on the order in which a file system returns them. Folders are followed through
symbolic links, each of them once: a link back to a folder above it would otherwise go on for ever. What is met again is
counted.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megalm.errors import DataError

Kind = Literal["text", "jsonl", "parquet"]
Packing = Literal["", "gzip", "zstd"]

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PARQUET_MAGIC = b"PAR1"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PACKED_SUFFIXES = (".gz", ".zst", ".zstd")


@dataclass(frozen=True)
class InputFile:
    """A file to read. Compression is recognised by content, Parquet by content, JSONL by suffix."""

    path: Path
    size: int
    """Bytes on disk."""
    mtime_ns: int
    kind: Kind
    packing: Packing
    """How the whole file is compressed; a Parquet file compresses itself."""
    named: bool = True
    """Given by name, and not found in a folder or by a pattern: then it must hold text."""


@dataclass
class Inputs:
    """The files in reading order, and what was left out of them."""

    files: list[InputFile] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason)."""
    _seen: set[tuple[int, int]] = field(default_factory=set)
    """Devices and inodes of files and folders met so far."""

    def first_visit(self, status: os.stat_result) -> bool:
        """Whether this file or folder was not met before, under any name."""
        key = (status.st_dev, status.st_ino)
        new = key not in self._seen
        self._seen.add(key)
        return new


def find_inputs(inputs: Sequence[Path | str], *, skip: bool = False) -> Inputs:
    """Resolve files, glob patterns (``**`` included) and folders, each in the order of its names.

    Of folders and patterns, hidden files, empty files and files met before are left out, the last two counted. With
    ``skip`` unusable files are counted as well. Raises DataError for a name that matches nothing, and otherwise for
    a file that is missing, empty, unreadable or not regular.
    """
    found = Inputs()
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            before = len(found.files), len(found.skipped)
            for file in _walk(path, found):
                _add(found, file, named=False, skip=skip)
            if (len(found.files), len(found.skipped)) == before:
                raise DataError(f"{path}: the folder holds no files")
        elif not os.path.lexists(path) and glob.has_magic(str(given)):
            names = sorted(glob.glob(str(given), recursive=True))
            files = [Path(name) for name in names if not os.path.isdir(name)]
            if not files:
                raise DataError(f"{given}: no such file; the pattern matches nothing")
            for file in files:
                _add(found, file, named=False, skip=skip)
        else:
            _add(found, path, named=True, skip=skip)
    if not found.files:
        reasons = "".join(f"; {path}: {reason}" for path, reason in found.skipped[:3])
        raise DataError(f"no input files; name at least one text, JSONL or Parquet file{reasons}")
    return found


def _status(path: Path) -> os.stat_result:
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
    return status


def describe(path: Path) -> InputFile:
    """What a file is. DataError where it cannot be read."""
    status = _status(path)
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from None
    packing: Packing = "gzip" if head.startswith(_GZIP_MAGIC) else "zstd" if head == _ZSTD_MAGIC else ""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in _PACKED_SUFFIXES:
        suffixes.pop()
    kind: Kind = "jsonl" if suffixes and suffixes[-1] in _JSON_SUFFIXES else "text"
    if head == _PARQUET_MAGIC:
        kind = "parquet"
    return InputFile(path, status.st_size, status.st_mtime_ns, kind, packing)


def printable(path: Path) -> str:
    """A path as text; a name may hold bytes that are not UTF-8, shown as ``\\xff``."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _add(found: Inputs, path: Path, *, named: bool, skip: bool) -> None:
    try:
        file = describe(path)
    except DataError as error:
        empty = os.path.isfile(path) and path.stat().st_size == 0
        if not (skip or (empty and not named)):
            raise
        found.skipped.append((printable(path), str(error).partition(": ")[2]))
        return
    if not found.first_visit(path.stat()) and not named:
        found.skipped.append((printable(path), "the same file was met before"))
        return
    found.files.append(file if named else replace(file, named=False))


def _walk(folder: Path, found: Inputs) -> Iterator[Path]:
    """Files below a folder. Each folder is entered once, however many links lead to it."""
    try:
        status = folder.stat()
        entries = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    if not found.first_visit(status):
        found.skipped.append((printable(folder), "the same folder was met before: a symbolic link leads to it"))
        return
    for name in entries:
        path = folder / name
        if name.startswith("."):
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            found.skipped.append((printable(path), f"cannot be read: {error.strerror}"))
            continue
        if stat.S_ISDIR(mode):
            yield from _walk(path, found)
        elif stat.S_ISREG(mode):
            yield path
        else:
            found.skipped.append((printable(path), "is not a regular file"))
