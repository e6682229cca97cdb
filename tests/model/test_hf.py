"""The backbone computes what transformers' models compute: logits, loss and every gradient, on one rank and several."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megalm.model.spec import ModelSpec
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.testing.parity import assert_parity
from megalm.testing.processes import run_processes

from .hf_case import Case, Tensors, hf_results, make_case, megalm_results, split

GPT2 = {
    "vocab_size": 37,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {
    "vocab_size": 43,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    # transformers gives the embedding of its padding token no gradient; random tokens would meet it.
    "pad_token_id": None,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 33, "activation_function": "gelu"}),
    "llama": ("llama", LLAMA),
    "llama-tied-biases": ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (
        "llama",
        {**LLAMA, "head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", LLAMA),
    "llama-linear": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 90.0, "factor": 3.0}}),
    "llama3": ("llama", {**LLAMA, "head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {**LLAMA, "head_dim": 6, "attention_bias": True, "num_key_value_heads": 1}),
    "roberta": ("roberta", ROBERTA),
    "roberta-untied": ("roberta", {**ROBERTA, "tie_word_embeddings": False, "pad_token_id": 4}),
    "bert": ("bert", BERT),
    "bert-untied": ("bert", {**BERT, "tie_word_embeddings": False, "hidden_act": "gelu_new", "type_vocab_size": 3}),
}


def drawn(seed: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Families and sizes that nobody chose."""
    draw = random.Random(seed)
    for _ in range(count):
        family = draw.choice(["gpt2", "llama", "mistral", "qwen3", "bert", "roberta"])
        kv, layers, vocab = draw.randint(1, 3), draw.randint(1, 3), draw.randint(7, 70)
        heads, inner = kv * draw.randint(1, 3), draw.randint(5, 60)
        heads = max(heads, 2)
        kv = kv if heads % kv == 0 else 1
        width, tied = 2 * heads * draw.randint(1, 5), draw.random() < 0.5
        if family == "gpt2":
            sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": inner, "tie_word_embeddings": tied}
            yield family, {**GPT2, **sizes, "vocab_size": vocab}
            continue
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
        sizes |= {"intermediate_size": inner, "tie_word_embeddings": tied}
        if family in ("bert", "roberta"):
            yield family, {**(BERT if family == "bert" else ROBERTA), **sizes}
        else:
            sizes |= {"num_key_value_heads": kv, "head_dim": width // heads}
            yield family, {**LLAMA, **sizes, "sliding_window": None}


def compare(found: Tensors, expected: Tensors, *, atol: float, rtol: float, label: str) -> None:
    (outputs, gradients), (expected_outputs, expected_gradients) = split(found), split(expected)
    assert outputs.keys() == expected_outputs.keys()
    for name, output in outputs.items():
        error = (output - expected_outputs[name]).abs().max().item()
        assert error <= atol, f"{label}: {name} differ by {error:.3e}"
    assert_parity(gradients, expected_gradients, rtol=rtol, label=label)


@pytest.mark.parametrize("name", NAMED)
def test_float64_equals_transformers(name: str) -> None:
    family, settings = NAMED[name]
    case = make_case(family, 1, **settings)
    compare(megalm_results(case, single_rank()), hf_results(case), atol=1e-10, rtol=1e-9, label=name)


@pytest.mark.parametrize("name", NAMED)
def test_float32_equals_transformers(name: str) -> None:
    family, settings = NAMED[name]
    case = make_case(family, 2, torch.float32, **settings)
    compare(megalm_results(case, single_rank()), hf_results(case), atol=1e-5, rtol=1e-4, label=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_loss_is_the_one_that_transformers_returns(name: str) -> None:
    """With its own labels argument, which shifts inside the model."""
    family, settings = NAMED[name]
    case = make_case(family, 3, torch.float32, **settings)
    b = case.batch
    if case.pretraining:
        given = {"attention_mask": b["attention_mask"].long(), "token_type_ids": b["token_types"]}
        own = case.hf(b["tokens"], **given, labels=b["labels"], next_sentence_label=b["next_label"]).loss
    else:
        shifted = torch.cat((b["tokens"][:, :1], b["labels"][:, :-1]), dim=1)
        own = case.hf(b["tokens"], labels=shifted).loss
    torch.testing.assert_close(megalm_results(case, single_rank())["loss"], own.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biases", "mistral", "qwen3", "qwen3-biases", "roberta", "bert"])
def test_two_ranks_with_sequence_parallelism_equal_transformers(name: str) -> None:
    family, settings = NAMED[name]
    case = make_case(family, 4, **settings)
    expected = hf_results(case)

    def rank(parallel: ParallelContext) -> Tensors:
        return megalm_results(case, parallel)

    for found in run_processes(rank, tp=2, sp=True):
        compare(found, expected, atol=1e-10, rtol=1e-9, label=f"{name}, tp2+sp")


@pytest.mark.dist
def test_drawn_models_equal_transformers(campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed + 1)
    for number, (family, settings) in enumerate(drawn(campaign_seed, 40 if full else 4)):
        case = make_case(family, campaign_seed + number, **settings)
        expected, label = hf_results(case), f"{family} {settings} (seed {campaign_seed})"
        compare(megalm_results(case, single_rank()), expected, atol=1e-10, rtol=1e-9, label=label)
        tp = draw.choice([t for t in (2, 3) if t <= case.spec().cfg.heads])
        found = run_processes(lambda parallel, c=case: megalm_results(c, parallel), tp=tp)[-1]
        compare(found, expected, atol=1e-10, rtol=1e-9, label=f"{label}, tp{tp}")


def test_what_a_wrong_model_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a single wrong tensor: queries and keys of one layer exchanged."""
    case = make_case("gpt2", 5, **GPT2)
    expected = hf_results(case)
    with torch.no_grad():
        weight = case.hf.transformer.h[1].attn.c_attn.weight
        weight.copy_(torch.cat((weight[:, 24:48], weight[:, :24], weight[:, 48:]), dim=1))
    with pytest.raises(AssertionError, match="logits differ"):
        compare(megalm_results(case, single_rank()), expected, atol=1e-5, rtol=1e-4, label="exchanged")


def test_spec_counts_what_transformers_counts() -> None:
    for name, (family, settings) in NAMED.items():
        case: Case = make_case(family, 6, **settings)
        spec: ModelSpec = case.spec()
        # transformers' second bias, which nothing reads
        dead = settings["vocab_size"] if name in ("bert-untied", "roberta-untied") else 0
        assert spec.parameter_count() == sum(p.numel() for p in case.hf.parameters()) - dead, name
