"""A benchmark's dated record: what was measured, of which commit, with which versions, on which device."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_record(
    name: str, found: Mapping[str, Any], *, device: str = "cpu", peers: tuple[str, ...] = (), folder: Path = RESULTS
) -> Path:
    """Write ``folder/NAME-DATE.json``: ``found`` behind the facts that it is of, with the versions of ``peers``."""
    today = datetime.now(UTC).date().isoformat()
    record = {"benchmark": name, "date": today, "commit": _commit(), **_machine(device), **_versions(peers), **found}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{today}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return path


def _commit() -> str:
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _machine(device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {
        "device": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions(peers: tuple[str, ...]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for peer in peers:
        try:
            versions[peer] = version(peer)
        except PackageNotFoundError:
            continue
    return versions
