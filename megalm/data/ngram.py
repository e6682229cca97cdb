"""What counting alone achieves: cross-entropies of a unigram and a bigram model, the least that training must beat.

Both are fitted on one part and scored on another, on exactly the stream that a causal model sees, end-of-document
tokens included. Unseen events get their share by the interpolation of Witten and Bell (1991, method C): with c
counts, of T(h) different successors,

    p(w)     = (c(w)    + T    / V   ) / (c    + T)
    p(w | h) = (c(h, w) + T(h) * p(w)) / (c(h) + T(h))

It needs no tuning and is defined for every vocabulary and corpus. Pairs are counted sparsely and by chunks, so that
neither V squared nor the corpus need fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.errors import DataError
from megalm.plugin.contract.objective import Corpus

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Baselines:
    """Cross-entropies in nats per token."""

    unigram: float
    bigram: float
    tokens: int
    """Tokens scored: all of the stream but the first, by both models."""


def baselines(train: Corpus, validation: Corpus, vocab_size: int) -> Baselines:
    """Fit on ``train``, score ``validation``. DataError where the validation stream has nothing to score."""
    scored = validation.num_tokens - 1
    if scored < 1:
        raise DataError(f"the validation part has {validation.num_tokens} token(s), at least 2 are needed for a bigram")
    counts = np.zeros(vocab_size, dtype=np.int64)
    contexts = np.zeros(vocab_size, dtype=np.int64)
    pairs = np.zeros(0, dtype=np.int64)
    pair_counts = np.zeros(0, dtype=np.int64)
    counts[train.stream(0, 1)] += 1
    for before, after in _pairs(train):
        counts += np.bincount(after, minlength=vocab_size)
        contexts += np.bincount(before, minlength=vocab_size)
        new, new_counts = np.unique(before * vocab_size + after, return_counts=True)
        pairs, pair_counts = _merge(pairs, pair_counts, new, new_counts)
    types = np.count_nonzero(counts)
    unigram = (counts + types / vocab_size) / (counts.sum() + types)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    nats = np.zeros(2)
    for before, after in _pairs(validation):
        back_off = unigram[after]
        seen = _look_up(pairs, pair_counts, before * vocab_size + after)
        total = contexts[before] + followers[before]
        known = np.maximum(total, 1)
        bigram = np.where(total > 0, (seen + followers[before] * back_off) / known, back_off)
        nats -= np.log(back_off).sum(), np.log(bigram).sum()
    return Baselines(unigram=float(nats[0] / scored), bigram=float(nats[1] / scored), tokens=scored)


def _pairs(corpus: Corpus) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each token of the stream with its successor, by chunks."""
    for start in range(0, corpus.num_tokens - 1, _CHUNK):
        tokens = corpus.stream(start, min(start + _CHUNK + 1, corpus.num_tokens))
        yield tokens[:-1], tokens[1:]


def _merge(
    keys: np.ndarray, counts: np.ndarray, new: np.ndarray, new_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    merged, places = np.unique(np.concatenate([keys, new]), return_inverse=True)
    totals = np.zeros(len(merged), dtype=np.int64)
    np.add.at(totals, places, np.concatenate([counts, new_counts]))
    return merged, totals


def _look_up(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Counts of the wanted keys, 0 where absent; ``keys`` ascend."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, counts[places], 0)
