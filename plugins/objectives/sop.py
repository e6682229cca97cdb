"""Sentence-order prediction. (Lan et al., "ALBERT", 2020.)

A row is [CLS] A [SEP] B [SEP] of two passages that follow each other in a document, in their order (label 0) or swapped
(label 1). Unlike in next-sentence prediction the topic is always the same, so that only coherence tells the two apart.

Passages are whole sentences, as many as fit; what is cut is cut at the end of each passage, so that no cut tells the
order. A document of one sentence is cut in two between tokens. Where it has a single token there is no order: the row
scores nothing, and serves only what it is joined with.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from megalm.api import IGNORE, Corpus, DataError, Example, Settings

from .pairs import SentencePairs

IN_ORDER, SWAPPED = 0, 1


class SentenceOrderConfig(Settings):
    """Settings of ``[objective.sop]``."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    swap_prob: float = Field(default=0.5, gt=0, lt=1)
    """Probability that the passages are swapped."""


class SentenceOrder(SentencePairs):
    """Pairs of passages of a document in their order or swapped."""

    Config = SentenceOrderConfig
    cfg: SentenceOrderConfig
    term = "sop"
    label = "order_label"

    def check_corpus(self, corpus: Corpus) -> None:
        ends = corpus.num_documents * (self.env.tokenizer.special.eos is not None)
        if corpus.num_tokens - ends <= corpus.num_documents:
            raise DataError(
                f"sop needs documents of at least two tokens; the corpus has {corpus.num_documents} documents and "
                f"{corpus.num_tokens} tokens"
            )

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        position = sample * self.budget
        low, high = corpus.document_sentences(corpus.document_at(position))
        # The last sentence alone would have to be cut: take the one before it too.
        first = max(low, min(corpus.sentence_at(position), high - 2))
        bounds = self._sentences(corpus, first, high)
        text = corpus.stream(bounds[0], bounds[-1])
        inner = sorted({stop - bounds[0] for stop in bounds[1:-1]} - {0, len(text)})
        if not inner:
            text = text[: self.budget]
            inner = list(range(1, len(text)))
        cut = inner[rng.integers(len(inner))] if inner else len(text)
        before, after = text[:cut], text[cut:]
        keep = min(len(before), max(self.budget - len(after), self.budget // 2))
        before, after = before[:keep], after[: self.budget - keep]
        swapped = rng.random() < self.cfg.swap_prob
        if not (len(before) and len(after)):
            return self.row(text[: self.budget], text[:0], IGNORE)
        return self.row(after, before, SWAPPED) if swapped else self.row(before, after, IN_ORDER)

    def rates(self) -> Mapping[str, float]:
        return {"swap_prob": self.cfg.swap_prob}

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        label = example["order_label"]
        return {"swap_prob": (int(label == SWAPPED), int(label != IGNORE))}

    def _sentences(self, corpus: Corpus, sentence: int, last: int) -> list[int]:
        """Starts of consecutive sentences before ``last``, and the last one's end: as many as fit, but two where there
        are two."""
        start, stop = corpus.sentence(sentence)
        bounds = [start, stop]
        for number in range(sentence + 1, last):
            stop = corpus.sentence(number)[1]
            if stop - start > self.budget and len(bounds) > 2:
                break
            bounds.append(stop)
        return bounds
