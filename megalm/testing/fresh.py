"""Python code in an interpreter of its own, which sees the same packages as this one.

What a check asks of a plugin is often about a new process: what importing it brings in, whether other hash seeds change
what it learns, whether damaged files crash it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

TIMEOUT = 300.0
"""Seconds after which a fresh process is given up."""


class FreshProcessError(Exception):
    """A fresh process ended badly; the message says how, with the end of what it wrote to standard error."""


def run_fresh(
    code: str, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None, timeout: float = TIMEOUT
) -> str:
    """Run ``code`` and return what it printed. ``env`` is put on top of this process's environment.

    FreshProcessError where it ends with another status than 0, or not within ``timeout`` seconds.
    """
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FreshProcessError(f"it did not end within {timeout:.0f} seconds") from None
    if done.returncode:
        how = f"it ended with status {done.returncode}"
        if done.returncode < 0:
            how = f"it was killed by {signal.Signals(-done.returncode).name}"
        raise FreshProcessError("\n".join([how, *done.stderr.strip().splitlines()[-12:]]))
    return done.stdout
