"""The finished work on one piece of the inputs: a small folder that is complete or absent.

It holds the tokens of every document that passed the filters, and what is needed to decide later which of them stay and
in which part: a hash of the text, for near duplicates a signature. Its name is a hash of everything that decides its
contents, so that what an interrupted run finished is found again, and found only where it is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.clean import Cleaner, Cleaning
from megalm.data.dedup import PLACES, sign
from megalm.data.format import item_bytes
from megalm.data.inputs import InputFile, printable
from megalm.data.readers import Documents, Reading, Source, read_unit
from megalm.data.sentences import split_sentences
from megalm.data.split import Split
from megalm.data.units import Unit
from megalm.errors import DataError, TokenizerError
from megalm.files import sync
from megalm.plugin.contract.tokenizer import Tokenizer

_FORMAT = 1
_BATCH_CHARACTERS = 1 << 20
_READ = 1 << 20
RECORD = np.dtype([("key", "<u8"), ("hash", "<u8", (2,)), ("tokens", "<i8"), ("sentences", "<i8")])
"""A document: hash that decides its part, hash of its text, tokens, sentences."""
_NAME = "shard.json"


@dataclass(frozen=True)
class Work:
    """Everything but the tokenizer that decides what becomes of a piece."""

    documents: Documents
    text_key: str
    skip: bool
    max_document: int
    sentences: bool
    cleaning: Cleaning


@dataclass(frozen=True)
class Job:
    """One piece to work on, or (``unit`` None) a file to hash."""

    file: InputFile
    unit: Unit | None

    def key(self, work: Work, tokenizer: Tokenizer) -> str:
        """Name of its shard."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "path": printable(Path(os.path.abspath(self.file.path))),
            "size": self.file.size,
            "mtime": self.file.mtime_ns,
        }
        if self.unit is not None:
            content |= {
                "unit": [self.unit.start, self.unit.stop, self.file.kind, self.file.packing],
                "tokenizer": tokenizer.identity,
                "unicode": unicodedata.unidata_version,
                "work": {**asdict(work), "cleaning": work.cleaning.model_dump(mode="json")},
            }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class Shard:
    """What a shard's ``shard.json`` says."""

    sha256: str
    """Of the bytes that were read."""
    documents: int = 0
    """Documents read, those that were removed or have no tokens included."""
    dropped: int = 0
    """Documents without a token."""
    removed: dict[str, int] = field(default_factory=dict)
    scrubbed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)
    """Bytes and BLAKE2b digest of each file."""

    @classmethod
    def read(cls, folder: Path) -> Shard | None:
        """The shard in ``folder``; None where there is none, or its files have not the sizes that they should."""
        try:
            found = cls(**json.loads((folder / _NAME).read_bytes()))
            whole = all((folder / name).stat().st_size == size for name, (size, _) in found.files.items())
        except (OSError, ValueError, TypeError):
            return None
        return found if whole else None


class _File:
    """A file of a shard, hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115  # closed by close()
        self._digest = hashlib.blake2b(digest_size=16)

    def write(self, data: bytes) -> None:
        """Append."""
        self.bytes += len(data)
        self._digest.update(data)
        self._file.write(data)

    def abandon(self) -> None:
        """Close without a record; nothing where it is closed."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()

    def close(self) -> list[Any]:
        """Make it durable; its size and digest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return [self.bytes, self._digest.hexdigest()]


def make_shard(job: Job, work: Work, tokenizer: Tokenizer, out: Path, tick: Callable[[int], None]) -> None:
    """Work on one piece and leave its shard in the new folder ``out``. ``tick`` is told the bytes of each read.

    Raises DataError or TokenizerError for what cannot be used, OSError where it cannot be written.
    """
    folder = out.with_name(f"{out.name}.tmp{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        shard = _hash(job) if job.unit is None else _Worker(job, job.unit, work, tokenizer, folder).run(tick)
        status = job.file.path.stat()
        if (status.st_size, status.st_mtime_ns) != (job.file.size, job.file.mtime_ns):
            raise DataError(f"{job.file.path}: the inputs changed while they were read; prepare again")
        (folder / _NAME).write_text(json.dumps(asdict(shard)), encoding="utf-8")
        sync(folder / _NAME)
        sync(folder)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(folder, out)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        raise


def _hash(job: Job) -> Shard:
    with Source(job.file.path, 0, job.file.size) as source:
        while source.read(_READ):
            pass
        return Shard(source.sha256)


class _Worker:
    """One piece on its way into a shard."""

    def __init__(self, job: Job, unit: Unit, work: Work, tokenizer: Tokenizer, folder: Path) -> None:
        self._job = job
        self._unit = unit
        self._work = work
        self._tokenizer = tokenizer
        self._dtype = np.dtype(f"<u{item_bytes(tokenizer.vocab_size)}")
        self._cleaner = Cleaner(work.cleaning)
        names = ["tokens", "records", "sentences"] + ["signatures"] * (work.cleaning.dedup == "near")
        self._files = {name: _File(folder / name) for name in names}
        self._dropped = 0

    def run(self, tick: Callable[[int], None]) -> Shard:
        """Write the files and return their record."""
        try:
            return self._run(tick)
        finally:
            for file in self._files.values():
                file.abandon()

    def _run(self, tick: Callable[[int], None]) -> Shard:
        work, job, count = self._work, self._job, 0
        reading = Reading(work.documents, work.text_key, work.skip, work.max_document)
        # The library that reads Parquet reads as it likes; the file is hashed by a job of its own.
        parquet = job.file.kind == "parquet"
        bounds = (0, 0) if parquet else (self._unit.start, self._unit.stop)
        batch: list[str] = []
        held = 0
        with Source(job.file.path, *bounds, tick) as source:
            for text in read_unit(job.file, self._unit, reading, source):
                count += 1
                batch.append(text)
                held += len(text)
                if held >= _BATCH_CHARACTERS:
                    self._write(batch)
                    batch, held = [], 0
            self._write(batch)
            while source.read(_READ):  # what follows damage is hashed as well
                pass
            sha256 = source.sha256
        if parquet:
            tick(self._unit.bytes)
        if count == 0 and job.file.named and self._unit.bytes == job.file.size and not (work.skip or reading.skipped):
            raise DataError(f"{job.file.path}: holds no text")
        files = {name: file.close() for name, file in self._files.items()}
        cleaner = self._cleaner
        return Shard(
            sha256, count, self._dropped, dict(cleaner.removed), dict(cleaner.scrubbed), dict(reading.skipped), files
        )

    def _write(self, batch: list[str]) -> None:
        texts = self._cleaner.apply(batch)
        if not texts:
            return
        documents = [split_sentences(text) for text in texts] if self._work.sentences else [[text] for text in texts]
        ids, lengths = self._tokenizer.encode_documents(documents)
        self._check(ids)
        counts = np.fromiter(map(len, documents), np.int64, len(documents))
        owner = np.repeat(np.arange(len(texts)), counts)
        records = np.zeros(len(texts), dtype=RECORD)
        records["tokens"] = np.bincount(owner, weights=lengths, minlength=len(texts))
        records["sentences"] = np.bincount(owner, weights=lengths > 0, minlength=len(texts))
        records["key"] = [Split.key(text) for text in texts]
        if self._work.cleaning.dedup != "none":
            digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
            records["hash"] = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        kept = records["tokens"] > 0
        self._dropped += len(texts) - int(kept.sum())
        self._files["records"].write(records[kept].tobytes())
        self._files["sentences"].write(lengths[lengths > 0].astype("<i8").tobytes())
        self._files["tokens"].write(ids.astype(self._dtype).tobytes())
        if "signatures" in self._files:
            self._files["signatures"].write(sign(texts)[kept].astype("<u4").tobytes())

    def _check(self, ids: np.ndarray) -> None:
        size = self._tokenizer.vocab_size
        if not len(ids):
            return
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= size:
            raise TokenizerError(
                f"the tokenizer returned id {lowest if lowest < 0 else highest}, outside its vocabulary of {size}; "
                "this is a fault of its plugin"
            )


class ShardData:
    """The arrays of a shard, mapped. DataError where a file was altered."""

    def __init__(self, folder: Path, shard: Shard, vocab_size: int) -> None:
        self._folder, self._shard = folder, shard
        self.records = self._map("records", RECORD)
        self.tokens = self._map("tokens", np.dtype(f"<u{item_bytes(vocab_size)}"))
        self.sentences = self._map("sentences", np.dtype("<i8"))

    def signatures(self) -> np.ndarray:
        """(documents, PLACES) uint32."""
        return self._map("signatures", np.dtype("<u4")).reshape(-1, PLACES)

    def verify(self) -> None:
        """Compare every file with its digest."""
        for name, (_, digest) in self._shard.files.items():
            with open(self._folder / name, "rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            if found != digest:
                raise DataError(
                    f"{self._folder / name}: the intermediate file was altered; remove {self._folder} and prepare again"
                )

    def _map(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        count = self._shard.files[name][0] // dtype.itemsize
        if count == 0:
            return np.zeros(0, dtype=dtype)
        return np.memmap(self._folder / name, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)
