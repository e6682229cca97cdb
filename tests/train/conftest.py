from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  what the first step of an optimizer imports: once here instead of in every forked rank

from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    """A token store that no test may change."""
    return make_store(tmp_path_factory.mktemp("train-store"), documents=150, manager=manager)


@pytest.fixture
def prepare(tmp_path: Path, store: Path, manager: PluginManager) -> Callable[..., Prepared]:
    """``prepare(objective, *overrides)``: a prepared run of a tiny float64 model."""

    def make(objective: str = "causal_lm", *overrides: str, **more: Any) -> Prepared:
        kinds = {"objective": objective, "architecture": "gpt2" if objective == "causal_lm" else "bert"}
        return make_run(tmp_path, store, **(kinds | more), overrides=overrides, manager=manager)

    return make
