"""Shuffled-token detection: some positions of a window swap their tokens; tell for each position whether it did.

A position counts as in place where it shows the token that the text has there, so that equal tokens may swap unseen.
"""

import numpy as np
from pydantic import Field

from megalm.api import DataError, HeadSpec, Needs, Objective, Settings, TensorSpec, Term

MOVED, IN_PLACE = 0, 1


class ShuffledTokensConfig(Settings):
    """Settings of ``[objective.shuffled]``."""

    share: float = Field(default=0.3, gt=0, le=1)
    """Share of the positions whose tokens are permuted among themselves."""


class ShuffledTokens(Objective):
    """Samples are windows of the token stream that follow each other."""

    Config = ShuffledTokensConfig

    def needs(self):
        # Labels are kept whole wherever a row's positions may be split, as full_sequence gives whole rows.
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(("batch", "place"), to="last")}
        return Needs("bidirectional", tensors, lm_head=False, heads=(HeadSpec("in_place", outputs=2),))

    def weights(self):
        return {"shuffled": 1.0}

    def check_corpus(self, corpus):
        if self.num_samples(corpus) < 1:
            raise DataError(f"shuffled needs {self.env.sequence_length} tokens, but the corpus has {corpus.num_tokens}")

    def num_samples(self, corpus):
        return corpus.num_tokens // self.env.sequence_length

    def build_example(self, sample, corpus, rng):
        length = self.env.sequence_length
        text = corpus.stream(sample * length, (sample + 1) * length)
        places = np.flatnonzero(rng.random(length) < self.cfg.share)
        tokens = text.copy()
        tokens[places] = text[rng.permutation(places)]
        return {"tokens": tokens, "labels": np.where(tokens == text, IN_PLACE, MOVED)}

    def collate(self, examples):
        return {name: np.stack([example[name] for example in examples]) for name in ("tokens", "labels")}

    def counts(self, batch):
        return {"shuffled": len(batch["labels"])}  # the items of an example-scope term are rows

    def loss(self, hidden, batch, ctx):
        from torch.nn.functional import cross_entropy

        # The context gathers the hidden vectors, whatever shards the layout makes of a row.
        logits = ctx.head("in_place", ctx.full_sequence(hidden))
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return {"shuffled": Term(loss / self.env.sequence_length, scope="example")}
