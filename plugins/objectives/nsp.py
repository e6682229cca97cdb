"""Next-sentence prediction. (Devlin et al., 2019.)

A row is [CLS] A [SEP] B [SEP]. A is a run of sentences; B either continues it (label 0) or comes from another document
(label 1). Pairs need no stored mapping: a sample is a place in the token stream, found again by binary search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megalm.api import (
    Batch,
    ConfigError,
    Corpus,
    DataError,
    Example,
    HeadSpec,
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

FOLLOWS, RANDOM = 0, 1


class NextSentenceConfig(Settings):
    """Settings of ``[objective.nsp]``."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    random_prob: float = Field(default=0.5, gt=0, lt=1)
    """Probability that B comes from another document."""


class NextSentence(Objective):
    """Builds sentence pairs; in a joint objective others corrupt or score them further."""

    Config = NextSentenceConfig
    cfg: NextSentenceConfig

    def __init__(self, cfg: NextSentenceConfig, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        special = env.tokenizer.special
        if special.cls is None or special.sep is None or special.pad is None:
            raise ConfigError(["train.objective: nsp needs a tokenizer with cls, sep and pad tokens"])
        self._cls, self._sep, self._pad = special.cls, special.sep, special.pad
        self._special = np.isin(np.arange(env.tokenizer.vocab_size), special.ids())
        self._budget = env.sequence_length - 3
        if self._budget < 2:
            raise ConfigError([f"train.sequence_length = {env.sequence_length} leaves nsp no room for two passages"])

    def needs(self) -> Needs:
        tensors = {
            "tokens": TensorSpec(),
            "token_types": TensorSpec(),
            "attention_mask": TensorSpec(dtype="bool", to="all"),
            "next_label": TensorSpec(("batch",), to="last"),
        }
        head = HeadSpec("nsp", outputs=2, pooled=True)
        return Needs("bidirectional", tensors, lm_head=False, heads=(head,), token_types=2, coupling="example")

    def weights(self) -> Mapping[str, float]:
        return {"nsp": self.cfg.weight}

    def check_corpus(self, corpus: Corpus) -> None:
        if corpus.num_documents < 2:
            raise DataError(f"nsp draws B from another document, but the corpus has {corpus.num_documents}")

    def num_samples(self, corpus: Corpus) -> int:
        return -(-corpus.num_tokens // self._budget)

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        position = sample * self._budget
        document = corpus.document_at(position)
        bounds = self._sentences(corpus, document, corpus.sentence_at(position), self._budget)
        text = corpus.stream(bounds[0], bounds[-1])
        inner = [stop - bounds[0] for stop in bounds[1:-1]] or list(range(1, len(text)))
        label = RANDOM if rng.random() < self.cfg.random_prob or not inner else FOLLOWS
        cut = inner[rng.integers(len(inner))] if inner else len(text)
        first, second = text[:cut], text[cut:]
        if label == RANDOM:
            other = int(rng.integers(corpus.num_documents - 1))
            other += other >= document
            low, high = corpus.document_sentences(other)
            start, *_, stop = self._sentences(corpus, other, int(rng.integers(low, high)), self._budget)
            second = corpus.stream(start, stop)
        # Trim at the outer ends, so that the passages still meet where they met.
        keep = min(len(first), max(self._budget - len(second), self._budget // 2))
        first, second = first[len(first) - keep :], second[: self._budget - keep]
        return {**self._row(first, second, label), "drawn": bool(inner)}

    def rates(self) -> Mapping[str, float]:
        return {"random_prob": self.cfg.random_prob}

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        return {"random_prob": (int(example["next_label"] == RANDOM), int(example["drawn"]))}

    def _sentences(self, corpus: Corpus, document: int, sentence: int, budget: int) -> list[int]:
        """Starts of consecutive sentences of a document, and the last one's end, until they hold ``budget`` tokens."""
        _, last = corpus.document_sentences(document)
        start, stop = corpus.sentence(sentence)
        bounds = [start, stop]
        while bounds[-1] - start < budget and sentence + 1 < last:
            sentence += 1
            bounds.append(corpus.sentence(sentence)[1])
        return bounds

    def _row(self, first: np.ndarray, second: np.ndarray, label: int) -> Example:
        length = self.env.sequence_length
        text = np.concatenate(([self._cls], first, [self._sep], second, [self._sep]))
        tokens = np.full(length, self._pad, dtype=np.int64)
        tokens[: len(text)] = text
        types = np.zeros(length, dtype=np.int64)
        types[len(first) + 2 : len(text)] = 1
        present = np.arange(length) < len(text)
        return {
            "tokens": tokens,
            "token_types": types,
            "attention_mask": present,
            "next_label": label,
            "special": ~present | self._special[tokens],
        }

    def collate(self, examples: list[Example]) -> Batch:
        names = ("tokens", "token_types", "attention_mask", "next_label")
        return {name: np.stack([example[name] for example in examples]) for name in names}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"nsp": len(batch["next_label"])}

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        import torch.nn.functional as F

        logits = ctx.head("nsp", ctx.pick(hidden, 0))
        return {"nsp": Term(F.cross_entropy(logits, batch["next_label"], reduction="sum"), scope="example")}
