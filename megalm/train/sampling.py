"""Choosing the next token from logits, by address.

The noise of a token is a function of (seed, number of the prompt, number of the token), so neither the layout nor the
other prompts of a batch change what is drawn. (Gumbel's trick: the argmax of log-probabilities plus Gumbel noise is a
draw from the distribution.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalm.errors import UsageError
from megalm.parallel import rng


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token, and the rest is without effect."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have at least this probability; 1: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("temperature", self.temperature, self.temperature >= 0),
            ("top_k", self.top_k, self.top_k >= 0),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
        ):
            if not fits:
                wanted = "above 0 and at most 1" if name == "top_p" else "at least 0"
                raise UsageError(f"{name} must be {wanted}; found {value}")

    def choose(self, logits: np.ndarray, prompt: int, number: int) -> int:
        """The token after ``number`` generated ones of a prompt: an index of ``logits``, float64 (V,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits / self.temperature
        if 0 < self.top_k < len(scores):
            scores = np.where(scores >= np.partition(scores, -self.top_k)[-self.top_k], scores, -np.inf)
        if self.top_p < 1:
            scores = np.where(_nucleus(scores, self.top_p), scores, -np.inf)
        noise = rng.uniform(rng.key(self.seed, "sample"), len(scores), (number, prompt, 0))
        return int((scores - np.log(-np.log(noise))).argmax())


def _nucleus(scores: np.ndarray, share: float) -> np.ndarray:
    """True at the fewest likeliest tokens whose probabilities reach ``share``."""
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores[order] - scores[order[0]])
    before = np.cumsum(weights) - weights
    kept = np.zeros(len(scores), dtype=bool)
    kept[order[before < share * weights.sum()]] = True
    return kept
