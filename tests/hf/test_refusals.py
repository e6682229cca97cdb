"""What is not the same model is not written, and every refusal says what to do."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import megalm.hf.compare as compare_module
from megalm.errors import CheckpointError, ConfigError, DataError, UsageError
from megalm.hf import files
from megalm.hf.exporting import export_hf
from megalm.hf.importing import import_hf
from megalm.plugin.manager import PluginManager
from megalm.train.stored import open_stored

from .conftest import Folder, draw_settings, own_tokenizer

SIZES = draw_settings("llama", random.Random(5))


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def refused(
    source: Path, tmp_path: Path, manager: PluginManager, error: type[Exception], words: str, **more: Any
) -> None:
    with pytest.raises(error, match=words):
        import_hf(source, tmp_path / "in", manager, tokenizer=own_tokenizer(source, manager), **more)
    assert not (tmp_path / "in").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_settings_that_the_model_cannot_follow(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    source = folder("source", *SIZES)
    change_config(source, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})
    refused(source, tmp_path, manager, ConfigError, "rope_parameters.rope_type = 'yarn' is not supported")


def test_another_model_is_not_written(
    folder: Folder, tmp_path: Path, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault between reading and computing: one layer's norms exchanged, and on the way out one value."""
    source = folder("source", *SIZES)
    fill = compare_module.fill_from_logical

    def exchanged(model: Any, parallel: Any, tensors: dict[str, torch.Tensor]) -> None:
        a, b = (f"backbone.layers.0.{which}_norm.weight" for which in ("attention", "mlp"))
        fill(model, parallel, {**tensors, a: tensors[b], b: tensors[a]})

    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "fill_from_logical", exchanged)
        refused(source, tmp_path, manager, CheckpointError, "not the same model, and nothing was written")
    import_hf(source, tmp_path / "good", manager, tokenizer=own_tokenizer(source, manager))
    monkeypatch.setattr(compare_module, "fill_from_logical", exchanged)
    with pytest.raises(CheckpointError, match="not the same model"):
        export_hf(open_stored(tmp_path / "good", manager), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_transformers(
    folder: Folder, tmp_path: Path, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("source", *SIZES)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(source, tmp_path, manager, UsageError, r"install megalm\[hf\], or give --no-verify")
    made = import_hf(source, tmp_path / "in", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    assert made.agreements == []


def test_pickle_is_refused_with_what_to_do(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    source = folder("source", *SIZES)
    (source / files.SINGLE).rename(source / "pytorch_model.bin")
    words = "pytorch_model.bin: weights in pickle are not read.*save_pretrained"
    refused(source, tmp_path, manager, CheckpointError, words)


def test_shards_are_read_and_what_is_wrong_with_them_named(
    folder: Folder, tmp_path: Path, manager: PluginManager
) -> None:
    source = folder("source", *SIZES, max_shard_size="2KB")
    assert (source / files.INDEX).exists()
    whole = folder("whole", *SIZES)
    mine, theirs = files.read_tensors(source), files.read_tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    index = json.loads((source / files.INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    (source / file).rename(source / "elsewhere")
    refused(source, tmp_path, manager, CheckpointError, f"{file}: cannot be read")
    (source / "elsewhere").rename(source / file)
    other = next(f for f in index["weight_map"].values() if f != file)
    for target, words in ((other, f"lacks {name}"), ("../x.safetensors", "no safetensors file beside it")):
        changed = {**index, "weight_map": {**index["weight_map"], name: target}}
        (source / files.INDEX).write_text(json.dumps(changed))
        refused(source, tmp_path, manager, CheckpointError, words)


def test_tensors_that_do_not_fit(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    source = folder("source", *SIZES)
    tensors = load_file(source / files.SINGLE)
    save_file({**tensors, "model.surplus.weight": torch.zeros(2)}, source / files.SINGLE)
    refused(source, tmp_path, manager, CheckpointError, "unexpected model.surplus.weight")
    save_file({**tensors, "model.norm.weight": torch.zeros(1)}, source / files.SINGLE)
    refused(source, tmp_path, manager, CheckpointError, "model.norm.weight: shape")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].double()}, source / files.SINGLE)
    refused(source, tmp_path, manager, CheckpointError, "model.norm.weight is float64")


def test_objectives_that_do_not_fit_and_folders_that_are_taken(
    folder: Folder, tmp_path: Path, manager: PluginManager
) -> None:
    source = folder("source", *SIZES)
    refused(source, tmp_path, manager, ConfigError, "--objective mlm needs bidirectional attention", objective="mlm")
    model, sizes = draw_settings("roberta", random.Random(1))
    roberta = folder("roberta", model, {**sizes, "type_vocab_size": 1})
    refused(roberta, tmp_path, manager, ConfigError, "needs 2 token types, but the model has 1", objective="mlm+nsp")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not overwritten"):
        import_hf(
            source, tmp_path / "taken", manager, tokenizer=own_tokenizer(source, manager), overwrite=True, verify=False
        )


def test_a_model_that_no_family_has_is_refused_by_its_keys(
    folder: Folder, tmp_path: Path, manager: PluginManager
) -> None:
    source = folder("source", *SIZES)
    import_hf(source, tmp_path / "in", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    stored = open_stored(tmp_path / "in", manager)
    odd = replace(stored.spec, cfg=stored.spec.cfg.model_copy(update={"norm_placement": "post", "gated": False}))
    with pytest.raises(ConfigError) as caught:
        export_hf(replace(stored, spec=odd), tmp_path / "out", verify=False)
    assert "model.norm_placement = 'post': llama has 'pre'" in str(caught.value)
    assert "model.gated = False: llama has True" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kib", 1536), ("700", 700), ("0MB", None), ("5 parsecs", None)]
)
def test_sizes(text: str, size: int | None) -> None:
    if size is not None:
        assert files.parse_size(text) == size
        return
    with pytest.raises(ConfigError, match="is no size"):
        files.parse_size(text)
