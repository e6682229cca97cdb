from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megalm.data import ngram
from megalm.data.ngram import baselines
from megalm.errors import DataError


class ListCorpus:
    def __init__(self, ids):
        self.ids = np.array(ids, dtype=np.int64)
        self.num_tokens = len(ids)

    def stream(self, start, stop):
        return self.ids[start:stop]


def _by_hand(train, validation, vocab):
    counts, pairs = Counter(train), Counter(pairwise(train))
    total, types = len(train), len(counts)

    def p1(w):
        return (counts[w] + types / vocab) / (total + types)

    def p2(h, w):
        c = sum(n for (a, _), n in pairs.items() if a == h)
        t = sum(1 for a, _ in pairs if a == h)
        return (pairs[h, w] + t * p1(w)) / (c + t) if c else p1(w)

    scored = list(pairwise(validation))
    return (
        -sum(math.log(p1(w)) for _, w in scored) / len(scored),
        -sum(math.log(p2(h, w)) for h, w in scored) / len(scored),
        p1,
        p2,
    )


@pytest.mark.parametrize(("seed", "chunk"), [(1, 1 << 20), (2, 7), (3, 1), (4, 50)])
def test_equals_the_formula_written_out(monkeypatch, seed, chunk):
    monkeypatch.setattr(ngram, "_CHUNK", chunk)
    rng = random.Random(seed)
    vocab = rng.choice([5, 12, 200_000])
    symbols = rng.sample(range(vocab), min(vocab, 9))
    train = rng.choices(symbols[:-1], k=120)
    validation = rng.choices(symbols, k=60)
    unigram, bigram, p1, p2 = _by_hand(train, validation, vocab)
    found = baselines(ListCorpus(train), ListCorpus(validation), vocab)
    assert found.tokens == 59
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram, rel=1e-12)
    if vocab < 100:
        assert sum(p1(w) for w in range(vocab)) == pytest.approx(1)
        assert all(sum(p2(h, w) for w in range(vocab)) == pytest.approx(1) for h in range(vocab))


def test_independent_tokens_have_their_entropy():
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    train, validation = (ListCorpus(rng.choice(4, size=200_000, p=p)) for _ in range(2))
    found = baselines(train, validation, 4)
    entropy = float(-(p * np.log(p)).sum())
    assert found.unigram == pytest.approx(entropy, abs=0.01)
    assert found.bigram == pytest.approx(entropy, abs=0.01)


def test_a_cycle_is_known_to_the_bigram():
    cycle = ListCorpus([0, 1, 2, 3] * 500)
    found = baselines(cycle, cycle, 4)
    assert found.unigram == pytest.approx(math.log(4), abs=1e-3)
    assert found.bigram < 0.01


def test_too_short_to_score():
    with pytest.raises(DataError, match="at least 2"):
        baselines(ListCorpus([1, 2]), ListCorpus([1]), 4)
    found = baselines(ListCorpus([1]), ListCorpus([1, 2]), 4)
    assert found.bigram == found.unigram > 0
