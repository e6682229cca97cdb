"""One thread a process: tests that share cores with the ranks they start are several times slower with more."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
