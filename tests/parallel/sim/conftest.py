"""One token store and its runs for all tests of simulated ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared

DROPOUT = ["model.dropout=0.2", "model.attention_dropout=0.1"]
MODELS = {
    "gpt2": ("causal_lm", "gpt2", DROPOUT),
    "llama": ("causal_lm", "llama", [*DROPOUT, "model.kv_heads=2"]),
    "bert": ("mlm+nsp", "bert", DROPOUT),
}

PreparedRun = Callable[..., Prepared]


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory) -> PreparedRun:
    """``prepared_run("bert", "train.x=1", world_size=4)``: a tiny float64 run of a model of MODELS."""
    manager = PluginManager.for_launch(None)
    store: list[Path] = []

    def make(model: str, *overrides: str, world_size: int = 1) -> Prepared:
        if not store:
            store.append(make_store(tmp_path_factory.mktemp("sim-store"), manager=manager))
        objective, architecture, more = MODELS[model]
        folder = tmp_path_factory.mktemp("sim-run")
        return make_run(
            folder,
            store[0],
            objective=objective,
            architecture=architecture,
            overrides=[*more, *overrides],
            world_size=world_size,
            manager=manager,
        )

    return make
