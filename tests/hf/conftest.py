"""Hugging Face folders of random tiny models, as transformers itself writes them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.data.tokenizer import tokenizer_from_spec
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager

Folder = Callable[..., Path]
BYTES = 262
"""Tokens of the byte tokenizer, whose tokenizer.json the folders have."""


@pytest.fixture(scope="session", autouse=True)
def transformers_is_there_and_quiet() -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="session")
def byte_json(manager: PluginManager) -> str:
    text = manager.load_class("tokenizers", "byte").load(Path()).hf_json()
    assert text is not None
    return str(text)


@pytest.fixture
def folder(tmp_path: Path, byte_json: str) -> Folder:
    """``folder(name, classes, settings, seed=, dtype=, **save)``: a random model that transformers has saved."""

    def make(
        name: str,
        model: str,
        settings: dict[str, Any],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **save: Any,
    ) -> Path:
        import transformers

        torch.manual_seed(seed)
        cls = getattr(transformers, model)
        hf = cls(cls.config_class(**settings))
        with torch.no_grad():
            for key, parameter in hf.named_parameters():
                centre = 1.0 if "norm" in key.lower().rsplit(".", 2)[-2] or "ln_" in key else 0.0
                parameter.normal_(centre if key.endswith("weight") else 0.0, 0.2)
        path = tmp_path / name
        hf.to(dtype).save_pretrained(path, **save)
        (path / "tokenizer.json").write_text(byte_json, encoding="utf-8")
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
        return path

    return make


def own_tokenizer(path: Path, manager: PluginManager) -> tuple[str, Tokenizer]:
    """The tokenizer of a folder."""
    return tokenizer_from_spec(f"hf:{path / 'tokenizer.json'}", manager.tokenizer_class)


def draw_settings(kind: str, draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A model of a kind: transformers' class, and sizes that nobody chose."""
    kv, layers = draw.randint(1, 3), draw.randint(1, 3)
    heads = kv * draw.randint(1, 3)
    width, vocab, inner = 2 * heads * draw.randint(1, 5), BYTES + draw.randint(0, 20), draw.randint(5, 60)
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": inner, "n_positions": 48}
        ids = {"bos_token_id": 257, "eos_token_id": 257}
        return "GPT2LMHeadModel", {**sizes, **ids, "vocab_size": vocab, "tie_word_embeddings": draw.random() < 0.7}
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 48,
        "tie_word_embeddings": kind in ("llama-tied", "qwen3", "bert", "roberta"),
    }
    if kind in ("bert", "roberta"):
        names = {"bert": ["BertForPreTraining", "BertForMaskedLM", "BertModel"], "roberta": ["RobertaForMaskedLM"]}
        return draw.choice(names[kind]), {**sizes, "pad_token_id": 1 if kind == "roberta" else 0}
    sizes |= {"num_key_value_heads": kv}
    if kind == "mistral":
        return "MistralForCausalLM", {**sizes, "sliding_window": None}
    if kind == "qwen2":
        return "Qwen2ForCausalLM", sizes
    if kind == "qwen3":
        return "Qwen3ForCausalLM", {**sizes, "head_dim": 2 * draw.randint(1, 5), "attention_bias": draw.random() < 0.5}
    return "LlamaForCausalLM", sizes
