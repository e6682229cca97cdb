"""The library is loaded once, whoever asks first."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalm.ops.native import library


def test_threads_that_ask_at_once_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second load would register operations twice, which torch refuses."""
    loads = []

    def load() -> library.Library:
        loads.append(1)
        time.sleep(0.2)
        return library.Library(Path(), "cache", without_cuda=None, record={})

    monkeypatch.delenv("MEGALM_NATIVE", raising=False)
    monkeypatch.setattr(library, "_load", load)
    monkeypatch.setattr(library, "_library", functools.cache(library._library.__wrapped__))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: library.library(), range(4)))
    assert len(loads) == 1
    assert all(one is found[0] for one in found)
