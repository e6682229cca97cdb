"""Weights of 8 bits: what they are, that transformers computes with them, and what is measured."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megalm.checkpoint.load import logical_weights
from megalm.cli.app import app
from megalm.data.store import TokenStore
from megalm.errors import CheckpointError, UsageError
from megalm.hf import quantizing
from megalm.hf.importing import import_hf
from megalm.hf.quantizing import quantize_hf
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_store
from megalm.train.feed import evaluation_rows
from megalm.train.head import predict
from megalm.train.language_scoring import language_objective
from megalm.train.scoring import score, stored_head
from megalm.train.stored import open_stored

from .conftest import Folder, draw_settings, own_tokenizer
from .test_heads import CASES, tuned

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def torchao_is_there() -> None:
    pytest.importorskip("torchao")


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "qwen3"])
def test_matrices_of_layers_are_integers_times_a_scale(
    kind: str, folder: Folder, tmp_path: Path, manager: PluginManager, campaign_seed: int
) -> None:
    draw = random.Random(f"{campaign_seed} {kind}")
    source = folder("source", *draw_settings(kind, draw), seed=campaign_seed)
    import_hf(source, tmp_path / "in", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    stored = open_stored(tmp_path / "in", manager)
    before = {name: torch.from_numpy(each) for name, each in logical_weights(stored.folder, stored.manifest)}
    made = quantize_hf(stored, tmp_path / "out")
    assert made.agreements
    for name, each in made.logical.items():
        if ".layers." in name and each.dim() == 2:
            step = before[name].abs().amax(dim=1, keepdim=True) / 127
            assert ((each - before[name]).abs() <= 0.51 * step).all(), name
            assert all(len(row.unique()) <= 256 for row in each)
            assert not torch.equal(each, before[name]), name
        elif "embedding" in name:
            assert torch.equal(each, before[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"


def test_a_head_is_measured_before_and_after(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    stored, rows = tuned(folder, tmp_path, manager, "bert", CASES["classes"], random.Random(1))
    line = ["quantize", str(tmp_path / "run"), str(tmp_path / "out"), "--data", str(tmp_path / "rows.jsonl")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.exception
    import transformers

    name, head = stored_head(stored)
    own = predict(stored.model(single_rank(), "float32"), name, head, rows, micro_batch=4)
    before = score(name, head, rows, own).metrics["accuracy"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        best = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits[0].argmax()) for row in rows]
    after = sum(model.config.id2label[n] == row["label"] for n, row in zip(best, rows, strict=True)) / len(rows)
    assert f"accuracy  {before:.4f} before, {after:.4f} after" in done.stdout
    assert "exists already" in str(CliRunner().invoke(app, line).exception)


def test_a_language_model_is_measured_before_and_after(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    model, sizes = draw_settings("llama", random.Random(5))
    source = folder("source", model, sizes)
    import_hf(source, tmp_path / "in", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    store = make_store(tmp_path, documents=20, manager=manager, tokenizer=str(tmp_path / "in"))
    line = ["quantize", str(tmp_path / "in"), str(tmp_path / "out"), "--data", str(store)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.exception
    told = re.search(r"causal_lm  ([\d.]+) before, ([\d.]+) after", done.stdout)
    assert told is not None
    evaluated = CliRunner().invoke(app, ["eval", str(tmp_path / "in"), "--data", str(store), "--json"])
    whole = json.loads(evaluated.stdout)
    assert float(told[1]) == pytest.approx(whole["loss"], abs=1e-4)
    import transformers

    quantized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kept = open_stored(tmp_path / "in", manager)
    with torch.no_grad():
        objective = language_objective(kept, manager, length=whole["sequence_length"])
        losses, tokens = 0.0, 0
        corpus = TokenStore.open(store, "validation")
        for rows in evaluation_rows(
            objective, corpus, seed=0, samples=whole["rows"], micro_batch=4, dp_index=0, dp_size=1
        ):
            batch = {name: torch.from_numpy(value) for name, value in rows.batch.items()}
            logits = quantized(batch["tokens"]).logits.flatten(0, 1)
            labels = batch["labels"].flatten()
            losses += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += int((labels != IGNORE).sum())
    assert tokens == whole["scored"]["causal_lm"]
    assert float(told[2]) == pytest.approx(losses / tokens, abs=2e-4)


def test_a_folder_that_computes_otherwise_does_not_appear(
    folder: Folder, tmp_path: Path, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, _ = tuned(folder, tmp_path, manager, "bert", CASES["words"], random.Random(2))
    widen = quantizing._widened

    def other(model: Any) -> Any:
        wide, layers = widen(model)
        return {name: each * 1.01 if "query" in name else each for name, each in wide.items()}, layers

    monkeypatch.setattr(quantizing, "_widened", other)
    with pytest.raises(CheckpointError, match="logits of words of megalm and transformers differ"):
        quantize_hf(stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_is_said(
    folder: Folder, tmp_path: Path, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("source", *draw_settings("gpt2", random.Random(3)))
    import_hf(source, tmp_path / "in", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    stored = open_stored(tmp_path / "in", manager)
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel has no linear layers that torchao could quantize"):
        quantize_hf(stored, tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(UsageError, match=r"install megalm\[int8\]"):
        quantize_hf(stored, tmp_path / "out")
