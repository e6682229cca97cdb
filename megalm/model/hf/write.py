"""megalm's ``[model]`` as a Hugging Face configuration.

What is written is read back with :mod:`megalm.model.hf.config`: a model that a family cannot express comes back as
another one, and is refused by the keys that differ, so that no list of what cannot be said has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config.schema import ModelConfig
from megalm.errors import ConfigError
from megalm.model.hf.config import ACTIVATIONS, ROPE_SCALING, model_settings
from megalm.model.hf.heads import ModelHead, head_class
from megalm.model.spec import ModelSpec

_TRAINING_ONLY = {"architecture", "init_std", "scaled_init", "dropout", "attention_dropout"}
_ROPE = {key for key in ModelConfig.model_fields if key.startswith("rope_")}
_LEARNED = {"max_positions", "position_offset"}
_CLASSES = {
    "gpt2": ("GPT2Model", "GPT2LMHeadModel"),
    "llama": ("LlamaModel", "LlamaForCausalLM"),
    "mistral": ("MistralModel", "MistralForCausalLM"),
    "qwen2": ("Qwen2Model", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Model", "Qwen3ForCausalLM"),
    "bert": ("BertModel", "BertForMaskedLM"),
    "roberta": ("RobertaModel", "RobertaForMaskedLM"),
}


@dataclass(frozen=True)
class Contents:
    """What a model has besides its backbone."""

    lm_head: bool
    pooler: bool = False
    nsp: bool = False
    head: ModelHead | None = None

    @property
    def sentence_vectors(self) -> bool:
        """The folder is one of sentence-transformers."""
        return self.head is not None and self.head.told.task == "sentence_embedding"


def class_name(model_type: str, contents: Contents) -> str:
    """The class of transformers that has these parts."""
    if contents.head is not None:
        return head_class(model_type, contents.head)
    if contents.nsp:
        return "BertForPreTraining" if contents.lm_head else "BertForNextSentencePrediction"
    return _CLASSES[model_type][contents.lm_head]


def family_of(spec: ModelSpec) -> str:
    """The ``model_type`` that comes nearest."""
    c = spec.cfg
    if not spec.causal:
        return "roberta" if c.position_offset else "bert"
    if c.position != "rope":
        return "gpt2"
    if c.qk_norm:
        return "qwen3"
    return "qwen2" if c.qkv_bias and not c.attention_bias else "llama"


def hf_config(spec: ModelSpec, contents: Contents, special: Mapping[str, int | None], longest: int) -> dict[str, Any]:
    """``config.json`` of a model. ``special``: ids of ``pad``, ``bos`` and ``eos``; ``longest``: text in tokens, where
    the positions themselves set no limit.

    ConfigError lists the keys of ``[model]`` that the family cannot express.
    """
    family, c = family_of(spec), spec.cfg
    written = _gpt2(spec) if family == "gpt2" else _encoder(spec) if not spec.causal else _llama(spec, longest)
    written |= {
        "model_type": family,
        "vocab_size": spec.vocab_size,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "pad_token_id": c.position_offset - 1 if family == "roberta" else special.get("pad"),
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
    }
    back = ModelConfig(**model_settings(written))
    if differ := differences(resolved(back), resolved(c, spec)):
        raise ConfigError([f"{key} = {mine!r}: {family} has {theirs!r}" for key, theirs, mine in differ])
    return {"architectures": [class_name(family, contents)], **written}


def resolved(c: ModelConfig, spec: ModelSpec | None = None) -> dict[str, Any]:
    """The keys of ``[model]`` that decide what a model computes, with every size filled in, those of ``spec`` first."""
    found = {key: value for key, value in c.model_dump().items() if key not in _TRAINING_ONLY}
    found |= {
        "kv_heads": c.kv_heads or c.heads,
        "head_dim": c.head_dim or c.hidden_size // c.heads,
        "ffn_size": c.ffn_size or 4 * c.hidden_size,
    }
    if spec is not None:
        names = ("vocab_size", "kv_heads", "head_dim", "ffn_size", "max_positions", "token_types")
        found |= {name: getattr(spec, name) for name in names}
    unused = _LEARNED if c.position != "learned" else _ROPE
    if c.position == "rope" and c.rope_scaling != "llama3":
        unused = unused | {"rope_low_frequency_factor", "rope_high_frequency_factor", "rope_original_positions"}
    if c.position == "rope" and c.rope_scaling == "none":
        unused = unused | {"rope_factor"}
    return {key: value for key, value in found.items() if key not in unused}


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, their value, mine) of what differs."""
    keys = [*mine, *(key for key in theirs if key not in mine)]
    return [(f"model.{key}", theirs.get(key), mine.get(key)) for key in keys if theirs.get(key) != mine.get(key)]


def _activation(spec: ModelSpec, tanh: str) -> str:
    """Its name; the tanh form of GELU goes by several, of which a family has one."""
    wanted = spec.cfg.activation
    return tanh if wanted == "gelu_tanh" else next(name for name, ours in ACTIVATIONS.items() if ours == wanted)


def _gpt2(spec: ModelSpec) -> dict[str, Any]:
    c = spec.cfg
    return {
        "n_layer": c.layers,
        "n_embd": c.hidden_size,
        "n_head": c.heads,
        "n_inner": spec.ffn_size,
        "n_positions": spec.max_positions,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": _activation(spec, "gelu_new"),
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
    }


def _llama(spec: ModelSpec, longest: int) -> dict[str, Any]:
    c = spec.cfg
    scaling = None
    if c.rope_scaling != "none":
        values = {theirs: getattr(c, ours) for theirs, ours in ROPE_SCALING[c.rope_scaling].items()}
        scaling = {"rope_type": c.rope_scaling, **values}
    return {
        "num_hidden_layers": c.layers,
        "hidden_size": c.hidden_size,
        "num_attention_heads": c.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn_size,
        "max_position_embeddings": c.max_positions or longest,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": _activation(spec, "gelu_pytorch_tanh"),
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "attention_dropout": c.attention_dropout,
    }


def _encoder(spec: ModelSpec) -> dict[str, Any]:
    c = spec.cfg
    return {
        "num_hidden_layers": c.layers,
        "hidden_size": c.hidden_size,
        "num_attention_heads": c.heads,
        "intermediate_size": spec.ffn_size,
        "max_position_embeddings": spec.max_positions,
        "type_vocab_size": spec.token_types,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": _activation(spec, "gelu_new"),
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
    }
