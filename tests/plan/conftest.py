"""One token store and its runs for all tests of plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared
from megalm.train.trainer import Trainer

MODELS = {"gpt2": "causal_lm", "llama": "causal_lm", "bert": "mlm+nsp"}

PreparedRun = Callable[..., Prepared]


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("plan-store"), manager=manager)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, store: Path, manager: PluginManager) -> Callable[[str], Path]:
    """``teacher("bert")``: a run of a model that is wider and deeper than those of MODELS."""

    @cache
    def make(model: str) -> Path:
        run = make_run(
            tmp_path_factory.mktemp("plan-teacher"),
            store,
            objective=MODELS[model],
            architecture=model,
            overrides=("model.hidden_size=36", "model.layers=7", "train.steps=1"),
            manager=manager,
        )
        Trainer(run, single_rank()).run()
        return run.run_dir

    return make


@pytest.fixture(scope="session")
def prepared_run(
    tmp_path_factory: pytest.TempPathFactory, store: Path, manager: PluginManager, teacher: Callable[[str], Path]
) -> PreparedRun:
    """``prepared_run("bert", "train.x=1", world_size=4)``: a tiny run of a model of MODELS. One that distils has a
    teacher of another width and depth."""

    def make(model: str, *overrides: str, world_size: int = 1) -> Prepared:
        if any("distill" in each for each in overrides):
            overrides = (*overrides, f'objective.distill.teacher="{teacher(model)}"')
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
