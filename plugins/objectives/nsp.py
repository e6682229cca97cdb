"""Next-sentence prediction. (Devlin et al., 2019.)

A row is [CLS] A [SEP] B [SEP]. A is a run of sentences; B either continues it (label 0) or comes from another document
(label 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from megalm.api import Corpus, DataError, Example, Settings

from .pairs import SentencePairs

FOLLOWS, RANDOM = 0, 1


class NextSentenceConfig(Settings):
    """Settings of ``[objective.nsp]``."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    random_prob: float = Field(default=0.5, gt=0, lt=1)
    """Probability that B comes from another document."""


class NextSentence(SentencePairs):
    """Pairs of passages that follow each other or do not."""

    Config = NextSentenceConfig
    cfg: NextSentenceConfig
    term = "nsp"
    label = "next_label"

    def check_corpus(self, corpus: Corpus) -> None:
        if corpus.num_documents < 2:
            raise DataError(f"nsp draws B from another document, but the corpus has {corpus.num_documents}")

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        position = sample * self.budget
        document = corpus.document_at(position)
        bounds = self._sentences(corpus, document, corpus.sentence_at(position), self.budget)
        text = corpus.stream(bounds[0], bounds[-1])
        inner = [stop - bounds[0] for stop in bounds[1:-1]] or list(range(1, len(text)))
        label = RANDOM if rng.random() < self.cfg.random_prob or not inner else FOLLOWS
        cut = inner[rng.integers(len(inner))] if inner else len(text)
        first, second = text[:cut], text[cut:]
        if label == RANDOM:
            other = int(rng.integers(corpus.num_documents - 1))
            other += other >= document
            low, high = corpus.document_sentences(other)
            start, *_, stop = self._sentences(corpus, other, int(rng.integers(low, high)), self.budget)
            second = corpus.stream(start, stop)
        # Trim at the outer ends, so that the passages still meet where they met.
        keep = min(len(first), max(self.budget - len(second), self.budget // 2))
        first, second = first[len(first) - keep :], second[: self.budget - keep]
        return {**self.row(first, second, label), "drawn": bool(inner)}

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
