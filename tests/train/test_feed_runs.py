"""Whole runs on a blend of corpora, packed, with rows built ahead: trained, resumed, refused."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from megalm.config.load import load_config
from megalm.errors import CheckpointError
from megalm.metrics import jsonl
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import run_simulated
from megalm.testing.runs import load_run, make_store
from megalm.train.prepare import prepare_run
from megalm.train.run_folder import METRICS
from megalm.train.trainer import Trainer

TABLES = '{{path = "{0}", weight = 2, epochs = 0}}, {{path = "{1}", weight = {weight}, epochs = 0}}'


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, manager: Any) -> list[Path]:
    return [make_store(tmp_path_factory.mktemp(f"store-{n}"), documents=50, seed=n, manager=manager) for n in range(2)]


def train(folder: Path, stores: list[Path], manager: Any, *overrides: str, weight: float = 1, dp: int = 1) -> list[Any]:
    """Train in ``folder``; losses of every step, and of the evaluation."""
    folder.mkdir(exist_ok=True)
    load_run(folder, stores[0], manager=manager)
    path = folder / "run.toml"
    blend = TABLES.format(*stores, weight=weight)
    path.write_text(path.read_text().replace(f'path = "{stores[0]}"', f"blend = [{blend}]"))
    settings = ["data.packing=true", "train.sequence_length=32", "sample.tokens=0", "train.micro_batch=2", *overrides]
    resolved = load_config(path, settings, manager)

    def rank(parallel: ParallelContext) -> None:
        Trainer(prepare_run(resolved, manager, dp, "cpu"), parallel).run()

    run_simulated(rank, dp=dp)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megalm-rows")]
    return [
        record.get("loss", record.get("eval", {}).get("loss")) for record in jsonl.read(folder / "run" / METRICS)
    ]


def test_workers_worlds_and_resumption_change_nothing(tmp_path: Path, stores: list[Path], manager: Any) -> None:
    whole = train(tmp_path / "whole", stores, manager, "data.workers=0")
    assert len(whole) == 5
    ahead = train(tmp_path / "ahead", stores, manager, "data.workers=3")
    assert ahead == whole
    kept = ("checkpoint.every=1", "checkpoint.keep=9")
    train(tmp_path / "part", stores, manager, "data.workers=2", *kept)
    run = tmp_path / "part" / "run"
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "summary.json").unlink()
    resumed = train(tmp_path / "part", stores, manager, "data.workers=1", *kept, dp=2)
    assert resumed[:2] == whole[:2]
    assert resumed == pytest.approx(whole, rel=1e-9)
    other = train(tmp_path / "other", stores, manager, "data.workers=1", dp=4)
    assert other == pytest.approx(whole, rel=1e-9)


def test_another_blend_is_refused(tmp_path: Path, stores: list[Path], manager: Any) -> None:
    train(tmp_path, stores, manager, "train.steps=1")
    with pytest.raises(CheckpointError, match="data"):
        train(tmp_path, stores, manager, "train.steps=2", "run.allow_changed_config=true", weight=3)
