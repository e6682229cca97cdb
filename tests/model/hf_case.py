"""Random tiny models of transformers, and the same weights in megalm.

transformers is the independent truth. Where it rounds to float32 inside a float64 model (rotary angles, RMSNorm's mean,
the eager attention's softmax, the cross-entropy of its own losses), the float64 comparison puts plain float64 formulas
or torch's SDPA in those places; float32 runs it as is, with its eager attention.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megalm.config.schema import ModelConfig
from megalm.model.hf.config import model_settings
from megalm.model.hf.names import tensor_map
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import fill_from_logical, materialise
from megalm.optim.gradients import finish_gradients
from megalm.optim.weights import Weights
from megalm.parallel.mesh import ParallelContext
from megalm.plugin.contract.objective import IGNORE, HeadSpec
from megalm.testing.parity import LOSS, whole_gradients

Tensors = dict[str, torch.Tensor]
CAUSAL = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
ENCODERS = {
    "bert": ("BertConfig", "BertForPreTraining"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM"),
}


@dataclass
class Case:
    """A Hugging Face model, a batch for it, and what megalm needs to build the same."""

    hf: Any
    batch: Tensors

    @property
    def family(self) -> str:
        return str(self.hf.config.model_type)

    @property
    def encoder(self) -> bool:
        """Masked tokens, and for BERT the next sentence; otherwise next-token prediction."""
        return self.family in ENCODERS

    @property
    def pretraining(self) -> bool:
        """BERT with both of its objectives."""
        return self.family == "bert"

    def spec(self) -> ModelSpec:
        """What resolve_model would make of the mapped settings."""
        c = ModelConfig(**model_settings(self.hf.config.to_dict()))
        assert c.vocab_size is not None
        return ModelSpec(
            cfg=c,
            vocab_size=c.vocab_size,
            kv_heads=c.kv_heads or c.heads,
            head_dim=c.head_dim or c.hidden_size // c.heads,
            ffn_size=c.ffn_size or 4 * c.hidden_size,
            max_positions=c.max_positions or 1,
            token_types=c.token_types,
            causal=not self.encoder,
            lm_head=True,
            heads=(HeadSpec("nsp", 2, pooled=True),) if self.pretraining else (),
        )


def make_case(family: str, seed: int, dtype: torch.dtype = torch.float64, **settings: Any) -> Case:
    """A model of transformers with random weights, biases and norms too, and a batch with uneven rows."""
    import transformers

    torch.manual_seed(seed)
    names = (CAUSAL | ENCODERS)[family]
    kernel = "sdpa" if dtype == torch.float64 else "eager"
    config = getattr(transformers, names[0])(**settings, attn_implementation=kernel)
    hf = getattr(transformers, names[1])(config).eval()
    if dtype == torch.float64:
        hf.to(dtype)
        _keep_float64(hf)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            centre = 1.0 if "norm" in name.lower().rsplit(".", 2)[-2] or "ln_" in name else 0.0
            parameter.normal_(centre if name.endswith("weight") else 0.0, 0.2)
    return Case(hf, _batch(config, random.Random(seed), family in ENCODERS))


def _keep_float64(hf: Any) -> None:
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.variance_epsilon
            module.forward = lambda x, m=module, eps=eps: F.rms_norm(x, m.weight.shape, m.weight, eps)
        if type(module).__name__.endswith("RotaryEmbedding"):
            frequencies = _frequencies(2 * len(module.inv_freq), module.config.rope_parameters)

            def angles(x: torch.Tensor, position_ids: torch.Tensor, f: torch.Tensor = frequencies) -> Any:
                turns = (position_ids[..., None].double() * f).repeat(1, 1, 2)
                return turns.cos(), turns.sin()

            module.forward = angles


def _frequencies(size: int, rope: dict[str, Any]) -> torch.Tensor:
    """Rotary frequencies one by one, as the papers have them."""
    found = []
    for feature in range(0, size, 2):
        frequency = rope["rope_theta"] ** (-feature / size)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        elif rope["rope_type"] == "llama3":
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if turns < low:
                frequency /= rope["factor"]
            elif turns <= high:
                keep = (turns - low) / (high - low)
                frequency = (1 - keep) * frequency / rope["factor"] + keep * frequency
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64)


def _batch(config: Any, draw: random.Random, encoder: bool) -> Tensors:
    rows, length = draw.choice([1, 2, 3]), 2 * draw.randint(3, 9)
    tokens = torch.randint(config.vocab_size, (rows, length))
    if config.model_type == "roberta":  # whose positions count what is no padding
        tokens[tokens == config.pad_token_id] += 1
    if not encoder:
        labels = F.pad(tokens, (0, 1), value=IGNORE)[:, 1:].clone()
        labels[0, draw.randrange(length - 2)] = IGNORE
        return {"tokens": tokens, "labels": labels}
    ends = torch.tensor([draw.randint(length // 2, length) for _ in range(rows)])
    present = torch.arange(length) < ends[:, None]
    labels = torch.where((torch.rand(rows, length) < 0.3) & present, tokens, IGNORE)
    labels[0, 0] = tokens[0, 0]
    return {
        "tokens": tokens,
        "labels": labels,
        "token_types": torch.randint(config.type_vocab_size, (rows, length)),
        "attention_mask": present,
        "next_label": torch.randint(2, (rows,)),
    }


def hf_results(case: Case) -> Tensors:
    """Logits, loss, and every gradient under its logical name, as transformers computes them."""
    b, hf = case.batch, case.hf
    hf.zero_grad(set_to_none=True)
    if case.pretraining:
        out = hf(b["tokens"], attention_mask=b["attention_mask"].long(), token_type_ids=b["token_types"])
        logits, nsp = out.prediction_logits, out.seq_relationship_logits
        loss = F.cross_entropy(logits.flatten(0, 1), b["labels"].flatten(), ignore_index=IGNORE)
        loss = loss + F.cross_entropy(nsp, b["next_label"])
        results = {"logits": logits, "nsp": nsp}
    elif case.encoder:
        logits = hf(b["tokens"], attention_mask=b["attention_mask"].long(), token_type_ids=b["token_types"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), b["labels"].flatten(), ignore_index=IGNORE)
        results = {"logits": logits}
    else:
        logits = hf(b["tokens"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), b["labels"].flatten(), ignore_index=IGNORE)
        results = {"logits": logits}
    loss.backward()
    grads = {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}
    logical = tensor_map(case.family, case.spec()).to_logical(grads)
    return {LOSS: loss.detach().double(), **{k: v.detach() for k, v in results.items()}, **logical}


def megalm_results(case: Case, parallel: ParallelContext) -> Tensors:
    """The same from megalm with the same weights, under any layout."""
    spec = case.spec()
    dtype = next(case.hf.parameters()).dtype
    model = LanguageModel(spec, parallel)
    materialise(model, parallel, 0, dtype)
    fill_from_logical(model, parallel, tensor_map(case.family, spec).to_logical(case.hf.state_dict()))
    b = case.batch
    batch = make_microbatch(b, parallel)
    hidden, ctx = model(batch), model.context(batch)
    scored = b["labels"] != IGNORE
    loss = ctx.lm_loss(hidden, b["labels"], where=scored if case.encoder else None).sum() / scored.sum()
    results = {}
    if case.pretraining:
        results["nsp"] = ctx.head("nsp", ctx.pick(hidden, 0))
        loss = loss + F.cross_entropy(results["nsp"], b["next_label"])
    with torch.no_grad():
        assert model.lm_head is not None
        flat = ctx.full_sequence(hidden).flatten(0, 1)
        logits = model.lm_head.logits(flat, model.backbone.embedding.tokens)
        results["logits"] = logits.unflatten(0, (batch.rows, batch.length))
    loss.backward()
    weights = Weights(model, parallel, dtype)
    finish_gradients(weights)
    return {LOSS: loss.detach().double(), **{k: v.detach() for k, v in results.items()}, **whole_gradients(weights)}


def split(results: Tensors) -> tuple[Tensors, Tensors]:
    """Logits, and what the measure of parity compares."""
    outputs = {name: t for name, t in results.items() if name in ("logits", "nsp")}
    return outputs, {name: t for name, t in results.items() if name not in outputs}
