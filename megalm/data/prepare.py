"""From input files to a token store: pieces are worked on one by one or side by side, then joined in reading order.

What is finished of a piece is kept beside the store until the store is complete (see
:mod:`megalm.data.shards.shard`), so that a run that was killed, or met a full disk, goes on where it was. The store
itself is written under a temporary name and renamed, so that nothing else could be taken for one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megalm.data import manifest as manifests
from megalm.data.cleaning.cleaner import Cleaning, check_cleaning
from megalm.data.folder import new_folder
from megalm.data.manifest import Manifest, PreparationRecord, SourceRecord
from megalm.data.progress import Progress, ticking
from megalm.data.reading.inputs import Inputs, find_inputs, printable
from megalm.data.reading.options import DOCUMENTS, MAX_DOCUMENT, Documents
from megalm.data.reading.units import UNIT_BYTES, plan_units
from megalm.data.shards.merge import Merge
from megalm.data.shards.shard import Job, Shard, Work
from megalm.data.shards.workers import run_jobs
from megalm.data.split import Split
from megalm.data.store import PARTS
from megalm.data.tokenizer import add_tokenizer
from megalm.errors import DataError, UsageError
from megalm.plugin.contract.tokenizer import Tokenizer


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    component: str,
    validation: float = 0.1,
    documents: Documents = "blank-line",
    text_key: str = "text",
    cleaning: Cleaning | None = None,
    sentences: bool = True,
    skip: bool = False,
    max_document: int = MAX_DOCUMENT,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a token store of ``inputs`` (files, patterns, folders) to the new folder ``out``; return its manifest.

    ``component`` names the plugin component that ``tokenizer`` is of. ``validation`` is the share of documents, in
    [0, 1), that go to the validation part, chosen by a hash of their text; 0 writes no such part. Where chance would
    leave a part empty, one document (and its duplicates) is moved there. ``documents`` says how text files are cut,
    ``text_key`` where rows hold their text. ``cleaning`` says what is done to documents and which are left out.
    Without ``sentences`` each document counts as one. ``skip`` leaves out and counts what cannot be used, instead of
    stopping; a document of more than about ``max_document`` bytes is among that. ``workers`` processes share the
    work; the store does not depend on their number, and more than one need a tokenizer whose class can be imported.
    ``overwrite`` replaces an existing store.

    Raises DataError for unusable input or output, naming the file and the offset or line. No store is left then, but
    where more than 16 MiB of the inputs were done, they are kept for the next run, in ``.NAME.prepare`` beside ``out``.
    """
    if not 0 <= validation < 1:
        raise DataError(f"validation share {validation}: expected a number from 0 up to, not including, 1")
    if documents not in DOCUMENTS:
        raise DataError(f'documents "{documents}": expected one of {", ".join(DOCUMENTS)}')
    if workers < 1:
        raise DataError(f"workers {workers}: expected at least 1")
    if max_document < 1:
        raise DataError(f"longest document {max_document}: expected at least 1 byte")
    if not inputs:
        raise DataError("no input files; name at least one text, JSONL or Parquet file")
    cleaning = cleaning or Cleaning()
    check_cleaning(cleaning)
    out = Path(out)
    found = find_inputs(inputs, skip=skip)
    target = os.path.realpath(out)
    for file in found.files:  # also those of a folder that the output folder lies in
        if Path(os.path.realpath(file.path)).is_relative_to(target):
            raise DataError(f"{file.path}: lies inside the output folder {out}; choose another output folder")
    work = Work(documents, text_key, skip, max_document, sentences, cleaning, split=validation > 0)
    options: dict[str, str | float] = {"validation": validation, "documents": documents, "text_key": text_key}
    options |= cleaning.options() | ({} if sentences else {"sentences": "no"}) | ({"on_error": "skip"} if skip else {})
    plan = _Plan(found, work, tokenizer)
    with (
        _Place(out, plan.worth_keeping) as beside,
        new_folder(out, overwrite=overwrite, is_ours=is_store, what="token store") as folder,
    ):
        place = beside.take()
        plan.run(place, component, workers, progress)
        shards = plan.shards(place)
        eos, size = tokenizer.special.eos, tokenizer.vocab_size
        merge = Merge([shard for group in shards for shard in group], size, eos, cleaning, folder)
        parts = merge.write(Split(validation), PARTS if validation else PARTS[:1], str(found.files[0].path))
        result = Manifest(
            tokenizer=add_tokenizer(tokenizer, component, folder),
            parts=parts,
            sources=plan.sources(place),
            options=options,
            preparation=_record(found, [shard for group in shards for _, shard in group], merge.removed),
            dropped_documents=sum(shard.dropped for group in shards for _, shard in group),
        )
        result.write(folder)
    return result


def is_store(folder: Path) -> bool:
    """Whether a folder holds a token store, damaged or not: may ``overwrite`` replace it?"""
    try:
        Manifest.read(folder)
    except DataError:
        names = {"tokens", "index"}
        return (folder / manifests.NAME).is_file() and names <= {path.suffix[1:] for path in folder.glob("train.*")}
    return True


class _Plan:
    """The pieces of all inputs, and the names of their shards."""

    def __init__(self, found: Inputs, work: Work, tokenizer: Tokenizer) -> None:
        self._files = found.files
        self._work = work
        self._tokenizer = tokenizer
        self._units: list[list[tuple[str, Job]]] = []
        self._digests: list[tuple[str, Job] | None] = []
        for file in found.files:
            units = plan_units(file, work.documents)
            self._units.append([self._named(Job(file, unit)) for unit in units])
            apart = len(units) > 1 or file.kind == "parquet"
            self._digests.append(self._named(Job(file, None)) if apart else None)

    def _named(self, job: Job) -> tuple[str, Job]:
        return job.key(self._work, self._tokenizer), job

    def worth_keeping(self, place: Path) -> bool:
        """Whether more than one piece's worth of the inputs is done; less is quickly done again."""
        done = sum(
            job.unit.bytes
            for units in self._units
            for key, job in units
            if job.unit is not None and Shard.read(place / key) is not None
        )
        return done >= UNIT_BYTES

    def run(self, place: Path, component: str, workers: int, progress: Progress | None) -> None:
        """Make the shards that are not there yet, and remove those that are of something else."""
        jobs: dict[str, Job] = {}
        for units, digest in zip(self._units, self._digests, strict=True):
            jobs |= dict(units) | dict([digest] if digest is not None else [])
        for path in place.iterdir():
            if path.name not in jobs:
                shutil.rmtree(path, ignore_errors=True)
        total, done = sum(file.size for file in self._files), 0
        missing = []
        for key, job in jobs.items():
            if Shard.read(place / key) is None:
                missing.append((key, job))
            elif job.unit is not None:
                done += job.unit.bytes
        tick = ticking(progress, total, done)
        if done:
            tick(0)
        try:
            run_jobs(missing, self._work, self._tokenizer, component, place, workers, tick)
        except UsageError as error:
            if self.worth_keeping(place):
                raise type(error)(f"{error} (what is finished is kept in {place} for the next run)") from error
            raise

    def shards(self, place: Path) -> list[list[tuple[Path, Shard]]]:
        """The shards of each file's pieces, in order."""
        return [[(place / key, _read(place / key)) for key, _ in units] for units in self._units]

    def sources(self, place: Path) -> list[SourceRecord]:
        """The record of each file."""
        result = []
        for file, digest, shards in zip(self._files, self._digests, self.shards(place), strict=True):
            sha256 = _read(place / digest[0]).sha256 if digest is not None else shards[0][1].sha256
            count = sum(shard.documents for _, shard in shards)
            result.append(SourceRecord(path=printable(file.path), bytes=file.size, sha256=sha256, documents=count))
        return result


def _read(folder: Path) -> Shard:
    shard = Shard.read(folder)
    if shard is None:
        raise DataError(f"{folder}: the intermediate files are damaged; remove {folder.parent} and prepare again")
    return shard


def _record(found: Inputs, shards: Sequence[Shard], repeats: dict[str, int]) -> PreparationRecord:
    def total(counts: Sequence[dict[str, int]]) -> dict[str, int]:
        names = sorted({name for count in counts for name in count})
        return {name: sum(count.get(name, 0) for count in counts) for name in names}

    return PreparationRecord(
        removed=total([shard.removed for shard in shards]) | repeats,
        scrubbed=total([shard.scrubbed for shard in shards]),
        skipped=total([shard.skipped for shard in shards]),
        skipped_files=dict(found.skipped),
    )


class _Place:
    """The folder of finished pieces beside the store, for this process alone. It goes when the block ends, while it is
    still locked; where the block raises, it stays if there is enough in it."""

    def __init__(self, out: Path, worth_keeping: Callable[[Path], bool]) -> None:
        self._out = out
        absolute = Path(os.path.abspath(out))
        self._path = absolute.parent / f".{absolute.name}.prepare"
        self._worth_keeping = worth_keeping
        self._lock = -1

    def take(self) -> Path:
        """Make the folder, or find it, and lock it. DataError where another process has."""
        while True:
            self._path.mkdir(exist_ok=True)
            lock = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                raise DataError(
                    f"{self._out}: another process is preparing this store; wait for it, or end it"
                ) from None
            # Whoever had it may have removed it before it was locked here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self._path)):
                    self._lock = lock
                    return self._path
            os.close(lock)

    def __enter__(self) -> _Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock < 0:
            return
        try:
            if kind is None or not self._worth_keeping(self._path):
                shutil.rmtree(self._path, ignore_errors=True)
        finally:
            os.close(self._lock)
