"""Retrieval: whether the counterpart of each vector is among the k nearest of all counterparts.

Ties count against the prediction: where a model gives every text one vector, nothing is found. Counterparts that are
the same text are the same find.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BLOCK = 1024
_TIE = 1e-9
"""Nearer than this is a tie: rounding depends on the place of a row."""


def ranks(queries: np.ndarray, candidates: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """How many other candidates are as near to query i as candidate i, or nearer: (N,) int64.

    ``queries`` and ``candidates`` (N, D), compared by their inner product; ``texts`` (N,) tells which candidates are
    one.
    """
    code = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    same = np.array([code[text] for text in texts])
    distinct = np.asarray(candidates, dtype=np.float64)[np.unique(same, return_index=True)[1]]
    wide = np.asarray(queries, dtype=np.float64)
    out = np.empty(len(same), dtype=np.int64)
    for start in range(0, len(same), _BLOCK):
        scores = wide[start : start + _BLOCK] @ distinct.T
        own = same[start : start + _BLOCK]
        mine = scores[np.arange(len(own)), own]
        out[start : start + _BLOCK] = (scores >= (mine - _TIE * np.maximum(1.0, abs(mine)))[:, None]).sum(axis=1) - 1
    return out


def recall_at(k: int, predicted: Sequence[tuple[Sequence[float], Sequence[float]]], true: Sequence[str]) -> float:
    """Share of texts whose counterpart is among the ``k`` nearest. A prediction has the vectors of both."""
    found = _ranks(predicted, true)
    return float((found < k).mean()) if len(found) else 0.0


def mean_reciprocal_rank(predicted: Sequence[tuple[Sequence[float], Sequence[float]]], true: Sequence[str]) -> float:
    """Mean of one over the place of the counterpart, counted from 1."""
    found = _ranks(predicted, true)
    return float((1.0 / (found + 1)).mean()) if len(found) else 0.0


def _ranks(predicted: Sequence[tuple[Sequence[float], Sequence[float]]], true: Sequence[str]) -> np.ndarray:
    if not true:
        return np.zeros(0, dtype=np.int64)
    return ranks(np.array([a for a, _ in predicted]), np.array([b for _, b in predicted]), true)
