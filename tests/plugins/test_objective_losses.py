"""Losses of first-party objectives against transformers' backbones with the same weights, and numpy after them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.model.hf.names import tensor_map
from megalm.model.language_model import LanguageModel, logical_shapes
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import fill_from_logical, materialise
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared

transformers = pytest.importorskip("transformers")
ROWS = 6

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("losses"), manager=manager)


class Twins:
    """A run's model, and transformers' with the same weights; tensors of ours that it lacks are in ``own``."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, spec = prepared, prepared.spec
        self.hf = _gpt2(spec) if spec.causal else _bert(spec)
        for parameter in self.hf.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        shared = tensor_map("gpt2" if spec.causal else "bert", spec).to_logical(self.hf.state_dict())
        lacking = {name: shape for name, shape in logical_shapes(spec).items() if name not in shared}
        own = {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in lacking.items()}
        self.model = LanguageModel(spec, single_rank())
        materialise(self.model, single_rank(), 0, torch.float64)
        fill_from_logical(self.model, single_rank(), shared | own)
        self.own = {name: tensor.numpy() for name, tensor in own.items()}
        examples = [prepared.objective.build(n, prepared.train, (7, "train", 0)) for n in range(ROWS)]
        self.batch = prepared.objective.collate(examples)

    def _terms(self) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in self.batch.items()}
        batch = make_microbatch(tensors, single_rank())
        found = self.prepared.objective.loss(self.model(batch), tensors, self.model.context(batch))
        return {name: term.sum for name, term in found.items()}

    @torch.no_grad()
    def terms(self) -> dict[str, float]:
        """What the objective makes of the batch."""
        return {name: total.item() for name, total in self._terms().items()}

    def gradient(self) -> torch.Tensor:
        """Of the terms' sum by the token embeddings."""
        embedding = self.model.token_embedding
        assert embedding is not None
        (found,) = torch.autograd.grad(sum(self._terms().values(), torch.zeros(())), [embedding.weight])
        return found

    @torch.no_grad()
    def hidden(self) -> np.ndarray:
        """transformers' last hidden vectors of a BERT."""
        given = {"attention_mask": "attention_mask", "token_type_ids": "token_types"}
        more = {name: torch.from_numpy(self.batch[own]).long() for name, own in given.items() if own in self.batch}
        found: np.ndarray = self.hf.bert(torch.from_numpy(self.batch["tokens"]), **more).last_hidden_state.numpy()
        return found

    @torch.no_grad()
    def vocabulary_losses(self, hidden: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Of vectors (n, H) through transformers' masked-language-modelling head."""
        return losses(self.hf.cls.predictions(torch.from_numpy(hidden)).numpy(), labels)


def _bert(spec: ModelSpec) -> Any:
    config = transformers.BertConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.cfg.hidden_size,
        num_hidden_layers=spec.cfg.layers,
        num_attention_heads=spec.cfg.heads,
        intermediate_size=spec.ffn_size,
        max_position_embeddings=spec.max_positions,
        type_vocab_size=spec.token_types,
        layer_norm_eps=spec.cfg.norm_eps,
        attn_implementation="sdpa",
    )
    return transformers.BertForPreTraining(config).double().eval()


def _gpt2(spec: ModelSpec) -> Any:
    config = transformers.GPT2Config(
        vocab_size=spec.vocab_size,
        n_embd=spec.cfg.hidden_size,
        n_layer=spec.cfg.layers,
        n_head=spec.cfg.heads,
        n_inner=spec.ffn_size,
        n_positions=spec.max_positions,
        layer_norm_epsilon=spec.cfg.norm_eps,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy (n,) of logits (n, classes)."""
    top = logits.max(axis=-1, keepdims=True)
    whole = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
    found: np.ndarray = whole - logits[np.arange(len(labels)), labels]
    return found


@pytest.fixture
def twins(tmp_path: Path, store: Path, manager: PluginManager) -> Callable[..., Twins]:
    def make(objective: str, *overrides: str, architecture: str = "bert") -> Twins:
        torch.manual_seed(0)
        run = make_run(
            tmp_path,
            store,
            objective=objective,
            architecture=architecture,
            overrides=["train.sequence_length=40", *overrides],
            manager=manager,
        )
        return Twins(run)

    return make


def test_order(twins: Callable[..., Twins]) -> None:
    pair = twins("sop")
    first = torch.from_numpy(pair.hidden()[:, 0])
    pooled = torch.tanh(pair.hf.bert.pooler.dense(first)).detach().numpy()
    logits = pooled @ pair.own["classifiers.heads.sop.weight"].T + pair.own["classifiers.heads.sop.bias"]
    assert pair.terms()["sop"] == pytest.approx(losses(logits, pair.batch["order_label"]).sum(), rel=1e-9)


def gelu(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return found


def test_spans_and_boundaries(twins: Callable[..., Twins]) -> None:
    pair = twins("span_mlm", "objective.span_mlm.mask_prob=0.3", "objective.span_mlm.place_size=7")
    found, hidden, batch = pair.terms(), pair.hidden(), pair.batch
    scored = batch["labels"] != IGNORE
    expected = pair.vocabulary_losses(hidden[scored], batch["labels"][scored]).sum()
    assert found["span_mlm"] == pytest.approx(expected, rel=1e-9)
    # From the rows alone: a maximal run of scored positions is a span.
    own = {name.removeprefix("plugins.span_boundary."): array for name, array in pair.own.items()}
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        for at in np.flatnonzero(labels != IGNORE):
            start = stop = at
            while labels[start - 1] != IGNORE:
                start -= 1
            while labels[stop] != IGNORE:
                stop += 1
            if (place := at - start) >= 20:
                continue
            x = np.concatenate((hidden[row, start - 1], hidden[row, stop], own["places"][place]))
            for layer in ("inner", "outer"):
                x = gelu(own[f"{layer}.weight"] @ x + own[f"{layer}.bias"])
                x = (x - x.mean()) / np.sqrt(x.var() + pair.prepared.spec.cfg.norm_eps)
                x = x * own[f"{layer}_norm.weight"] + own[f"{layer}_norm.bias"]
            head = pair.hf.cls.predictions
            matrix, bias = (p.detach().numpy() for p in (head.decoder.weight, head.bias))
            total += losses((matrix @ x + bias)[None], labels[at : at + 1])[0]
            count += 1
    assert count == pair.prepared.objective.counts(batch)["span_boundary"] > 20
    assert found["span_boundary"] == pytest.approx(total, rel=1e-9)


@torch.no_grad()
def test_denoising(twins: Callable[..., Twins]) -> None:
    pair = twins("denoise", architecture="gpt2")
    tokens, labels, prefix = (pair.batch[name] for name in ("tokens", "labels", "prefix"))
    length = tokens.shape[1]
    seen = np.zeros((ROWS, 1, length, length), dtype=bool)
    for row in range(ROWS):
        for query in range(length):
            for key in range(length):
                seen[row, 0, query, key] = key <= query or key < prefix[row]
    assert len(set(prefix.tolist())) > 1
    logits = pair.hf(torch.from_numpy(tokens), attention_mask=torch.from_numpy(seen)).logits.numpy()
    scored = labels != IGNORE
    expected = losses(logits[scored], labels[scored]).sum()
    assert pair.terms()["denoise"] == pytest.approx(expected, rel=1e-9)
    causal = pair.hf(torch.from_numpy(tokens)).logits.numpy()
    assert abs(losses(causal[scored], labels[scored]).sum() / expected - 1) > 1e-5, "the prefix matters"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_contrast(twins: Callable[..., Twins], pooling: str, symmetric: str) -> None:
    """The gradient too: that of positives is easily lost, under every layout alike."""
    settings = ['positives="document"', f'pooling="{pooling}"', f"symmetric={symmetric}", "temperature=0.3"]
    rows = ["train.cell=8", "train.micro_batch=8"]
    pair = twins("contrastive", *rows, *(f"objective.contrastive.{each}" for each in settings))
    tokens, mask = (torch.from_numpy(pair.batch[name]) for name in ("tokens", "attention_mask"))
    hidden = pair.hf.bert(tokens, attention_mask=mask.long()).last_hidden_state
    texts = [h[0] if pooling == "cls" else h[m].mean(0) for h, m in zip(hidden, mask, strict=True)]
    weight, bias = (torch.from_numpy(pair.own[f"plugins.contrastive.{leaf}"]) for leaf in ("weight", "bias"))
    vectors = [torch.tanh(weight @ text + bias) for text in texts]
    vectors = [vector / vector.dot(vector).sqrt() for vector in vectors]
    expected = torch.zeros((), dtype=torch.float64)
    for n in range(ROWS):
        scores = torch.stack([vectors[2 * n].dot(vectors[2 * m + 1]) / 0.3 for m in range(ROWS)])
        back = torch.stack([vectors[2 * n + 1].dot(vectors[2 * m]) / 0.3 for m in range(ROWS)])
        each = [-scores.softmax(0)[n].log(), -back.softmax(0)[n].log()]
        expected = expected + (sum(each) / 2 if symmetric == "true" else each[0])
    assert pair.terms()["contrastive"] == pytest.approx(expected.item(), rel=1e-9)
    expected.backward()
    found, truth = pair.gradient(), pair.hf.bert.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9 * truth.abs().max().item())
