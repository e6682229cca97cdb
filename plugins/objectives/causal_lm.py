"""Causal language modelling: predict each token from those before it. (Radford et al., GPT-2, 2019.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megalm.api import (
    IGNORE,
    Batch,
    Corpus,
    DataError,
    Example,
    LossContext,
    Needs,
    Objective,
    Settings,
    TensorSpec,
    Term,
    packed_row,
    packed_rows,
    stream_windows,
)

if TYPE_CHECKING:
    import torch


class CausalLMConfig(Settings):
    """Settings of ``[objective.causal_lm]``."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""


class CausalLM(Objective):
    """Samples are windows of the token stream that follow each other; a label is the next token.

    With packing they are rows of documents, and a document's last token has no label.
    """

    packs = True
    Config = CausalLMConfig
    cfg: CausalLMConfig
    perplexities = ("causal_lm",)

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(to="last")}
        if self.env.packing:
            tensors["documents"] = TensorSpec(to="all")
        return Needs("causal", tensors)

    def weights(self) -> Mapping[str, float]:
        return {"causal_lm": self.cfg.weight}

    def check_corpus(self, corpus: Corpus) -> None:
        if self.num_samples(corpus) < 1:
            raise DataError(
                f"causal_lm needs more than train.sequence_length = {self.env.sequence_length} tokens, "
                f"but the corpus has {corpus.num_tokens}"
            )

    def num_samples(self, corpus: Corpus) -> int:
        length = self.env.sequence_length
        return packed_rows(corpus, length) if self.env.packing else (corpus.num_tokens - 1) // length

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        if self.env.packing:
            return self._packed(sample, corpus)
        start = sample * self.env.sequence_length
        window = corpus.stream(start, start + self.env.sequence_length + 1)
        return {"tokens": window[:-1], "labels": window[1:]}

    def build_batch(self, samples: np.ndarray, corpus: Corpus) -> Batch | None:
        if self.env.packing:
            return self.collate([self._packed(sample, corpus) for sample in samples.tolist()])
        length = self.env.sequence_length
        found = stream_windows(corpus, length * samples, length + 1)
        return {"tokens": found[:, :-1].copy(), "labels": found[:, 1:].copy()}

    def _packed(self, sample: int, corpus: Corpus) -> Example:
        length = self.env.sequence_length
        tokens, labels, documents = (np.empty(length, dtype=np.int64) for _ in range(3))
        at = 0
        for number, piece in enumerate(packed_row(corpus, sample, length, self.env.packing)):
            stop = at + piece.stop - piece.start
            # A piece that its document goes on after has the next token as its last label.
            text = corpus.stream(piece.start, piece.stop + (not piece.ends))
            tokens[at:stop] = text[: stop - at]
            labels[at : at + len(text) - 1] = text[1:]
            if piece.ends:
                labels[stop - 1] = IGNORE
            documents[at:stop] = number
            at = stop
        return {"tokens": tokens, "labels": labels, "documents": documents}

    def collate(self, examples: list[Example]) -> Batch:
        return {name: np.stack([example[name] for example in examples]) for name in self.needs().tensors}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"causal_lm": int((batch["labels"] != IGNORE).sum())}

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        return {"causal_lm": Term(ctx.lm_loss(hidden, batch["labels"]).sum())}
