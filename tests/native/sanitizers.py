"""Address and undefined-behaviour sanitizers in a library that an ordinary Python loads: their runtimes go first."""

from __future__ import annotations

import subprocess
from pathlib import Path


def preloaded(cxx: str) -> dict[str, str]:
    """The environment for a process that loads a sanitized library; empty where the compiler has no such runtimes."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        shown = subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        path = Path(shown.stdout.strip())
        if shown.returncode != 0 or not path.is_absolute():
            return {}
        found.append(str(path.resolve()))
    return {
        "LD_PRELOAD": " ".join(found),
        # Python and torch keep memory until they end, and torch throws exceptions through code without sanitizers.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
