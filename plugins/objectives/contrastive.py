"""Contrastive learning of text vectors. (Gao et al., "SimCSE", 2021.)

Each text is to find its positive among those of all texts of the cell, whose vectors come from every data-parallel
rank, with gradients back to it. A positive is the same text under other dropout (SimCSE without labels), or what goes
with it: in a corpus of pairs each document is one, its first sentence the text and the rest its positive.

The vector is the mean over the tokens or that of the first, by default through a dense layer with tanh, which serves
training alone: what uses the vectors later leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from megalm.api import (
    Batch,
    BuildContext,
    ConfigError,
    Corpus,
    DataError,
    Example,
    LossContext,
    Needs,
    Objective,
    ObjectiveEnv,
    Settings,
    TensorSpec,
    Term,
)

if TYPE_CHECKING:
    import torch

VIEWS = 2


class ContrastiveConfig(Settings):
    """Settings of ``[objective.contrastive]``."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    positives: Literal["dropout", "document"] = "dropout"
    """``dropout``: each sentence twice, told apart by the dropout of model.dropout, which must not be 0. ``document``:
    the first sentence of each document and the rest of it; a document of one sentence, twice."""
    pooling: Literal["cls", "mean"] = "mean"
    """The vector of a text: its first token's, or the mean over all its tokens. The first token of a backbone that was
    not pretrained says so little of the text that training may never tell texts apart."""
    projection: bool = True
    """A dense layer with tanh stands between that and the loss."""
    temperature: float = Field(default=0.05, gt=0)
    """What cosines are divided by."""
    symmetric: bool = False
    """Positives are to find their texts too; the loss is the mean of both directions."""


class Contrastive(Objective):
    """Two rows, views of each sample: a text and its positive."""

    Config = ContrastiveConfig
    cfg: ContrastiveConfig

    def __init__(self, cfg: ContrastiveConfig, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        special = env.tokenizer.special
        if cfg.pooling == "cls" and special.cls is None:
            raise ConfigError(
                ['objective.contrastive.pooling = "cls" reads the cls token, but the tokenizer has none; use "mean"']
            )
        self._prefix, self._suffix = (
            np.array([] if mark is None else [mark], dtype=np.int64) for mark in (special.cls, special.sep)
        )
        self._pad = 0 if special.pad is None else special.pad
        self._room = env.sequence_length - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise ConfigError([f"train.sequence_length = {env.sequence_length} leaves contrastive no room for text"])

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "attention_mask": TensorSpec(dtype="bool", to="all")}
        modules = {"contrastive": _projection} if self.cfg.projection else {}
        return Needs("bidirectional", tensors, lm_head=False, coupling="cell", modules=modules)

    def weights(self) -> Mapping[str, float]:
        return {"contrastive": self.cfg.weight}

    def check_corpus(self, corpus: Corpus) -> None:
        if self.num_samples(corpus) < 2:
            raise DataError(f"contrastive compares texts, but the corpus has {self.num_samples(corpus)}")

    def num_samples(self, corpus: Corpus) -> int:
        return corpus.num_documents if self.cfg.positives == "document" else corpus.num_sentences

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        if self.cfg.positives == "dropout":
            texts = [corpus.sentence(sample)] * VIEWS
        else:
            low, high = corpus.document_sentences(sample)
            first = corpus.sentence(low)
            texts = [first, first if high - low == 1 else (first[1], corpus.sentence(high - 1)[1])]
        tokens = np.full((VIEWS, self.env.sequence_length), self._pad)
        lengths = []
        for row, (start, stop) in zip(tokens, texts, strict=True):
            text = corpus.stream(start, min(stop, start + self._room))
            whole = np.concatenate((self._prefix, text, self._suffix))
            row[: len(whole)] = whole
            lengths.append(max(1, len(whole)))
        present = np.arange(self.env.sequence_length) < np.array(lengths)[:, None]
        return {"tokens": tokens, "attention_mask": present}

    def collate(self, examples: list[Example]) -> Batch:
        return {name: np.concatenate([example[name] for example in examples]) for name in self.needs().tensors}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"contrastive": len(batch["tokens"]) // VIEWS}

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        import torch
        import torch.nn.functional as F

        pooled = ctx.pick(hidden, 0) if self.cfg.pooling == "cls" else ctx.pool(hidden, batch["attention_mask"])
        if self.cfg.projection:
            pooled = torch.tanh(ctx.module("contrastive")(pooled))
        vectors = F.normalize(ctx.widen(pooled), dim=-1)
        texts, positives = (vectors[view::VIEWS].contiguous() for view in range(VIEWS))
        total = self._find(texts, positives, ctx)
        if self.cfg.symmetric:
            total = (total + self._find(positives, texts, ctx)) / 2
        return {"contrastive": Term(total, scope="example")}

    def _find(self, queries: torch.Tensor, keys: torch.Tensor, ctx: LossContext) -> torch.Tensor:
        """The sum over queries that are each to find the key of the same place among those of the cell."""
        import torch

        everyone, first = ctx.gather(keys)
        targets = first + torch.arange(len(queries), device=queries.device)
        return ctx.contrastive_loss(queries, everyone, targets, self.cfg.temperature).sum()


def _projection(hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
    return ctx.linear(hidden_size, hidden_size)
