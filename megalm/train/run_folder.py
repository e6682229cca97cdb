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

import json
from pathlib import Path
from typing import Any

from megalm import files
from megalm.config.load import Resolved, diff_configs
from megalm.errors import ConfigError

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
SAMPLE = "sample.txt"
METRICS = "metrics.jsonl"
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
