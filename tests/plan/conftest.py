"""One token store and its runs for all tests of plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared

MODELS = {"gpt2": "causal_lm", "llama": "causal_lm", "bert": "mlm+nsp"}

PreparedRun = Callable[..., Prepared]


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("plan-store"), manager=manager)


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory, store: Path, manager: PluginManager) -> PreparedRun:
    """``prepared_run("bert", "train.x=1", world_size=4)``: a tiny run of a model of MODELS."""

    def make(model: str, *overrides: str, world_size: int = 1) -> Prepared:
        return make_run(
            tmp_path_factory.mktemp("plan-run"),
            store,
            objective=MODELS[model],
            architecture=model,
            overrides=overrides,
            world_size=world_size,
            manager=manager,
        )

    return make
