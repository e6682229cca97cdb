"""Masked language modelling with BERT's corruption. (Devlin et al., 2019.)

Each ordinary token, or with ``whole_word`` each word, is chosen with probability ``mask_prob``; of the chosen tokens,
``mask_share`` become the mask token, ``random_share`` a random ordinary token, and the rest stay. Only chosen positions
go through the vocabulary head. A row is masked anew in every epoch (RoBERTa; Liu et al., 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from megalm.api import (
    IGNORE,
    Batch,
    Corpus,
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

from .windows import TextWindows

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
    perplexities = ("mlm",)
    version = 2
    name: ClassVar[str] = "mlm"

    def __init__(self, cfg: MaskedLMConfig, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        self._windows = TextWindows(self.name, env)
        self._masking = TokenMasking(
            self._windows.mask,
            self._windows.ordinary,
            cfg.mask_prob,
            cfg.mask_share,
            cfg.random_share,
            env.tokenizer.word_starts() if cfg.whole_word else None,
        )

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(to="last")}
        if self.env.packing:
            tensors["documents"] = TensorSpec(to="all")
        return Needs("bidirectional", tensors)

    def weights(self) -> Mapping[str, float]:
        return {"mlm": self.cfg.weight}

    def check_corpus(self, corpus: Corpus) -> None:
        self._windows.check(corpus)

    def num_samples(self, corpus: Corpus) -> int:
        return packed_rows(corpus, self._windows.size) if self.env.packing else self._windows.count(corpus)

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        if self.env.packing:
            return self._packed(sample, corpus, rng)
        return self.extend_example(self._windows.row(sample, corpus), rng)

    def _packed(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        pieces = packed_row(corpus, sample, self._windows.size, self.env.packing)
        tokens = np.concatenate([corpus.stream(piece.start, piece.stop) for piece in pieces])
        documents = np.repeat(np.arange(len(pieces)), [piece.stop - piece.start for piece in pieces])
        example = {"tokens": tokens, "special": self._windows.special[tokens], "documents": documents}
        return self.extend_example(example, rng)

    def extend_example(self, example: Example, rng: np.random.Generator) -> Example:
        documents = example.get("documents")
        tokens, labels = self._masking(example["tokens"], example["special"], rng, documents)
        return {**example, "tokens": tokens, "labels": labels}

    def rates(self) -> Mapping[str, float]:
        # A random token is now and then the one that was there, which no reader of the row can tell from a kept one.
        other = self.cfg.random_share * (1 - 1 / len(self._windows.ordinary))
        return {"mask_prob": self.cfg.mask_prob, "mask_share": self.cfg.mask_share, "random_share": other}

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        tokens, labels = example["tokens"], example["labels"]
        chosen = labels != IGNORE
        original = tokens.copy()
        original[chosen] = labels[chosen]
        places, words = self._masking.words(original, example["special"], example.get("documents"))
        first = places[np.flatnonzero(np.diff(words, prepend=-1))]
        masked = chosen & (tokens == self._windows.mask)
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
