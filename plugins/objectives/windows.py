"""What masking objectives have in common when they build rows themselves: windows of the stream, between the cls and
sep tokens where there are such."""

from __future__ import annotations

import numpy as np

from megalm.api import ConfigError, Corpus, DataError, Example, ObjectiveEnv


class TextWindows:
    """Rows of the objective called ``name``; with packing, without cls and sep, which would have to be in each text.

    ConfigError where the tokenizer has no mask token, or where rows leave no room for text.
    """

    def __init__(self, name: str, env: ObjectiveEnv) -> None:
        special = env.tokenizer.special
        if special.mask is None:
            raise ConfigError([f"train.objective: {name} needs a tokenizer with a mask token, and this one has none"])
        self._name = name
        self.mask: int = special.mask
        """Id of the mask token."""
        self.special = np.isin(np.arange(env.tokenizer.vocab_size), special.ids())
        """Which ids are special tokens: bool (vocabulary,)."""
        self.ordinary = np.flatnonzero(~self.special)
        """The other ids."""
        self._prefix, self._suffix = (
            np.array([] if mark is None or env.packing else [mark], dtype=np.int64)
            for mark in (special.cls, special.sep)
        )
        self.size = env.sequence_length - len(self._prefix) - len(self._suffix)
        """Tokens of text in a row."""
        if self.size < 1:
            raise ConfigError([f"train.sequence_length = {env.sequence_length} leaves {name} no room for text"])

    def count(self, corpus: Corpus) -> int:
        """Windows of an epoch."""
        return corpus.num_tokens // self.size

    def check(self, corpus: Corpus) -> None:
        """DataError where there is none."""
        if self.count(corpus) < 1:
            raise DataError(f"{self._name} needs at least {self.size} tokens, but the corpus has {corpus.num_tokens}")

    def row(self, sample: int, corpus: Corpus) -> Example:
        """``tokens`` and ``special`` of a window."""
        text = corpus.stream(sample * self.size, (sample + 1) * self.size)
        tokens = np.concatenate((self._prefix, text, self._suffix))
        return {"tokens": tokens, "special": self.special[tokens]}
