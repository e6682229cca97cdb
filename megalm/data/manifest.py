"""``manifest.json``: what a token store holds, what it was made from and how.

It is sealed with a hash of itself: a count or a tokenizer identity that somebody edited is refused, instead of being
believed. It holds no time and no host name, so that the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalm.config.settings import Settings
from megalm.errors import DataError

NAME = "manifest.json"
FORMAT = "megalm-token-store"
VERSION = 2


class _Record(Settings, use_attribute_docstrings=False):
    """Nobody asks for the documentation of these at run time, and to find it takes longer than to write one."""


class FileRecord(_Record):
    """A file of the store."""

    bytes: int
    """Exact size."""
    sha256: str
    """Hex digest of the whole file."""
    seal: str
    """Hex checksum at the end of the file's header: of which store, and of which state of it, this file is."""


class LinkRecord(_Record):
    """Where a part's ids lie, if not in the store: bytes of another program's file."""

    bytes: int
    """Exact size of that file."""
    start: int
    """Byte at which the part begins."""
    sha256: str
    """Hex digest of the part's bytes."""


class PartRecord(_Record):
    """One part (train, validation) of the store."""

    documents: int
    sentences: int
    tokens: int
    """Length of the stream, end-of-document tokens included."""
    files: dict[str, FileRecord]
    """By file name."""
    link: LinkRecord | None = None
    """Set where the ids are not in the store's own file."""


class TokenizerRecord(_Record):
    """The tokenizer that made the ids."""

    component: str
    """Name of the plugin component."""
    identity: str
    """Hash of what decides the ids."""
    vocab_size: int
    eos: int | None
    """Id that ends every document, where the tokenizer has one."""


class SourceRecord(_Record):
    """An input file."""

    path: str
    """As it was given; bytes that are not UTF-8 as ``\\xff``."""
    bytes: int
    """Size on disk, compressed where it is."""
    sha256: str
    """Hex digest of the file on disk."""
    documents: int
    """Documents read from it, repeated and dropped ones included."""


class PreparationRecord(_Record):
    """What became of the documents on the way from the inputs to the parts."""

    removed: dict[str, int] = {}
    """Documents that a filter or the removal of duplicates left out, by reason."""
    scrubbed: dict[str, int] = {}
    """Replaced pieces of personal data, by kind; those in documents that were left out later are counted as well."""
    skipped: dict[str, int] = {}
    """Documents that could not be used, by reason."""
    skipped_files: dict[str, str] = {}
    """Files and folders that were not read, and why."""


class Manifest(_Record):
    """Everything that is known of a store without opening its parts."""

    format: str = FORMAT
    version: int = VERSION
    tokenizer: TokenizerRecord
    parts: dict[str, PartRecord]
    """By name; ``validation`` is absent where none was asked for."""
    sources: list[SourceRecord]
    options: dict[str, str | float]
    """Options of the preparation."""
    preparation: PreparationRecord = PreparationRecord()
    """What was left out, and why."""
    dropped_documents: int
    """Documents without a single token."""
    links: dict[str, str] = {}
    """Absolute path of the file of each linked part; apart from the parts, so that a corpus keeps its identity when it
    moves."""

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``; the caller makes the folder durable."""
        content = self.model_dump(mode="json")
        text = json.dumps({**content, "checksum": _checksum(content)}, indent=2, ensure_ascii=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check ``manifest.json``. DataError where the folder is no store, or the manifest was altered."""
        path = folder / NAME
        if not os.path.isfile(path):  # unlike Path.is_file, not troubled by names that are too long
            there = "is not a folder" if os.path.exists(folder) else "is missing"
            what = "has no manifest.json" if os.path.isdir(folder) else there
            prefix = str(folder).removesuffix(".bin").removesuffix(".idx")
            if os.path.isfile(prefix + ".idx"):
                raise DataError(
                    f"{folder}: a dataset of Megatron-LM, which does not say what tokenizer made it; make a store over "
                    f"it with: megalm data import-megatron {prefix} --tokenizer SPEC --out DIR"
                )
            raise DataError(f"{folder}: no token store here, it {what}; write one with: megalm data prepare")
        try:
            content = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); the store is damaged, prepare it again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f'{path}: not the manifest of a token store: "format" is not "{FORMAT}"')
        if content.get("version") != VERSION:
            raise DataError(
                f"{path}: format version {content.get('version')!r}, this megalm reads version {VERSION}; "
                "prepare the data again"
            )
        checksum = content.pop("checksum", None)
        if checksum != _checksum(content):
            raise DataError(
                f"{path}: altered after it was written: its checksum does not match; prepare the data again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"])
            raise DataError(f"{path}: {where}: {first['msg']}; prepare the data again") from None


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
