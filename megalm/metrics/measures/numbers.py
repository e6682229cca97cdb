"""Measures of numbers, through SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megalm.metrics.measures.library import library, number, quietly


def mean_squared_error(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Mean of the squared differences, summed exactly, so that the order of rows changes nothing."""
    return math.fsum((a - b) ** 2 for a, b in zip(predicted, true, strict=True)) / len(true) if true else 0.0


def pearson(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    return _correlation("pearsonr", predicted, true)


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Spearman's rank correlation, ties by their mean rank; 0 where one side is constant."""
    return _correlation("spearmanr", predicted, true)


def _correlation(name: str, predicted: Sequence[float], true: Sequence[float]) -> float:
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} predictions for {len(b)} records")
    if len(b) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return 0.0
    stats = library("scipy.stats", name)
    return number(quietly(lambda: getattr(stats, name)(a, b).statistic))


def perplexity(nats: float) -> float:
    """exp of the mean loss of a token; of a loss too large for that, the largest number."""
    try:
        return math.exp(nats)
    except OverflowError:
        return float(np.finfo(np.float64).max)
