"""The run's folder: what is in it, and whether this command may go on in it.

::

    config.json, config.toml   the resolved configuration that the folder was started with
    metrics.jsonl              a line for each step and each evaluation
    pipeline.json              a measured step, where there is a pipeline: see megalm.pipeline.recorded
    checkpoints/step-XXXXXXXX  see megalm.checkpoint
    summary.json, sample.txt, report.html

A folder that was started with another configuration is refused with the differences, unless the user allows it; keys
that only say how to run or what to show may change freely.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from megalm import files
from megalm.config.load import Resolved, diff_configs
from megalm.errors import ConfigError

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
SAMPLE = "sample.txt"
METRICS = "metrics.jsonl"
LOCK = ".lock"
FREE_KEYS = {
    *("run.dir", "run.allow_changed_config", "launch.collective_timeout", "data.workers", "data.epochs"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.async_save", "checkpoint.load"),
    *("checkpoint.preemption_deadline", "checkpoint.allow_changed_plugins"),
    *("log.every", "log.callbacks", "sample.prompt", "sample.tokens", "sample.temperature", "sample.top_k"),
}
"""Keys whose change does not change the run: where it lies, what it shows, what it keeps."""
LOCK_WAIT = 5.0
"""Seconds to wait for the lock: ranks of a launch that was just killed may still be on their way out."""


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the keys that may change between a run and its resumption."""
    kept = {
        section: {key: value for key, value in table.items() if f"{section}.{key}" not in FREE_KEYS}
        for section, table in config.items()
    }
    if blend := kept.get("data", {}).get("blend"):  # epochs only say when to refuse
        kept["data"]["blend"] = [{key: value for key, value in entry.items() if key != "epochs"} for entry in blend]
    return kept


def check_run_folder(resolved: Resolved) -> None:
    """ConfigError where the folder holds a run of another configuration, or cannot be one's folder. Writes nothing."""
    folder = Path(resolved.config.run.dir)
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if _exists(path))
    if not above.is_dir():
        raise ConfigError([f"run.dir: {above} is a file; name a folder"])
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError([f"run.dir: {above} cannot be written to; name another folder or change its permissions"])
    path = folder / CONFIG
    if not _exists(path):
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"run.dir: {path} cannot be read ({error}); use another run.dir"]) from error
    changes = diff_configs(comparable(before), comparable(resolved.as_dict()))
    if changes and not resolved.config.run.allow_changed_config:
        raise ConfigError(
            [
                f"run.dir: {folder} holds a run of another configuration; use another run.dir, "
                "or --set run.allow_changed_config=true to go on with the new one. It differs in:",
                *(f"  {change}" for change in changes),
            ]
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A name that is too long, say; what lies above it decides.
        return False


def start_run_folder(resolved: Resolved, lock: RunLock) -> None:
    """Create the folder, lock it and write the configuration. Rank 0 calls it, after every rank agreed to start."""
    folder = Path(resolved.config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"run.dir: {folder} cannot be made ({error.strerror}); name another folder"]) from error
    lock.take()
    for left in folder.glob(".*.tmp"):
        # A killed process was about to rename it.
        left.unlink()
    files.write_text(folder / CONFIG, json.dumps(resolved.as_dict(), indent=1) + "\n")
    files.write_text(folder / "config.toml", resolved.to_toml())


class RunLock:
    """Held by rank 0 while it works in a run folder, so that two launches never write to one.

    The kernel lets go of it however the process ends. File systems without locks are left unprotected.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Lock the folder, if it exists; ConfigError where another process has it. Taking it twice is harmless."""
        if self._file is not None or not self._folder.is_dir():
            return
        file = (self._folder / LOCK).open("a")
        deadline = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break
                if time.monotonic() > deadline:
                    file.close()
                    raise ConfigError(
                        [
                            f"run.dir: another process is training in {self._folder}; wait for it, end it, "
                            "or use another run.dir"
                        ]
                    ) from error
                time.sleep(0.1)
            else:
                break
        self._file = file

    def release(self) -> None:
        """Unlock the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
