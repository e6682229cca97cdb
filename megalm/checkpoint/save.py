"""Write checkpoints: every rank its own slices, rank 0 the manifest, and the name last.

Saving has two halves. First each rank writes, hashes and syncs its files, which takes long and needs nobody. Then, when
all have said that theirs are on the disk, rank 0 writes the manifest, renames the folder, moves ``latest`` and prunes.
Asynchronously, both halves run in a thread beside the training, and the step waits only for a copy of the rank's share
to host memory. Ranks meet in :meth:`Saver.poll`, once a step while a checkpoint is under way, in the thread that
trains: collectives of two threads would get in each other's way. What fails on one rank is raised on all.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.folders import folder_name, point_latest, prune, unfinished_name
from megalm.checkpoint.hashing import ALGORITHM
from megalm.checkpoint.host_copy import HostCopy
from megalm.checkpoint.manifest import FORMAT, MANIFEST, FileRecord, Manifest, Slice, TensorRecord
from megalm.checkpoint.share import Box, shares
from megalm.checkpoint.state import TrainingState
from megalm.checkpoint.tensorfile import dtype_name, write_tensors
from megalm.checkpoint.threads import THREADS
from megalm.errors import CheckpointError
from megalm.files import sync
from megalm.parallel.layout import Piece
from megalm.parallel.mesh import ParallelContext

FILE_BYTES = 1 << 29
"""A rank's tensors go to files of about this size: as many are written, and later verified, at the same time."""
_PAUSE = 0.02
"""Seconds between two looks at whether the ranks are done."""


@dataclass
class Progress:
    """How far a checkpoint has come on this rank."""

    step: int
    total: int
    """Bytes that this rank writes."""
    blocked: float = 0.0
    """Seconds that the step waited for it."""
    began: float = field(default_factory=time.perf_counter)
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def move(self, count: int) -> None:
        """Some bytes are written."""
        with self._lock:
            self.done += count

    def __str__(self) -> str:
        return f"{self.done / max(1, self.total):.0%} of {self.total / 1e6:,.0f} MB"


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay."""

    keep: int
    """The newest of them."""
    keep_every: int = 0
    """And those of every so many steps; 0: none."""


class Saver:
    """One rank's part in a run's checkpoints. Every rank makes one and calls its methods at the same points.

    ``say``: told a line when a checkpoint is complete, on rank 0.
    """

    def __init__(
        self,
        root: Path,
        parallel: ParallelContext,
        retention: Retention,
        *,
        asynchronous: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._root = root
        self._parallel = parallel
        self._leader = parallel.rank == 0
        self._retention = retention
        self._asynchronous = asynchronous
        self._say = say
        self._copy: HostCopy | None = None
        self._job: _Job | None = None

    @property
    def progress(self) -> Progress | None:
        """Of the checkpoint that is under way, if one is."""
        return None if self._job is None else self._job.progress

    def reserve(self, state: TrainingState) -> None:
        """Take the memory that asynchronous saves of such a state will copy to, before the first one needs it."""
        if self._asynchronous and self._copy is None:
            parts = _own(state, self._parallel)
            size = sum(math.prod(b - a for a, b in box) * p.local.element_size() for _, p, box in parts)
            self._copy = HostCopy(size, len(parts), self._parallel.device)

    def save(self, step: int, state: TrainingState, info: dict[str, Any]) -> Path:
        """Write ``root/step-XXXXXXXX`` and prune older ones; ``info`` is stored as :attr:`Manifest.state`.

        Returns once it is complete or, asynchronously, once the state may change; then :meth:`poll` after each step.
        An earlier one that is still under way is finished first. CheckpointError, on all ranks, where it or the earlier
        one fails; that leaves the complete ones as they were. A kill leaves besides at most an unfinished folder, which
        the next start sweeps up.
        """
        began = time.perf_counter()
        self.finish()
        job = _Job(self._root, self._parallel, self._retention, step, state, info)
        made = self._parallel.world.broadcast_json(job.make_folder() if self._leader else None)
        if made["error"]:
            raise CheckpointError(made["error"])
        job.work = self._root / made["name"]
        self._job = job
        if self._asynchronous:
            self._take_copy(job, state)
            job.start(job.write)
            job.progress.blocked = time.perf_counter() - began
        else:
            job.perform(job.write)
            self._advance()
            job.perform(job.commit)
            job.progress.blocked = time.perf_counter() - began
            self._advance()
        return job.target

    def poll(self) -> bool:
        """Go on with the checkpoint that is under way, if one is; whether none is any more.

        Every rank calls it after each step. It does not wait for the disk. CheckpointError, on all ranks, where writing
        has failed on one: a run does not go on unprotected.
        """
        job = self._job
        if job is None:
            return True
        flags = torch.tensor([job.running], dtype=torch.float32, device=self._parallel.device)
        if not self._parallel.world.all_reduce(flags).item():
            self._advance()
            if self._job is not None:
                job.start(job.commit)
        return self._job is None

    def finish(self) -> None:
        """Wait until no checkpoint is under way. Errors as :meth:`poll`."""
        while not self.poll():
            # No rank waits in a collective while another writes: a watchdog would take it for a hang.
            time.sleep(_PAUSE)

    def _advance(self) -> None:
        """The half that was under way is over on every rank: hear how it went, and go on to the next one."""
        job = self._job
        assert job is not None
        heard = self._parallel.world.gather_json({"error": _text(job.error), "report": job.report})
        if failed := next((each["error"] for each in heard if each["error"]), None):
            self._job = None
            if self._leader:
                job.abandon()
            raise CheckpointError(f"checkpoint of step {job.step} failed: {failed}") from job.error
        if job.committing:
            self._job = None
            if self._leader:
                self._say(job.summary(self._asynchronous))
        else:
            job.committing, job.reports = True, [each["report"] for each in heard]

    def _take_copy(self, job: _Job, state: TrainingState) -> None:
        """Leave the live tensors alone from here on; CheckpointError, on all ranks, where one lacks the memory."""
        error: Exception | None = None
        try:
            self.reserve(state)
            assert self._copy is not None
            job.copy(self._copy)
        except Exception as raised:
            error = raised
        told = self._parallel.world.gather_json(None if error is None else str(error))
        if failed := next((each for each in told if each is not None), None):
            self._job = None
            if self._leader:
                job.abandon()
            raise CheckpointError(
                f"checkpoint of step {job.step} failed: the state cannot be copied to host memory ({failed}); "
                "checkpoint.async_save = false needs none"
            ) from error


def save_checkpoint(
    root: Path, step: int, state: TrainingState, info: dict[str, Any], parallel: ParallelContext, keep: int
) -> Path:
    """Write one checkpoint and prune older ones; all ranks call it and return once it is complete."""
    return Saver(root, parallel, Retention(keep)).save(step, state, info)


class _Job:
    """One checkpoint that is being written."""

    def __init__(
        self,
        root: Path,
        parallel: ParallelContext,
        retention: Retention,
        step: int,
        state: TrainingState,
        info: dict[str, Any],
    ) -> None:
        self.step = step
        self.target = root / folder_name(step)
        self.error: BaseException | None = None
        self.report: dict[str, Any] | None = None
        self.reports: list[dict[str, Any]] = []
        self.committing = False
        self.work = root
        """Where it is written, once :meth:`make_folder` has made that."""
        self._parallel = parallel
        self._leader = parallel.rank == 0
        self._retention = retention
        self._info = info
        self._scalars = dict(state.scalars)
        self._parts = _own(state, parallel)
        self._tensors = {_key(kind, piece.name): piece.view(box) for kind, piece, box in self._parts}
        self._thread: threading.Thread | None = None
        total = sum(t.numel() * t.element_size() for t in self._tensors.values())
        self.progress = Progress(step, total)

    @property
    def running(self) -> bool:
        """Whether a half is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def make_folder(self) -> dict[str, str | None]:
        """Make the unfinished folder: its name, or what went wrong."""
        name, error = unfinished_name(self.step, os.urandom(4).hex()), None
        try:
            if self.target.exists():
                error = f"{self.target}: exists already; move it away, or resume from it"
            else:
                (self.target.parent / name).mkdir(parents=True)
        except OSError as raised:
            error = f"{self.target.parent / name}: cannot be made: {raised.strerror or raised}"
        return {"name": name, "error": error}

    def copy(self, memory: HostCopy) -> None:
        """Leave the live tensors alone from here on."""
        self._tensors = memory.take(self._tensors)

    def start(self, half: Callable[[], None]) -> None:
        """Do a half in a thread."""
        self._thread = threading.Thread(
            target=self.perform, args=(half,), name=f"megalm-checkpoint-{self.step}", daemon=True
        )
        self._thread.start()

    def perform(self, half: Callable[[], None]) -> None:
        """Do a half, and keep what it raises for :meth:`Saver.poll`."""
        try:
            half()
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                raise

    def write(self) -> None:
        """Write this rank's files."""
        files = list(self._files())
        with ThreadPoolExecutor(min(THREADS, max(1, len(files))), "megalm-save") as pool:
            written = list(pool.map(lambda file: write_tensors(file[0], file[1], ALGORITHM, self.progress.move), files))
        records: dict[str, list[Any]] = {"weights": [], "optimizer": []}
        where = {key: path.name for path, tensors in files for key in tensors}
        for kind, piece, box in self._parts:
            record = {
                "name": piece.name,
                "shape": list(piece.part.shape),
                "dtype": dtype_name(piece.local.dtype),
                "file": where[piece.name],
                "start": [start for start, _ in box],
                "size": [stop - start for start, stop in box],
            }
            records[kind].append(record)
        self.report = {
            "files": {path.name: list(found) for (path, _), found in zip(files, written, strict=True)},
            **records,
        }

    def _files(self) -> list[tuple[Path, dict[str, torch.Tensor]]]:
        """What goes to which file."""
        out: list[tuple[Path, dict[str, torch.Tensor]]] = []
        for kind in ("weights", "optimizer"):
            number = size = 0
            for found, piece, _ in self._parts:
                if found != kind:
                    continue
                tensor = self._tensors[_key(kind, piece.name)]
                if size == 0:
                    part = f"-{number}" if number else ""
                    out.append((self.work / f"{kind}-{self._parallel.rank:05d}{part}.safetensors", {}))
                    number += 1
                out[-1][1][piece.name] = tensor
                size += max(1, tensor.numel() * tensor.element_size())
                if size >= FILE_BYTES:
                    size = 0
        return out

    def commit(self) -> None:
        """What makes it a checkpoint, once every rank's files are on the disk; rank 0 does it."""
        if not self._leader:
            return
        manifest = Manifest(
            format=FORMAT,
            step=self.step,
            state=self._info,
            scalars=self._scalars,
            weights=_merge(self.reports, "weights"),
            optimizer=_merge(self.reports, "optimizer"),
            files={
                name: FileRecord(size=size, hash=value)
                for report in self.reports
                for name, (size, value) in report["files"].items()
            },
        ).sealed()
        try:
            with (self.work / MANIFEST).open("x", encoding="utf-8") as file:
                file.write(manifest.model_dump_json(indent=1))
                file.flush()
                os.fsync(file.fileno())
            sync(self.work)
            self.work.rename(self.target)
            sync(self.target.parent)
            point_latest(self.target.parent, self.target)
            prune(
                self.target.parent,
                self._retention.keep,
                keep_every=self._retention.keep_every,
                written=self.target,
            )
        except OSError as error:
            where = error.filename or self.work
            raise CheckpointError(f"{where}: {error.strerror or error}; is the disk full?") from error

    def abandon(self) -> None:
        """Take the unfinished folder away; every rank has stopped writing to it."""
        shutil.rmtree(self.work, ignore_errors=True)

    def summary(self, asynchronous: bool) -> str:
        """A line for the user."""
        size = sum(size for report in self.reports for size, _ in report["files"].values())
        took = time.perf_counter() - self.progress.began
        how = f"written in {took:.1f} s, of which the step waited {self.progress.blocked:.2f} s"
        return f"checkpoint {self.target.name}: {size / 1e6:,.1f} MB {how if asynchronous else f'in {took:.1f} s'}"


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def _own(state: TrainingState, parallel: ParallelContext) -> list[tuple[str, Piece, Box]]:
    """What this rank writes: (kind, piece, range)."""
    dp = parallel.dp
    kinds = (("weights", state.weights), ("optimizer", state.optimizer))
    return [(kind, piece, box) for kind, items in kinds for piece, box in shares(items, dp.index, dp.size)]


def _merge(reports: list[dict[str, Any]], kind: str) -> dict[str, TensorRecord]:
    """The manifest's records of logical tensors, from what each rank says it wrote."""
    merged: dict[str, TensorRecord] = {}
    for report in reports:
        for record in report[kind]:
            name = record["name"]
            part = Slice(file=record["file"], key=name, start=record["start"], shape=record["size"])
            if name not in merged:
                merged[name] = TensorRecord(shape=record["shape"], dtype=record["dtype"], slices=[])
            merged[name].slices.append(part)
    return dict(sorted(merged.items()))


def _text(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
