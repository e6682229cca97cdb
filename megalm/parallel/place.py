"""Where a rank's process lives, and what has become of it, as far as a process on the same machine can see."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Literal

Fate = Literal["gone", "suspended"]
_PF_EXITING = 4
"""Linux's flag of a process whose end has begun; its connections may be closed while it still has a state."""


def own_place() -> dict[str, Any]:
    """This process, its host and the space in which its number counts; as JSON."""
    return {"process": os.getpid(), "host": socket.gethostname(), "space": _space()}


def spell_place(place: dict[str, Any] | None) -> str:
    """``process 17 on node4``."""
    return "before it said where it is" if place is None else f"process {place['process']} on {place['host']}"


def fate(place: dict[str, Any] | None) -> Fate | None:
    """What has become of a process; none where it runs or cannot be seen from here."""
    here = own_place()
    if place is None or here["space"] is None or (place["host"], place["space"]) != (here["host"], here["space"]):
        return None
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{place['process']}/stat").read_text(errors="replace").rpartition(")")[2].split()
        state, exiting = fields[0], int(fields[6]) & _PF_EXITING
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except (OSError, IndexError, ValueError):
        return None
    return "gone" if exiting or state in "ZX" else "suspended" if state in "Tt" else None


def _space() -> str | None:
    """Names the numbering of processes; none where the system does not show its processes as files."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
