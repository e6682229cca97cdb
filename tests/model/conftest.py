"""Tests against transformers are skipped where it is not installed."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def transformers_is_there_and_quiet() -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
