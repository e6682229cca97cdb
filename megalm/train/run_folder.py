"""The run's folder: what is in it, and whether this command may go on in it.

::

    config.json, config.toml   the resolved configuration that the folder was started with
    metrics.jsonl              a line for each step and each evaluation
    checkpoints/step-XXXXXXXX  see megalm.checkpoint
    summary.json, sample.txt, report.html

A folder that was started with another configuration is refused with the differences, unless the user allows it; keys
that only say how to run or what to show may change freely.
"""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path
from typing import IO, Any

from megalm import files
from megalm.config.load import Resolved, diff_configs
from megalm.errors import CheckpointError, ConfigError

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
SAMPLE = "sample.txt"
METRICS = "metrics.jsonl"
LOCK = ".lock"
FREE_KEYS = {"run.allow_changed_config", "launch.collective_timeout", "log.every", "checkpoint.keep"}
"""Keys whose change does not change the run."""


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the keys that may change between a run and its resumption."""
    return {
        section: {key: value for key, value in table.items() if f"{section}.{key}" not in FREE_KEYS}
        for section, table in config.items()
    }


def check_run_folder(resolved: Resolved) -> None:
    """ConfigError where the folder holds a run of another configuration, or cannot be one's folder. Writes nothing."""
    folder = Path(resolved.config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"run.dir: {folder} is a file; name a folder"])
    path = folder / CONFIG
    if not path.exists():
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


def start_run_folder(resolved: Resolved) -> None:
    """Create the folder and write the configuration. Rank 0 calls it, after every rank agreed to start."""
    folder = Path(resolved.config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
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
        """Lock the folder, if it exists; CheckpointError where another process has it. Taking it twice is harmless."""
        if self._file is not None or not self._folder.is_dir():
            return
        file = (self._folder / LOCK).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(
                    f"{self._folder}: another process is training in this run folder; wait for it, end it, "
                    "or use another run.dir"
                ) from error
            return
        self._file = file

    def release(self) -> None:
        """Unlock the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
