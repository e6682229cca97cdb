"""From one piece of the inputs to its shard: read, clean, tokenise, hash, write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from megalm.data.cleaning.cleaner import Cleaner
from megalm.data.cleaning.duplicates import sign
from megalm.data.format import item_bytes
from megalm.data.progress import Tick
from megalm.data.reading.documents import read_unit
from megalm.data.reading.options import Reading
from megalm.data.reading.source import Source
from megalm.data.reading.units import Unit
from megalm.data.sentences import split_sentences
from megalm.data.shards.shard import NAME, RECORD, Job, Shard, Work
from megalm.data.split import Split
from megalm.data.writer import check_ids
from megalm.errors import DataError
from megalm.files import sync
from megalm.plugin.contract.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20
_READ = 1 << 18


class _File:
    """A file of a shard, its CRC-32 taken as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115  # closed by close()
        self._crc = 0

    def write(self, values: np.ndarray) -> None:
        """Append the bytes of contiguous values."""
        if not len(values):
            return
        data = values.data.cast("B")
        self.bytes += len(data)
        self._crc = crc32(data, self._crc)
        self._file.write(data)

    def abandon(self) -> None:
        """Close without a record; nothing where it is closed."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()

    def close(self) -> list[Any]:
        """Make it durable; its size and CRC-32."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return [self.bytes, self._crc]


def make_shard(job: Job, work: Work, tokenizer: Tokenizer, out: Path, tick: Tick) -> None:
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
        (folder / NAME).write_text(json.dumps(asdict(shard)), encoding="utf-8")
        sync(folder / NAME)
        sync(folder)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(folder, out)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        raise


def _hash(job: Job) -> Shard:
    with Source(job.file.path, 0, job.file.size, hashed=True) as source:
        _read_rest(source)
        return Shard(source.sha256)


def _read_rest(source: Source) -> None:
    buffer = memoryview(bytearray(_READ))
    while source.readinto(buffer):
        pass


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

    def run(self, tick: Tick) -> Shard:
        """Write the files and return their record."""
        try:
            return self._run(tick)
        finally:
            for file in self._files.values():
                file.abandon()

    def _run(self, tick: Tick) -> Shard:
        work, job, count = self._work, self._job, 0
        reading = Reading(work.documents, work.text_key, work.skip, work.max_document)
        # The library that reads Parquet reads as it likes; the file is hashed by a job of its own.
        parquet = job.file.kind == "parquet"
        bounds = (0, 0) if parquet else (self._unit.start, self._unit.stop)
        whole = not parquet and bounds == (0, job.file.size)
        batch: list[str] = []
        held = 0
        with Source(job.file.path, *bounds, tick, hashed=whole) as source:
            for text in read_unit(job.file, self._unit, reading, source):
                count += 1
                batch.append(text)
                held += len(text)
                if held >= _BATCH_CHARACTERS:
                    self._write(batch)
                    batch, held = [], 0
            self._write(batch)
            _read_rest(source)  # what follows damage is hashed as well
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
        check_ids(ids, self._tokenizer.vocab_size)
        counts = np.fromiter(map(len, documents), np.int64, len(documents))
        owner = np.repeat(np.arange(len(texts)), counts)
        records = np.zeros(len(texts), dtype=RECORD)
        records["tokens"] = np.bincount(owner, weights=lengths, minlength=len(texts))
        records["sentences"] = np.bincount(owner, weights=lengths > 0, minlength=len(texts))
        if self._work.split:
            records["key"] = [Split.key(text) for text in texts]
        if self._work.cleaning.dedup != "none":
            digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
            records["hash"] = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        kept = records["tokens"] > 0
        self._dropped += len(texts) - int(kept.sum())
        self._files["records"].write(records[kept].view(np.uint8))
        self._files["sentences"].write(lengths[lengths > 0].astype("<i8"))
        self._files["tokens"].write(ids.astype(self._dtype, order="C"))
        if "signatures" in self._files:
            self._files["signatures"].write(sign(texts)[kept].astype("<u4", order="C"))
