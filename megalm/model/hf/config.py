"""What a Hugging Face configuration means in megalm's ``[model]``.

Only the families whose arithmetic the backbone reproduces exactly are known. A setting that would change the
arithmetic in a way that the backbone cannot follow is an error that names it; ignoring it would load weights that
compute something else. Everything here works on the plain dictionary of ``config.json``: neither torch nor
transformers is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megalm.errors import ConfigError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""Hugging Face names and megalm's."""
ROPE_SCALING = {
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_frequency_factor",
        "high_freq_factor": "rope_high_frequency_factor",
        "original_max_position_embeddings": "rope_original_positions",
    },
}
"""For each kind of stretched rotary frequencies, Hugging Face's keys and megalm's."""
_REQUIRED = object()


class _Reader:
    """Reads keys of one ``config.json`` and collects what is wrong with it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value; where the file leaves it out, what transformers would take."""
        if key in self.config:
            return self.config[key]
        if default is _REQUIRED:
            self.problems.append(f"{key}: missing from the Hugging Face configuration")
            return None
        return default

    def must_be(self, key: str, *allowed: Any, default: Any = _REQUIRED) -> None:
        """A setting of which the backbone knows these values only."""
        value = self.get(key, allowed[0] if default is _REQUIRED else default)
        if value not in allowed:
            known = " or ".join(map(repr, allowed))
            self.problems.append(f"{key} = {value!r} is not supported; megalm computes {known}")

    def activation(self, key: str, default: str) -> str | None:
        value = self.get(key, default)
        if value not in ACTIVATIONS:
            self.problems.append(f"{key} = {value!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
            return None
        return ACTIVATIONS[value]

    def rope(self) -> dict[str, Any]:
        """Keys of rotary positions, from ``rope_parameters`` (new), or ``rope_theta`` and ``rope_scaling`` (old)."""
        found: dict[str, Any] = {"rope_scaling": "none"}
        for key in ("rope_parameters", "rope_scaling"):
            table = self.config.get(key) or {}
            kind = table.get("rope_type", table.get("type", "default"))
            if kind in ROPE_SCALING:
                found |= self._scaling(key, kind, table)
            elif kind != "default":
                known = ", ".join(map(repr, ("default", *ROPE_SCALING)))
                self.problems.append(f"{key}.rope_type = {kind!r} is not supported; megalm computes {known}")
            share = table.get("partial_rotary_factor", 1.0)
            if share != 1.0:
                self.problems.append(f"{key}.partial_rotary_factor = {share!r} is not supported; megalm computes 1.0")
        self.must_be("partial_rotary_factor", 1.0)
        nested = self.config.get("rope_parameters") or {}
        return {**found, "rope_theta": float(nested.get("rope_theta", self.get("rope_theta", 10000.0)))}

    def _scaling(self, key: str, kind: str, table: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"rope_scaling": kind}
        for theirs, ours in ROPE_SCALING[kind].items():
            if theirs not in table:
                self.problems.append(f"{key}.{theirs}: missing, and rope_type = {kind!r} needs it")
            else:
                found[ours] = table[theirs]
        return found

    def no_window(self, window: Any) -> None:
        """A sliding window is none where it is as long as the longest text."""
        longest = self.config.get("max_position_embeddings")
        if window is not None and (longest is None or window < longest):
            self.problems.append(
                f"sliding_window = {window!r} is not supported where max_position_embeddings = {longest!r}; megalm "
                "computes None"
            )


def _gpt2(r: _Reader) -> dict[str, Any]:
    r.must_be("scale_attn_weights", True)
    r.must_be("scale_attn_by_inverse_layer_idx", False)
    r.must_be("add_cross_attention", False)
    # reorder_and_upcast_attn changes rounding in half precision only, so any value is taken.
    dropout, embedding_dropout = r.get("resid_pdrop", 0.1), r.get("embd_pdrop", 0.1)
    if dropout != embedding_dropout:
        r.problems.append(
            f"resid_pdrop = {dropout} and embd_pdrop = {embedding_dropout} differ; megalm has one dropout, "
            "make them equal"
        )
    return {
        "architecture": "gpt2",
        "layers": r.get("n_layer"),
        "hidden_size": r.get("n_embd"),
        "heads": r.get("n_head"),
        "ffn_size": r.get("n_inner", None),
        "vocab_size": r.get("vocab_size"),
        "max_positions": r.get("n_positions"),
        "norm_eps": r.get("layer_norm_epsilon", 1e-5),
        "activation": r.activation("activation_function", "gelu_new"),
        "tie_embeddings": r.get("tie_word_embeddings", True),
        "dropout": dropout,
        "attention_dropout": r.get("attn_pdrop", 0.1),
        "init_std": r.get("initializer_range", 0.02),
        "norm": "layer_norm",
        "norm_placement": "pre",
        "embedding_norm": False,
        "final_norm": True,
        "position": "learned",
        "gated": False,
        "qkv_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "token_types": 0,
        "lm_head_transform": False,
        "lm_head_bias": False,
        "scaled_init": True,
    }


def _llama_like(
    r: _Reader,
    *,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: bool = False,
) -> dict[str, Any]:
    """``kv_heads``, ``head_dim``: what transformers takes where the file does not say; none is as many as query heads,
    and an equal share of the hidden size."""
    r.must_be("pretraining_tp", 1)
    layers = r.get("layer_types", None) or []
    if other := sorted(set(layers) - {"full_attention"}):
        r.problems.append(f"layer_types has {', '.join(other)}; megalm computes 'full_attention'")
    return {
        "architecture": "llama",
        "layers": r.get("num_hidden_layers"),
        "hidden_size": r.get("hidden_size"),
        "heads": r.get("num_attention_heads"),
        "kv_heads": r.get("num_key_value_heads", kv_heads),
        "head_dim": r.get("head_dim", head_dim),
        "ffn_size": r.get("intermediate_size"),
        "vocab_size": r.get("vocab_size"),
        "max_positions": r.get("max_position_embeddings", None),
        "norm_eps": r.get("rms_norm_eps", 1e-6),
        **r.rope(),
        "qk_norm": qk_norm,
        "activation": r.activation("hidden_act", "silu"),
        "tie_embeddings": r.get("tie_word_embeddings", False),
        "attention_dropout": r.get("attention_dropout", 0.0),
        "init_std": r.get("initializer_range", 0.02),
        "norm": "rms_norm",
        "norm_placement": "pre",
        "embedding_norm": False,
        "final_norm": True,
        "position": "rope",
        "gated": True,
        "qkv_bias": qkv_bias,
        "attention_bias": out_bias,
        "mlp_bias": mlp_bias,
        "token_types": 0,
        "lm_head_transform": False,
        "lm_head_bias": False,
        "dropout": 0.0,
        "scaled_init": False,
    }


def _llama(r: _Reader) -> dict[str, Any]:
    bias = r.get("attention_bias", False)
    r.no_window(r.get("sliding_window", None))
    return _llama_like(r, qkv_bias=bias, out_bias=bias, mlp_bias=r.get("mlp_bias", False))


def _mistral(r: _Reader) -> dict[str, Any]:
    r.no_window(r.get("sliding_window", 4096))
    return _llama_like(r, qkv_bias=False, out_bias=False, mlp_bias=False, kv_heads=8)


def _qwen2(r: _Reader) -> dict[str, Any]:
    r.must_be("use_sliding_window", False)
    return _llama_like(r, qkv_bias=True, out_bias=False, mlp_bias=False, kv_heads=32)


def _qwen3(r: _Reader) -> dict[str, Any]:
    r.must_be("use_sliding_window", False)
    bias = r.get("attention_bias", False)
    return _llama_like(
        r, qkv_bias=bias, out_bias=bias, mlp_bias=False, kv_heads=32, head_dim=128, qk_norm=True
    )


def _roberta(r: _Reader) -> dict[str, Any]:
    """Positions begin after the padding token's id: that row of the table is the padding's."""
    pad = r.get("pad_token_id", 1)
    if not isinstance(pad, int):
        r.problems.append(f"pad_token_id = {pad!r} is not supported: RoBERTa's positions begin after it")
        pad = 1
    # Its language-modelling head has GELU whatever the layers have.
    r.must_be("hidden_act", "gelu")
    return {**_bert(r), "position_offset": pad + 1}


def _bert(r: _Reader) -> dict[str, Any]:
    r.must_be("is_decoder", False)
    r.must_be("add_cross_attention", False)
    r.must_be("position_embedding_type", "absolute")
    return {
        "architecture": "bert",
        "position_offset": 0,
        "layers": r.get("num_hidden_layers"),
        "hidden_size": r.get("hidden_size"),
        "heads": r.get("num_attention_heads"),
        "ffn_size": r.get("intermediate_size"),
        "vocab_size": r.get("vocab_size"),
        "max_positions": r.get("max_position_embeddings"),
        "norm_eps": r.get("layer_norm_eps", 1e-12),
        "activation": r.activation("hidden_act", "gelu"),
        "token_types": r.get("type_vocab_size", 2),
        "tie_embeddings": r.get("tie_word_embeddings", True),
        "dropout": r.get("hidden_dropout_prob", 0.1),
        "attention_dropout": r.get("attention_probs_dropout_prob", 0.1),
        "init_std": r.get("initializer_range", 0.02),
        "norm": "layer_norm",
        "norm_placement": "post",
        "embedding_norm": True,
        "final_norm": False,
        "position": "learned",
        "gated": False,
        "qkv_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "lm_head_transform": True,
        "lm_head_bias": True,
        "scaled_init": False,
    }


_FAMILIES: dict[str, Callable[[_Reader], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "bert": _bert,
    "roberta": _roberta,
}
MODEL_TYPES = tuple(_FAMILIES)
"""Values of ``model_type`` that can be mapped."""


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of :class:`megalm.config.schema.ModelConfig` for a ``config.json``; what is left to its default is absent.

    ConfigError lists every setting that the backbone cannot reproduce.
    """
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ConfigError([f"model_type = {kind!r} is not supported; expected one of {', '.join(MODEL_TYPES)}"])
    reader = _Reader(config)
    settings = _FAMILIES[kind](reader)
    if reader.problems:
        raise ConfigError([f"{kind}: {problem}" for problem in reader.problems])
    return {key: value for key, value in settings.items() if value is not None}
