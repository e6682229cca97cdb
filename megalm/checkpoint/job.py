"""One checkpoint while it is written.

It has two halves. First each rank writes, hashes and syncs its files, which takes long and needs nobody. Then, when all
have said that theirs are on the disk, rank 0 writes the manifest, renames the folder, moves ``latest`` and prunes.
Either runs in the thread that trains or beside it; what it raises is kept for whoever asks how it went.
"""

from __future__ import annotations

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

from megalm.checkpoint.folders import BEST, folder_name, point_latest, prune, unfinished_name
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


class Job:
    """One checkpoint that is being written."""

    def __init__(
        self,
        root: Path,
        parallel: ParallelContext,
        retention: Retention,
        step: int,
        state: TrainingState,
        info: dict[str, Any],
        best: int | None = None,
    ) -> None:
        self.step = step
        self._best = best
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
        self._parts = own_parts(state, parallel)
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
            "scalars": self._scalars,
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
            # A rank whose weights are all frozen has none.
            scalars={key: value for report in self.reports for key, value in report["scalars"].items()},
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
            if self._best is not None:
                point_latest(self.target.parent, self.target.parent / folder_name(self._best), BEST)
            prune(
                self.target.parent,
                self._retention.keep,
                keep_every=self._retention.keep_every,
                written=self.target,
                best=self._best,
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


def own_parts(state: TrainingState, parallel: ParallelContext) -> list[tuple[str, Piece, Box]]:
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
