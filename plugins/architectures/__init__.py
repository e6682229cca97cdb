"""First-party architectures: defaults of ``[model]`` for families of models."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Architecture, Component, hookimpl

MEGALM_API = (1, 0)


@hookimpl
def megalm_architectures() -> Iterable[Component]:
    yield Component("gpt2", "megalm_plugins.architectures:GPT2", "pre-norm decoder, learned positions, GELU")
    yield Component("llama", "megalm_plugins.architectures:Llama", "RMSNorm, rotary positions, SwiGLU, no biases")
    yield Component("bert", "megalm_plugins.architectures:Bert", "post-norm encoder, token types, GELU, MLM transform")


class GPT2(Architecture):
    """GPT-2. (Radford et al., 2019.)"""

    defaults = {
        "norm": "layer_norm",
        "norm_eps": 1e-5,
        "norm_placement": "pre",
        "final_norm": True,
        "position": "learned",
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "scaled_init": True,
    }


class Llama(Architecture):
    """LLaMA. (Touvron et al., 2023.)"""

    defaults = {
        "norm": "rms_norm",
        "norm_eps": 1e-5,
        "norm_placement": "pre",
        "final_norm": True,
        "position": "rope",
        "activation": "silu",
        "gated": True,
        "qkv_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_embeddings": False,
        "scaled_init": False,
    }


class Bert(Architecture):
    """BERT. (Devlin et al., 2019.)"""

    defaults = {
        "norm": "layer_norm",
        "norm_eps": 1e-12,
        "norm_placement": "post",
        "embedding_norm": True,
        "final_norm": False,
        "position": "learned",
        "activation": "gelu",
        "tie_embeddings": True,
        "token_types": 2,
        "lm_head_transform": True,
        "lm_head_bias": True,
        "scaled_init": False,
    }
