"""Masking: the helper draws what the reference draws, and words are chosen whole."""

from __future__ import annotations

import numpy as np
import pytest

from megalm.data.masking import TokenMasking
from megalm.native.helpers import helpers
from megalm.parallel import rng
from megalm.plugin.contract.objective import IGNORE

VOCABULARY = 50
MASK = 3


def masking(starts: np.ndarray | None, prob: float = 0.3, masked: float = 0.6, replaced: float = 0.3) -> TokenMasking:
    return TokenMasking(MASK, np.arange(5, VOCABULARY), prob, masked, replaced, starts)


def row(draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return draw.integers(0, VOCABULARY, length), draw.random(length) < 0.2, np.sort(draw.integers(0, 4, length))


@pytest.mark.skipif(isinstance(helpers(), str), reason=f"no helpers: {helpers()}")
def test_the_helper_equals_the_reference(campaign_seed: int) -> None:
    draw = np.random.default_rng(campaign_seed)
    for case in range(300):
        starts = draw.random(VOCABULARY) < draw.random() if case % 3 else None
        how = masking(starts, *draw.random(2).tolist(), replaced=0.2)
        tokens, special, documents = row(draw, int(draw.integers(0, 80)))
        given = (tokens, special, rng.generator("masking", case), documents if case % 2 else None)
        again = (tokens, special, rng.generator("masking", case), documents if case % 2 else None)
        for found, expected in zip(how(*given), how.reference(*again), strict=True):
            assert found.dtype == expected.dtype == np.int64
            assert np.array_equal(found, expected)
        # Whoever draws next draws the same as well.
        assert given[2].random() == again[2].random()


def test_words_are_chosen_whole() -> None:
    """A word ends at a special token, at the end of a document, and where another begins."""
    starts = np.zeros(VOCABULARY, dtype=bool)
    starts[10:20] = True
    tokens = np.array([30, 31, 10, 32, 33, 1, 34, 35, 36, 11, 12, 37])
    special = tokens == 1
    documents = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    places, words = masking(starts).words(tokens, special, documents)
    assert places.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert words.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 5]
    chosen = np.zeros(len(tokens), dtype=bool)
    for case in range(200):
        _, labels = masking(starts)(tokens, special, rng.generator("words", case), documents)
        assert np.array_equal(labels[labels != IGNORE], tokens[labels != IGNORE])
        chosen = labels != IGNORE
        assert not chosen[special].any()
        for word in range(6):
            assert len(set(chosen[places[words == word]].tolist())) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_shares_are_those_asked_for(whole: bool) -> None:
    """Within five standard deviations of the binomial counts."""
    draw = np.random.default_rng(1)
    starts = draw.random(VOCABULARY) < 0.6 if whole else None
    how = masking(starts, 0.15, 0.8, 0.1)
    trials = hits = tokens_chosen = masked = random = 0
    for case in range(400):
        tokens = draw.integers(5, VOCABULARY, 300)
        special = np.zeros(300, dtype=bool)
        corrupted, labels = how(tokens, special, rng.generator("shares", case))
        places, words = how.words(tokens, special)
        chosen = labels != IGNORE
        trials += int(words[-1]) + 1
        hits += len(np.unique(words[chosen[places]]))
        tokens_chosen += int(chosen.sum())
        masked += int((corrupted[chosen] == MASK).sum())
        random += int(((corrupted != MASK) & (corrupted != tokens)).sum())
        assert np.array_equal(corrupted[~chosen], tokens[~chosen])
    for count, of, share in (
        (hits, trials, 0.15),
        (masked, tokens_chosen, 0.8),
        (random, tokens_chosen, 0.1 * (1 - 1 / 45)),
    ):
        assert abs(count - of * share) < 5 * np.sqrt(of * share * (1 - share)), (count, of, share)


@pytest.mark.skipif(isinstance(helpers(), str), reason=f"no helpers: {helpers()}")
def test_arguments_that_do_not_fit() -> None:
    tokens, special = np.array([0, 1, 9]), np.zeros(3, dtype=bool)
    draw = rng.generator("bad")
    with pytest.raises(ValueError, match="one length"):
        masking(None)(tokens, special[:2], draw)
    with pytest.raises(IndexError, match="token 9 of a vocabulary of 3"):
        masking(np.ones(3, dtype=bool))(tokens, special, draw)
