"""An exported folder under lm-eval, as it is: the likelihoods are those that megalm computes."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalm.data.tokenizer import tokenizer_from_spec
from megalm.hf.exporting import export_hf
from megalm.hf.importing import import_hf
from megalm.model.hf.origin import FOLDER
from megalm.nn.microbatch import make_microbatch
from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.train.stored import Stored, open_stored

from .conftest import Folder, draw_settings

TEXTS = ["The ship's hull was long.", "naïve", "two\nlines", "a", "0123456789" * 4]
TASK = """
task: own_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@torch.no_grad()
def bits(stored: Stored, texts: list[str]) -> float:
    """Of a byte of the texts, each after the token that lm-eval puts first."""
    special = stored.tokenizer.special
    first = special.bos if special.bos is not None else special.eos
    model, total = stored.model(single_rank(), "float32"), 0.0
    assert model.lm_head is not None
    for ids in stored.tokenizer.encode_batch(texts):
        row = torch.tensor([[first, *ids]])
        hidden = model(make_microbatch({"tokens": row[:, :-1]}, single_rank()))
        found = model.lm_head.logits(hidden, model.token_embedding).double().log_softmax(-1)
        total -= found.gather(-1, row[0, 1:, None]).sum().item()
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_likelihoods(
    kind: str, folder: Folder, tmp_path: Path, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = folder("source", *draw_settings(kind, random.Random(kind)))
    tokenizer = tokenizer_from_spec("byte", manager.tokenizer_class)
    import_hf(source, tmp_path / "in", manager, tokenizer=tokenizer)
    stored = open_stored(tmp_path / "in", manager)
    # As if it had been trained here: nothing of the folder is handed on.
    shutil.rmtree(tmp_path / "in" / FOLDER)
    state = {key: value for key, value in stored.manifest.state.items() if key != "hugging_face"}
    manifest = stored.manifest.model_copy(update={"state": state, "step": 1})
    export_hf(replace(stored, manifest=manifest), tmp_path / "out")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.yaml").write_text(TASK.format(path=data), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'out'},dtype=float32",
        tasks=["own_texts"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks")),
        device="cpu",
        bootstrap_iters=0,
    )
    assert found["results"]["own_texts"]["bits_per_byte,none"] == pytest.approx(bits(stored, TEXTS), rel=1e-5)
