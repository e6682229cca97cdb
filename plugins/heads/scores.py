"""Measures of predictions. Sums are exact (``math.fsum``), so that the order of rows changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence


def accuracy(predicted: Sequence[object], true: Sequence[object]) -> float:
    """Share of places where the two are equal; 0 of none."""
    return sum(a == b for a, b in zip(predicted, true, strict=True)) / len(true) if true else 0.0


def macro_f1(predicted: Sequence[object], true: Sequence[object], labels: Sequence[object]) -> float:
    """Mean of the F1 of each label that occurs on either side; 0 where none does."""
    scores = []
    for label in labels:
        hits = sum(a == b == label for a, b in zip(predicted, true, strict=True))
        sides = sum(a == label for a in predicted) + sum(b == label for b in true)
        if sides:
            scores.append(2 * hits / sides)
    return math.fsum(scores) / len(scores) if scores else 0.0


def mean_squared_error(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Mean of the squared differences; 0 of none."""
    return math.fsum((a - b) ** 2 for a, b in zip(predicted, true, strict=True)) / len(true) if true else 0.0


def pearson(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant, for which it is not defined."""
    if not true:
        return 0.0
    centred = []
    for values in (predicted, true):
        mean = math.fsum(values) / len(values)
        centred.append([value - mean for value in values])
    a, b = centred
    product, sizes = (
        math.fsum(x * y for x, y in zip(a, b, strict=True)),
        [math.fsum(x * x for x in side) for side in centred],
    )
    scale = math.sqrt(sizes[0]) * math.sqrt(sizes[1])
    return max(-1.0, min(1.0, product / scale)) if scale > 0 else 0.0
