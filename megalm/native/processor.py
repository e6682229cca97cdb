"""Which level of x86-64 this processor reaches: code for a higher one ends a program at an illegal instruction."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What a level adds, in the kernel's words.
_V2 = {"cx16", "lahf_lm", "popcnt", "ssse3", "sse4_1", "sse4_2"}
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = {"x86-64": set[str](), "x86-64-v2": _V2, "x86-64-v3": _V2 | _V3, "x86-64-v4": _V2 | _V3 | _V4}


def lacking(march: str) -> list[str]:
    """Features of a level that this processor lacks; none are known of other names and other processors."""
    if platform.machine() != "x86_64":
        return []
    return sorted(LEVELS.get(march, set()) - features())


@functools.cache
def features() -> frozenset[str]:
    """The processor's features as Linux names them."""
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def fingerprint() -> str:
    """Differs between processors with different features."""
    return hashlib.sha256(" ".join(sorted(features())).encode()).hexdigest()[:16]
