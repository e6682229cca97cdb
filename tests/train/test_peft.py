"""The same model, weights and low-rank products through peft: losses, gradients and merged weights are equal."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from megalm.config.schema import FinetuneConfig, ModelConfig
from megalm.model.hf.config import model_settings
from megalm.model.hf.names import tensor_map
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.model.tuning import Tuning
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import fill_from_logical, materialise
from megalm.optim.weights import Weights
from megalm.parallel.mesh import single_rank
from megalm.testing.parity import whole_gradients
from megalm.train.merge import merge_tensors

RANK, ALPHA, VOCAB, LENGTH = 3, 7.0, 61, 12
OURS = {"q": "q_proj", "v": "v_proj", "out": "o_proj", "gate": "gate_proj", "down": "down_proj"}


def own_name(name: str) -> str | None:
    """Megalm's name of one of peft's matrices."""
    found = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.default\.weight", name)
    if found is None:
        return None
    layer, projection, matrix = found.groups()
    ours = next(own for own, theirs in OURS.items() if theirs == projection)
    block = "attention" if ours in ("q", "v", "out") else "mlp"
    return f"backbone.layers.{layer}.{block}.{ours}.lora_{matrix.lower()}"


def test_it_is_what_peft_computes() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    plain = transformers.LlamaForCausalLM(config).double()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            plain, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(OURS.values()), lora_dropout=0.0)
        ).double()
    products = {own_name(name): p for name, p in theirs.named_parameters() if own_name(name)}
    for parameter in products.values():
        torch.nn.init.normal_(parameter, std=0.3)

    cfg = ModelConfig(**model_settings(config.to_dict()))
    tuning = Tuning.of(FinetuneConfig(method="lora", lora_rank=RANK, lora_alpha=ALPHA, lora_targets=list(OURS)))
    spec = ModelSpec(cfg, VOCAB, 2, 4, 40, 32, 0, True, True, (), tuning=tuning)
    one, names = single_rank(), tensor_map("llama", spec)
    model = LanguageModel(spec, one)
    materialise(model, one, 0, torch.float64)
    tensors = names.to_logical(base) | {str(name): p.detach() for name, p in products.items()}
    fill_from_logical(model, one, tensors)

    tokens = torch.randint(VOCAB, (3, LENGTH))
    labels = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]
    batch = make_microbatch({"tokens": tokens}, one)
    loss = model.context(batch).lm_loss(model(batch), labels).sum() / (labels != -100).sum()
    loss.backward()
    logits = theirs(input_ids=tokens).logits  # transformers computes losses in float32
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # theirs has norms and angles in float32
    found = whole_gradients(Weights(model, one, torch.float64))
    assert found.keys() == products.keys()
    for name, parameter in products.items():
        torch.testing.assert_close(found[str(name)], parameter.grad, rtol=1e-4, atol=1e-7)
    merged = names.to_logical(theirs.merge_and_unload().state_dict())
    assert tuning.lora is not None
    ours = merge_tensors({name: tensor.detach() for name, tensor in tensors.items()}, tuning.lora.scale)
    assert merged.keys() == ours.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-14)
