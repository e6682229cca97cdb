"""Checkpoints of a tiny run, written by real ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # what the first step of an optimizer imports: once here instead of in every forked rank
from safetensors.numpy import load_file

from megalm.checkpoint.folders import open_whole
from megalm.checkpoint.load import load_state
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.state import allocate_optimizer_state, set_scalars, training_state
from megalm.model.language_model import LanguageModel
from megalm.nn.module import materialise
from megalm.optim.gradients import finish_gradients
from megalm.optim.weights import Weights
from megalm.parallel.mesh import ParallelContext
from megalm.plugin.manager import PluginManager
from megalm.testing.processes import run_processes
from megalm.testing.runs import make_run, make_store
from megalm.train.feed import TrainFeed
from megalm.train.prepare import Prepared
from megalm.train.step import forward_backward

Tensors = dict[str, np.ndarray]


class PlainReader:
    """Checkpoints read by their JSON and safetensors alone: what the engine's reader is compared with."""

    @staticmethod
    def logical(folder: Path, kind: str) -> Tensors:
        """Whole tensors of a checkpoint. Each element lies in one file."""
        files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        found = {}
        for name, record in json.loads((folder / "manifest.json").read_text())[kind].items():
            whole = np.full(record["shape"], np.nan, dtype=record["dtype"])
            for part in record["slices"]:
                place = tuple(slice(a, a + n) for a, n in zip(part["start"], part["shape"], strict=True))
                assert np.isnan(whole[place]).all(), f"{name}: slices overlap"
                whole[place] = files[part["file"]][part["key"]]
            assert not np.isnan(whole).any(), f"{name}: slices leave gaps"
            found[name] = whole
        return found

    @staticmethod
    def equal(a: Tensors, b: Tensors) -> None:
        """AssertionError where anything differs, be it one bit."""
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            np.testing.assert_array_equal(a[name].view(np.uint8), b[name].view(np.uint8), err_msg=name)

    @staticmethod
    def scalars(folder: Path) -> dict[str, Any]:
        """The optimizer's state that is one number."""
        found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["scalars"]
        return found


@pytest.fixture(scope="session")
def plain() -> PlainReader:
    return PlainReader()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    manager = PluginManager.for_launch(None)
    data = make_store(tmp_path_factory.mktemp("checkpoint-store"), manager=manager)
    # Three key/value heads: some ranks of a layout hold the same one.
    overrides = ["model.kv_heads=3", "train.precision=float32"]
    return make_run(tmp_path_factory.mktemp("run"), data, architecture="llama", overrides=overrides, manager=manager)


def build(prepared: Prepared, parallel: ParallelContext) -> tuple[LanguageModel, Weights, torch.optim.Optimizer]:
    model = LanguageModel(prepared.spec, parallel)
    materialise(model, parallel, 7, torch.float32)
    weights = Weights(model, parallel, torch.float32)
    return model, weights, prepared.optimizer.build(weights.masters, 1e-2, prepared.optimizer_settings)


def train(prepared: Prepared, parallel: ParallelContext, root: Path, steps: int = 2, keep: int = 2) -> None:
    """Take some steps, with a checkpoint after each."""
    model, weights, optimizer = build(prepared, parallel)
    feed = TrainFeed(
        prepared.objective,
        prepared.train,
        seed=7,
        global_batch=8,
        micro_batch=2,
        dp_index=parallel.dp.index,
        dp_size=parallel.dp.size,
    )
    for step in range(steps):
        forward_backward(model, prepared.objective, feed.step(step), seed=7, step=step)
        finish_gradients(weights)
        optimizer.step()
        weights.zero_grad()
        save_checkpoint(root, step + 1, training_state(weights, optimizer), {"note": 1.5}, parallel, keep)


def reload(prepared: Prepared, parallel: ParallelContext, folder: Path, root: Path) -> None:
    """Load a checkpoint under this layout, and save what was loaded."""
    _, weights, optimizer = build(prepared, parallel)
    allocate_optimizer_state(weights, optimizer)
    manifest = open_whole(folder)
    load_state(folder, manifest, training_state(weights, optimizer))
    set_scalars(weights, optimizer, manifest.scalars)
    save_checkpoint(root, manifest.step, training_state(weights, optimizer), manifest.state, parallel, 2)


@pytest.fixture(scope="session")
def builds() -> Callable[..., Any]:
    """``builds(prepared, parallel)``: model, weights and optimizer."""
    return build


Rank = Callable[[ParallelContext], None]


def on_ranks(function: Rank, *, tp: int = 1, dp: int = 1, sp: bool = False) -> None:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        function(parallel)
        return {"done": torch.zeros(1)}

    run_processes(rank, tp=tp, dp=dp, sp=sp)


Trains = Callable[..., Path]


@pytest.fixture(scope="session")
def trains(prepared: Prepared) -> Trains:
    """``trains(root, steps=, keep=, tp=, dp=, sp=)`` trains and returns the newest checkpoint."""

    def run(root: Path, *, steps: int = 2, keep: int = 2, **layout: int) -> Path:
        on_ranks(lambda parallel: train(prepared, parallel, root, steps, keep), **layout)
        return root / f"step-{steps:08d}"

    return run


@pytest.fixture(scope="session")
def reloads(prepared: Prepared) -> Trains:
    """``reloads(folder, root, tp=, dp=, sp=)`` loads a checkpoint under a layout and saves it from there."""

    def run(folder: Path, root: Path, **layout: int) -> Path:
        on_ranks(lambda parallel: reload(prepared, parallel, folder, root), **layout)
        return root / folder.name

    return run


@pytest.fixture(scope="session")
def saved(trains: Trains, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor-parallel ranks that no test may change."""
    return trains(tmp_path_factory.mktemp("saved"), tp=2)
