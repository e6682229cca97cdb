"""Masked language modelling with BERT's corruption. (Devlin et al., 2019.)

Each ordinary token, or with ``whole_word`` each word, is chosen with probability ``mask_prob``; of the chosen tokens,
``mask_share`` become the mask token, ``random_share`` a random ordinary token, and the rest stay. Only chosen positions
go through the vocabulary head. A row is masked anew in every epoch (RoBERTa; Liu et al., 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from megalm.api import (
    IGNORE,
    Batch,
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
    TokenMasking,
    packed_row,
    packed_rows,
)

if TYPE_CHECKING:
    import torch


class MaskedLMConfig(Settings):
    """Settings of ``[objective.mlm]``."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    mask_prob: float = Field(default=0.15, gt=0, lt=1)
    """Probability that an ordinary token is to be predicted."""
    whole_word: bool = False
    """All tokens of a word are chosen together, each word with ``mask_prob``."""
    mask_share: float = Field(default=0.8, ge=0, le=1)
    """Of those, the share replaced by the mask token."""
    random_share: float = Field(default=0.1, ge=0, le=1)
    """Of those, the share replaced by a random token."""

    @model_validator(mode="after")
    def _shares(self) -> MaskedLMConfig:
        if self.mask_share + self.random_share > 1:
            raise ValueError("mask_share + random_share must not exceed 1")
        return self


class MaskedLM(Objective):
    """Alone, samples are windows of the stream, between the cls and sep tokens where there are such.

    With packing they are rows of documents, without cls and sep, which would have to be in each of them.
    """

    packs = True
    Config = MaskedLMConfig
    cfg: MaskedLMConfig
    version = 2

    def __init__(self, cfg: MaskedLMConfig, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        special = env.tokenizer.special
        if special.mask is None:
            raise ConfigError(["train.objective: mlm needs a tokenizer with a mask token, and this one has none"])
        self._mask: int = special.mask
        self._prefix, self._suffix = (
            np.array([] if mark is None or env.packing else [mark], dtype=np.int64)
            for mark in (special.cls, special.sep)
        )
        self._special = np.isin(np.arange(env.tokenizer.vocab_size), special.ids())
        self._ordinary = np.flatnonzero(~self._special)
        self._masking = TokenMasking(
            special.mask,
            self._ordinary,
            cfg.mask_prob,
            cfg.mask_share,
            cfg.random_share,
            env.tokenizer.word_starts() if cfg.whole_word else None,
        )
        self._window = env.sequence_length - len(self._prefix) - len(self._suffix)
        if self._window < 1:
            raise ConfigError([f"train.sequence_length = {env.sequence_length} leaves mlm no room for text"])

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(to="last")}
        if self.env.packing:
            tensors["documents"] = TensorSpec(to="all")
        return Needs("bidirectional", tensors)

    def weights(self) -> Mapping[str, float]:
        return {"mlm": self.cfg.weight}

    def check_corpus(self, corpus: Corpus) -> None:
        if self.num_samples(corpus) < 1:
            raise DataError(f"mlm needs at least {self._window} tokens, but the corpus has {corpus.num_tokens}")

    def num_samples(self, corpus: Corpus) -> int:
        return packed_rows(corpus, self._window) if self.env.packing else corpus.num_tokens // self._window

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        if self.env.packing:
            return self._packed(sample, corpus, rng)
        text = corpus.stream(sample * self._window, (sample + 1) * self._window)
        tokens = np.concatenate((self._prefix, text, self._suffix))
        return self.extend_example({"tokens": tokens, "special": self._special[tokens]}, rng)

    def _packed(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        pieces = packed_row(corpus, sample, self._window, self.env.packing)
        tokens = np.concatenate([corpus.stream(piece.start, piece.stop) for piece in pieces])
        documents = np.repeat(np.arange(len(pieces)), [piece.stop - piece.start for piece in pieces])
        example = {"tokens": tokens, "special": self._special[tokens], "documents": documents}
        return self.extend_example(example, rng)

    def extend_example(self, example: Example, rng: np.random.Generator) -> Example:
        documents = example.get("documents")
        tokens, labels = self._masking(example["tokens"], example["special"], rng, documents)
        return {**example, "tokens": tokens, "labels": labels}

    def rates(self) -> Mapping[str, float]:
        # A random token is now and then the one that was there, which no reader of the row can tell from a kept one.
        other = self.cfg.random_share * (1 - 1 / len(self._ordinary))
        return {"mask_prob": self.cfg.mask_prob, "mask_share": self.cfg.mask_share, "random_share": other}

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        tokens, labels = example["tokens"], example["labels"]
        chosen = labels != IGNORE
        original = tokens.copy()
        original[chosen] = labels[chosen]
        places, words = self._masking.words(original, example["special"], example.get("documents"))
        first = places[np.flatnonzero(np.diff(words, prepend=-1))]
        masked = chosen & (tokens == self._mask)
        random = chosen & ~masked & (tokens != labels)
        trials = int(chosen.sum())
        return {
            "mask_prob": (int(chosen[first].sum()), len(first)),
            "mask_share": (int(masked.sum()), trials),
            "random_share": (int(random.sum()), trials),
        }

    def collate(self, examples: list[Example]) -> Batch:
        return {name: np.stack([example[name] for example in examples]) for name in self.needs().tensors}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"mlm": int((batch["labels"] != IGNORE).sum())}

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        scored = batch["labels"] != IGNORE
        return {"mlm": Term(ctx.lm_loss(hidden, batch["labels"], where=scored).sum())}
