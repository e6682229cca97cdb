"""Pruning and training on: which weights are zero, and that they stay so under every layout."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune as torch_prune
from typer.testing import CliRunner

from megalm.checkpoint.load import logical_weights
from megalm.cli.app import app
from megalm.errors import CheckpointError, ConfigError
from megalm.parallel.mesh import single_rank
from megalm.parallel.sim import run_simulated
from megalm.plugin.manager import PluginManager
from megalm.train.prune import prune, zero_smallest
from megalm.train.stored import Stored, find_checkpoint, open_stored
from megalm.train.trainer import Trainer

SHARE = 0.6


def weights_of(stored: Stored) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(each) for name, each in logical_weights(stored.folder, stored.manifest)}


def matrices(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in tensors.items() if ".layers." in name and each.dim() > 1}


@pytest.fixture
def base(prepare: Any, tmp_path: Path, manager: PluginManager) -> Stored:
    """A language model after two steps, in float64."""
    run = prepare(
        "causal_lm",
        "train.precision=float64",
        "train.steps=2",
        "sample.tokens=0",
        "model.kv_heads=2",
        f"run.dir={tmp_path / 'base'}",
        architecture="llama",
    )
    Trainer(run, single_rank()).run()
    return open_stored(find_checkpoint(run.run_dir)[0], manager)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_same_weights_as_torchs_pruning(base: Stored, scope: Any, tmp_path: Path, manager: PluginManager) -> None:
    made = prune(base, tmp_path / "pruned", SHARE, scope=scope)
    before, after = weights_of(base), weights_of(open_stored(made.folder, manager, required=True))
    layers: list[tuple[torch.nn.Linear, str]] = []
    for each in matrices(before).values():
        layer = torch.nn.Linear(each.shape[1], each.shape[0], bias=False, dtype=torch.float64)
        layer.weight.data.copy_(each)
        layers.append((layer, "weight"))
    if scope == "model":
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=SHARE)
    else:
        for layer, name in layers:
            torch_prune.l1_unstructured(layer, name, amount=SHARE)
    for (name, each), (layer, _) in zip(matrices(after).items(), layers, strict=True):
        differ = int((each != layer.weight).sum())
        assert differ <= (1 if scope == "tensor" else len(layers)), name  # torch rounds the count, we cut it off
    others = before.keys() - matrices(before).keys()
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert made.zeros == sum(int((each == 0).sum()) for each in matrices(after).values())
    assert made.zeros / made.weights == pytest.approx(SHARE, abs=0.01)


def test_equal_magnitudes_are_pruned_in_order_and_never_one_more() -> None:
    tensor = torch.tensor([[1.0, -1.0, 1.0], [0.0, 2.0, -1.0]])
    zero_smallest([tensor], 0.5)
    assert tensor.tolist() == [[0.0, 0.0, 1.0], [0.0, 2.0, -1.0]]


LAYOUTS = [{"tp": 2, "sp": True, "dp": 2}, {"pp": 2}, {"dp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_zeros_stay_and_all_layouts_train_alike(
    base: Stored, layout: dict[str, Any], prepare: Any, tmp_path: Path, manager: PluginManager
) -> None:
    prune(base, tmp_path / "pruned", SHARE)

    def train(name: str, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
        axes = [f"parallel.{axis}={str(size).lower()}" for axis, size in layout.items() if axis != "dp"]
        ranks = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)
        run = prepare(
            "causal_lm",
            "train.precision=float64",
            "sample.tokens=0",
            "model.kv_heads=2",
            "train.micro_batch=2",
            "finetune.method=full",
            "finetune.keep_zeros=true",
            "checkpoint.every=2",
            "train.steps=3",
            f"checkpoint.load={tmp_path / 'pruned'}",
            f"run.dir={tmp_path / name}",
            *axes,
            architecture="llama",
            world_size=ranks,
        )
        run_simulated(lambda parallel: Trainer(run, parallel).run(), **layout)
        return weights_of(open_stored(find_checkpoint(run.run_dir)[0], manager))

    before = weights_of(open_stored(tmp_path / "pruned", manager))
    alone, divided = train("alone", {}), train("divided", layout)
    for name, each in alone.items():
        torch.testing.assert_close(divided[name], each, atol=1e-9, rtol=0)
    for name, each in matrices(alone).items():
        zero = before[name] == 0
        assert torch.equal(divided[name] == 0, zero), name
        assert torch.equal(each == 0, zero), name
        assert (each != before[name])[~zero].double().mean() > 0.99, name
    # Stopped after the second step and gone on under the layout of one rank.
    shutil.rmtree(tmp_path / "divided" / "checkpoints" / "step-00000003")
    for name, each in train("divided", {}).items():
        torch.testing.assert_close(each, alone[name], atol=1e-9, rtol=0)


def test_mistakes(base: Stored, prepare: Any, tmp_path: Path, manager: PluginManager) -> None:
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["prune", str(base.folder), str(tmp_path / "out"), *arguments])

    for share in ("1", "0", "-0.5"):
        assert "above 0 and below 1" in str(invoke("--sparsity", share).exception)
    done = invoke("--sparsity", "0.5")
    assert done.exit_code == 0, done.output
    assert re.search(r"zero +[\d,]+ of [\d,]+ \((49.\d|50.0)%\) weights of \d+ matrices", done.stdout)
    assert "exists" in str(invoke("--sparsity", "0.5").exception)
    assert invoke("--sparsity", "0.4", "--overwrite").exit_code == 0
    start = ["model.kv_heads=2", f"checkpoint.load={base.folder}", f"run.dir={tmp_path / 'run'}", "sample.tokens=0"]
    keep = "finetune.keep_zeros=true"
    run = prepare("causal_lm", *start, keep, "finetune.method=full", architecture="llama")
    with pytest.raises(CheckpointError, match="no weight of the layers is zero"):
        Trainer(run, single_rank()).run()
    with pytest.raises(ConfigError, match=r'goes with finetune.method = "full" or "frozen"; found "lora"'):
        prepare("causal_lm", *start, keep, "finetune.method=lora", architecture="llama")
    with pytest.raises(ConfigError, match=r'goes with finetune.method = "full" or "frozen"; found "none"'):
        prepare("causal_lm", *start, keep, architecture="llama")
