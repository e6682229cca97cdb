"""Write checkpoints: every rank its own slices, rank 0 the manifest, and the name last.

Asynchronously, both halves of a :class:`~megalm.checkpoint.job.Job` run in a thread beside the training, and the step
waits only for a copy of the rank's share to host memory. Ranks meet in :meth:`Saver.poll`, once a step while a
checkpoint is under way, in the thread that trains: collectives of two threads would get in each other's way. What fails
on one rank is raised on all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.host_copy import HostCopy
from megalm.checkpoint.job import Job, Progress, Retention, own_parts
from megalm.checkpoint.state import TrainingState
from megalm.errors import CheckpointError
from megalm.parallel.mesh import ParallelContext

_PAUSE = 0.02
"""Seconds between two looks at whether the ranks are done."""


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
        self._job: Job | None = None

    @property
    def progress(self) -> Progress | None:
        """Of the checkpoint that is under way, if one is."""
        return None if self._job is None else self._job.progress

    def reserve(self, state: TrainingState) -> None:
        """Take the memory that asynchronous saves of such a state will copy to, before the first one needs it."""
        if self._asynchronous and self._copy is None:
            parts = own_parts(state, self._parallel)
            size = sum(math.prod(b - a for a, b in box) * p.local.element_size() for _, p, box in parts)
            self._copy = HostCopy(size, len(parts), self._parallel.device)

    def save(self, step: int, state: TrainingState, info: dict[str, Any], *, best: int | None = None) -> Path:
        """Write ``root/step-XXXXXXXX`` and prune older ones; ``info`` is stored as :attr:`Manifest.state`.

        ``best``: the step whose checkpoint, this one or an older one, is not to be pruned.

        Returns once it is complete or, asynchronously, once the state may change; then :meth:`poll` after each step.
        An earlier one that is still under way is finished first. CheckpointError, on all ranks, where it or the earlier
        one fails; that leaves the complete ones as they were. A kill leaves besides at most an unfinished folder, which
        the next start sweeps up.
        """
        began = time.perf_counter()
        self.finish()
        job = Job(self._root, self._parallel, self._retention, step, state, info, best)
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

    def _take_copy(self, job: Job, state: TrainingState) -> None:
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


def _text(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
