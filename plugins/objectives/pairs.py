"""What objectives on rows of two passages share: [CLS] A [SEP] B [SEP], one classifier on BERT's pooler.

They differ in which passages they choose and in what the label says. Pairs need no stored mapping: a sample is a place
in the token stream, found again by binary search, and each row reads a bounded number of sentences whatever the corpus
is like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from megalm.api import (
    IGNORE,
    Batch,
    ConfigError,
    Corpus,
    Example,
    HeadSpec,
    LossContext,
    Needs,
    Objective,
    ObjectiveEnv,
    TensorSpec,
    Term,
)

if TYPE_CHECKING:
    import torch


class SentencePairs(Objective):
    """Builds sentence pairs; in a joint objective others corrupt or score them further."""

    term: ClassVar[str]
    """Name of the objective, of its one term and of its classifier."""
    label: ClassVar[str]
    """The batch's tensor of what the classifier is to say: 0, 1 or ``IGNORE`` of each row."""

    def __init__(self, cfg: Any, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        special = env.tokenizer.special
        if special.cls is None or special.sep is None or special.pad is None:
            raise ConfigError([f"train.objective: {self.term} needs a tokenizer with cls, sep and pad tokens"])
        self._cls, self._sep, self._pad = special.cls, special.sep, special.pad
        self._special = np.isin(np.arange(env.tokenizer.vocab_size), special.ids())
        self.budget = env.sequence_length - 3
        """Tokens of both passages together, at most."""
        if self.budget < 2:
            raise ConfigError(
                [f"train.sequence_length = {env.sequence_length} leaves {self.term} no room for two passages"]
            )

    def needs(self) -> Needs:
        tensors = {
            "tokens": TensorSpec(),
            "token_types": TensorSpec(),
            "attention_mask": TensorSpec(dtype="bool", to="all"),
            self.label: TensorSpec(("batch",), to="last"),
        }
        head = HeadSpec(self.term, outputs=2, pooled=True)
        return Needs("bidirectional", tensors, lm_head=False, heads=(head,), token_types=2, coupling="example")

    def weights(self) -> Mapping[str, float]:
        return {self.term: self.cfg.weight}

    def num_samples(self, corpus: Corpus) -> int:
        return -(-corpus.num_tokens // self.budget)

    def row(self, first: np.ndarray, second: np.ndarray, label: int) -> Example:
        """The row of two passages, which together hold no more than :attr:`budget` tokens."""
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
            self.label: label,
            "special": ~present | self._special[tokens],
        }

    def collate(self, examples: list[Example]) -> Batch:
        names = ("tokens", "token_types", "attention_mask", self.label)
        return {name: np.stack([example[name] for example in examples]) for name in names}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.term: int((batch[self.label] != IGNORE).sum())}

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        import torch.nn.functional as F

        logits = ctx.head(self.term, ctx.pick(hidden, 0))
        total = F.cross_entropy(logits, batch[self.label], reduction="sum", ignore_index=IGNORE)
        return {self.term: Term(total, scope="example")}
