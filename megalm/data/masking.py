"""Which tokens of a row are to be predicted, and what stands in their place.

The arithmetic is a few operations on each token, which numpy does in thirty passes: at BERT's sizes it would take
longer than all else that makes a row. So there is a helper in C++, which draws from the same generator in the same
order, and a reference in numpy, which is what it means and what runs where nothing can be compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalm.native.helpers import helpers
from megalm.plugin.contract.objective import IGNORE


@dataclass(frozen=True)
class TokenMasking:
    """BERT's corruption (Devlin et al., 2019) of ordinary tokens, each by itself or in whole words."""

    mask: int
    """Id of the mask token."""
    ordinary: np.ndarray
    """int64 (n,): ids that a token may be replaced with."""
    mask_prob: float
    """Probability that a token, or a word, is chosen."""
    mask_share: float
    """Of the chosen tokens, the share replaced by the mask token."""
    random_share: float
    """Of the chosen tokens, the share replaced by a random ordinary one."""
    word_starts: np.ndarray | None = None
    """bool (vocabulary,): ids that begin a word, which is chosen as a whole. None: every token is chosen by itself."""

    def __call__(
        self, tokens: np.ndarray, special: np.ndarray, rng: np.random.Generator, documents: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corrupted tokens and labels, ``IGNORE`` where nothing is to be predicted: int64 (length,) each.

        ``tokens``: int64 (length,). ``special``: bool (length,), true of what is never chosen. ``documents``: int64
        (length,), numbers of the documents; no word goes on from one to another.
        """
        native = helpers()
        if isinstance(native, str):
            return self.reference(tokens, special, rng, documents)
        below = (self.mask_prob, self.mask_share, self.mask_share + self.random_share)
        ids = (self.word_starts, self.ordinary, self.mask, IGNORE)
        with rng.bit_generator.lock:
            found = native.masked_tokens(rng.bit_generator.capsule, tokens, special, documents, *ids, below)
        corrupted: np.ndarray = found[0]
        labels: np.ndarray = found[1]
        return corrupted, labels

    def reference(
        self, tokens: np.ndarray, special: np.ndarray, rng: np.random.Generator, documents: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same in numpy."""
        places, words = self.words(tokens, special, documents)
        chance = rng.random(int(words[-1]) + 1 if len(words) else 0)
        chosen = places[chance[words] < self.mask_prob]
        kind = rng.random(len(chosen))
        masked = kind < self.mask_share
        random = chosen[~masked & (kind < self.mask_share + self.random_share)]
        labels = np.full(len(tokens), IGNORE)
        labels[chosen] = tokens[chosen]
        corrupted = tokens.copy()
        corrupted[chosen[masked]] = self.mask
        corrupted[random] = self.ordinary[(rng.random(len(random)) * len(self.ordinary)).astype(np.int64)]
        return corrupted, labels

    def words(
        self, tokens: np.ndarray, special: np.ndarray, documents: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places of the tokens that may be chosen, and the number of the word that each belongs to, from 0: int64."""
        places = np.flatnonzero(~special)
        if self.word_starts is None:
            return places, np.arange(len(places))
        begins = self.word_starts[tokens]
        begins[:1] = True
        begins[1:] |= special[:-1]
        if documents is not None:
            begins[1:] |= documents[1:] != documents[:-1]
        return places, np.cumsum(begins[places]) - 1
