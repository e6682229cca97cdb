"""The map itself: it inverts, it refuses what it cannot reproduce, and it names what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.errors import CheckpointError, ConfigError
from megalm.model.hf.config import model_settings
from megalm.model.hf.names import Entry, tensor_map
from megalm.model.language_model import LanguageModel
from megalm.nn.module import fill_from_logical, logical_pieces, materialise
from megalm.parallel.mesh import single_rank

from .hf_case import make_case
from .test_hf import BERT, GPT2, LLAMA, NAMED

GPT2_FILE = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
LLAMA_FILE = {
    "model_type": "llama",
    "vocab_size": 5,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BERT_FILE = {**LLAMA_FILE, "model_type": "bert", "max_position_embeddings": 8}


@pytest.mark.parametrize("name", NAMED)
def test_there_and_back(name: str) -> None:
    family, settings = NAMED[name]
    case = make_case(family, 1, torch.float32, **settings)
    names = tensor_map(family, case.spec())
    state = case.hf.state_dict()
    back = names.to_hf(names.to_logical(state))
    assert set(state) - set(back) <= {*names.tied, "cls.predictions.bias", "lm_head.bias"}
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]), key
        assert tensor.is_contiguous()


def test_the_file_of_a_bare_backbone_leaves_the_prefix_out() -> None:
    case = make_case("gpt2", 1, torch.float32, **GPT2)
    bare = case.hf.transformer.state_dict()
    whole = case.hf.state_dict()
    names = tensor_map("gpt2", case.spec())
    assert "wte.weight" in bare
    assert names.to_logical(bare).keys() == names.to_logical(whole).keys()


def test_old_norm_names_and_buffers_are_read_over() -> None:
    case = make_case("bert", 1, torch.float32, **BERT)
    names = tensor_map("bert", case.spec())
    state = case.hf.state_dict()
    norms = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    old = {}
    for key, tensor in state.items():
        for new, former in norms:
            key = key.replace(new, former)
        old[key] = tensor
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    assert old.keys() != state.keys()
    found, expected = names.to_logical(old), names.to_logical(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_missing_and_unexpected_tensors_are_named() -> None:
    case = make_case("llama", 1, torch.float32, **LLAMA)
    state = dict(case.hf.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1\.mlp.*unexpected model\.layers\.7\.mlp"):
        tensor_map("llama", case.spec()).to_logical(state)


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    case = make_case("gpt2", 1, torch.float32, **GPT2)
    state = dict(case.hf.state_dict())
    key = "transformer.h.0.attn.c_attn.weight"
    state[key] = state[key].t()
    with pytest.raises(CheckpointError, match=r"c_attn\.weight: shape \[72, 24\], but this model's is \[24, 72\]"):
        tensor_map("gpt2", case.spec()).to_logical(state)


def test_tied_tensors_that_differ_are_refused() -> None:
    case = make_case("gpt2", 1, torch.float32, **GPT2)
    state = dict(case.hf.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from transformer\.wte\.weight"):
        tensor_map("gpt2", case.spec()).to_logical(state)


def test_to_hf_names_what_is_missing_or_unexpected() -> None:
    case = make_case("gpt2", 1, torch.float32, **GPT2)
    names = tensor_map("gpt2", case.spec())
    logical = names.to_logical(case.hf.state_dict())
    with pytest.raises(CheckpointError, match="unexpected classifiers"):
        names.to_hf({**logical, "classifiers.pooler.weight": torch.zeros(1)})
    del logical["backbone.layers.0.attention.k.weight"]
    with pytest.raises(CheckpointError, match=r"attention\.k\.weight: missing; transformer\.h\.0\.attn"):
        names.to_hf(logical)


def test_fused_and_transposed_by_hand() -> None:
    entry = Entry("w", (("q", (2, 3)), ("k", (1, 3))), transposed=True)
    parts = entry.to_logical(torch.arange(9.0).view(3, 3))
    assert parts["q"].tolist() == [[0.0, 3.0, 6.0], [1.0, 4.0, 7.0]]
    assert parts["k"].tolist() == [[2.0, 5.0, 8.0]]
    assert entry.to_hf(parts).tolist() == torch.arange(9.0).view(3, 3).tolist()


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        (GPT2_FILE, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (GPT2_FILE, {"scale_attn_weights": False}, "scale_attn_weights = False"),
        (GPT2_FILE, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2_FILE, {"activation_function": "mish"}, "activation_function = 'mish'"),
        (GPT2_FILE, {"embd_pdrop": 0.0}, "embd_pdrop = 0.0"),
        (LLAMA_FILE, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic'"),
        (LLAMA_FILE, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn'"),
        (LLAMA_FILE, {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor: missing"),
        (LLAMA_FILE, {"sliding_window": 16, "max_position_embeddings": 32}, "sliding_window = 16"),
        (LLAMA_FILE, {"model_type": "smollm3"}, "model_type = 'smollm3'"),
        (LLAMA_FILE, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (LLAMA_FILE, {"pretraining_tp": 2}, "pretraining_tp = 2"),
        (LLAMA_FILE, {"hidden_act": "quick_gelu"}, "hidden_act"),
        (LLAMA_FILE, {"model_type": "mistral"}, "sliding_window = 4096"),
        (LLAMA_FILE, {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        (LLAMA_FILE, {"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "sliding_attention"),
        (LLAMA_FILE, {"model_type": "t5"}, "model_type = 't5'"),
        (BERT_FILE, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (BERT_FILE, {"is_decoder": True}, "is_decoder"),
        (BERT_FILE, {"model_type": "roberta", "hidden_act": "relu"}, "hidden_act = 'relu'"),
        (BERT_FILE, {"model_type": "roberta", "pad_token_id": None}, "pad_token_id = None"),
    ],
)
def test_settings_that_change_the_arithmetic_are_refused(
    file: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    assert model_settings(file)
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        model_settings({**file, **change})


def test_all_problems_at_once() -> None:
    broken = {**GPT2_FILE, "scale_attn_weights": False, "add_cross_attention": True}
    del broken["n_layer"]
    with pytest.raises(ConfigError) as caught:
        model_settings(broken)
    assert len(caught.value.problems) == 3


def test_old_and_new_rotary_settings_mean_the_same() -> None:
    old = model_settings({**LLAMA_FILE, "rope_theta": 500.0, "rope_scaling": None})
    new = model_settings({**LLAMA_FILE, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert old == new
    assert new["rope_theta"] == 500.0


def test_fill_lists_everything_and_writes_nothing_where_something_is_wrong() -> None:
    case, one = make_case("gpt2", 1, torch.float32, **GPT2), single_rank()
    spec = case.spec()
    model = LanguageModel(spec, one)
    materialise(model, one, 0, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logical = tensor_map("gpt2", spec).to_logical(case.hf.state_dict())
    logical["backbone.final_norm.weight"] = torch.zeros(2)
    logical["nothing.weight"] = torch.zeros(2)
    del logical["backbone.layers.0.attention.v.bias"]
    with pytest.raises(CheckpointError) as caught:
        fill_from_logical(model, one, logical)
    for part in ("nothing.weight: unexpected", "attention.v.bias: missing", "final_norm.weight: shape [2]"):
        assert part in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_fill_converts_to_the_models_type() -> None:
    case, one = make_case("gpt2", 1, torch.float32, **GPT2), single_rank()
    spec = case.spec()
    model = LanguageModel(spec, one)
    materialise(model, one, 0, torch.float64)
    logical = tensor_map("gpt2", spec).to_logical(case.hf.state_dict())
    fill_from_logical(model, one, logical)
    for _, _, items in logical_pieces(model, one):
        for piece in items:
            assert torch.equal(piece.local, logical[piece.name].double()), piece.name
