"""How many threads of a rank move a checkpoint's bytes.

They spend their time in the kernel and in loops that let go of Python's lock. A few are enough for what one rank's
share of a host's storage can take; more would only disturb the other ranks.
"""

from __future__ import annotations

import os

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(4, _CORES)
"""Files or ranges that a rank reads or writes at the same time."""
