"""Runs the jobs of a preparation, here or in processes of their own, and reports how far they are.

Processes are fresh interpreters that read jobs as lines of JSON and answer the same way: nothing is forked from a
process that may have threads, and nothing is pickled. Which process does which job decides nothing about the result.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalm.data.progress import Tick
from megalm.data.shards.making import make_shard
from megalm.data.shards.shard import Job, Work
from megalm.data.tokenizer import load_tokenizer, save_tokenizer
from megalm.errors import DataError, MegalmError, TokenizerError, UsageError
from megalm.plugin.contract.tokenizer import Tokenizer

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_TOKENIZER = "tokenizer"


@contextmanager
def one_thread() -> Iterator[None]:
    """Libraries that look at the environment at each call use one thread inside."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def run_jobs(
    jobs: Sequence[tuple[str, Job]],
    work: Work,
    tokenizer: Tokenizer,
    component: str,
    folder: Path,
    workers: int,
    tick: Tick,
) -> None:
    """Make the shard of each (key, job) in ``folder``, with up to ``workers`` processes."""
    if workers > 1 and len(jobs) > 1:
        _Pool(work, tokenizer, component, folder, min(workers, len(jobs))).run(jobs, tick)
        return
    with one_thread():
        for key, job in jobs:
            make_shard(job, work, tokenizer, folder / key, tick)


class _Process:
    """A worker and the job that it has."""

    def __init__(self, setup: dict[str, Any]) -> None:
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "megalm.data.shards.worker_main"]
        # Nothing is buffered here: a line that lay in a buffer would not wake who waits for the pipe.
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        self.job: Job | None = None
        self.begun = b""
        """Of a line whose end has not come."""
        self.send(setup)

    def send(self, message: dict[str, Any]) -> None:
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):  # its end is seen when it is read
            left = memoryview(json.dumps(message).encode() + b"\n")
            while left:
                left = left[self.child.stdin.write(left) :]

    def read(self) -> list[bytes] | None:
        """The lines that have come, once some bytes have; None at the end."""
        assert self.child.stdout is not None
        data = os.read(self.child.stdout.fileno(), 1 << 16)
        *lines, self.begun = (self.begun + data).split(b"\n")
        return lines if data else None

    def end(self, *, kill: bool) -> None:
        if kill:
            self.child.kill()
        for stream in (self.child.stdin, self.child.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        self.child.wait()


class _Pool:
    """Workers that take jobs as they become free."""

    def __init__(self, work: Work, tokenizer: Tokenizer, component: str, folder: Path, count: int) -> None:
        cls = type(tokenizer)
        saved = folder / _TOKENIZER
        saved.mkdir(exist_ok=True)
        save_tokenizer(tokenizer, component, saved)
        self._folder = folder
        self._count = count
        self._setup = {
            "tokenizer": [cls.__module__, cls.__qualname__, os.fspath(saved)],
            "work": {**asdict(work), "cleaning": work.cleaning.model_dump(mode="json")},
        }

    def run(self, jobs: Sequence[tuple[str, Job]], tick: Tick) -> None:
        waiting = list(reversed(jobs))
        processes: list[_Process] = []
        done = False
        try:
            with selectors.DefaultSelector() as selector:
                for _ in range(self._count):
                    process = _Process(self._setup)
                    processes.append(process)
                    assert process.child.stdout is not None
                    selector.register(process.child.stdout, selectors.EVENT_READ, process)
                    self._next(process, waiting)
                while any(process.job is not None for process in processes):
                    for entry, _ in selector.select():
                        self._hear(entry.data, waiting, tick)
            done = True
        finally:
            for process in processes:
                process.end(kill=not done)

    def _next(self, process: _Process, waiting: list[tuple[str, Job]]) -> None:
        if not waiting:
            process.job = None
            return
        key, job = waiting.pop()
        process.job = job
        file = asdict(job.file) | {"path": os.fsencode(job.file.path).hex()}
        unit = None if job.unit is None else asdict(job.unit)
        process.send({"out": os.fsencode(self._folder / key).hex(), "file": file, "unit": unit})

    def _hear(self, process: _Process, waiting: list[tuple[str, Job]], tick: Tick) -> None:
        """What a worker has written: lines, and nothing else."""
        lines = process.read()
        if lines is None:
            status = process.child.wait()
            path = process.job.file.path if process.job is not None else "the tokenizer"
            what = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise DataError(
                f"{path}: the process that worked on it {what}; where memory ran out, use fewer --workers. "
                "Run the same command again to go on"
            )
        for message in map(json.loads, lines):
            if "read" in message:
                tick(message["read"])
            elif "done" in message:
                self._next(process, waiting)
            else:
                raise _ERRORS.get(message["error"], MegalmError)(message["message"])


def worker_tokenizer(module: str, name: str, folder: str) -> Tokenizer:
    """The tokenizer that a worker was told of. TokenizerError where its class cannot be imported."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise TokenizerError(
            f"tokenizer {module}.{name} cannot be imported by another process: {error}; use --workers 1"
        ) from None
    return load_tokenizer(Path(folder), lambda component: found)[1]


_ERRORS: dict[str, type[Exception]] = {
    "DataError": DataError,
    "TokenizerError": TokenizerError,
    "UsageError": UsageError,
    "OSError": OSError,
}
