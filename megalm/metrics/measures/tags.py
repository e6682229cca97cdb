"""Measures of spans that tags in IOB2 mark, through seqeval, which counts as CoNLL's own script does.

Its report is one table of types and averages, where a type that is called "micro avg" would hide an average. So it is
given types by number, and the report gets their names back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megalm.metrics.measures.classes import tidy_report
from megalm.metrics.measures.library import library, number, quietly

_OUTSIDE = "O"


def marks_spans(labels: Sequence[str]) -> bool:
    """Whether labels are IOB2's: O, and B- and I- of types."""
    types = {label[2:] for label in labels if label[:2] in ("B-", "I-") and len(label) > 2}
    return bool(types) and all(label == _OUTSIDE or (label[:2] in ("B-", "I-") and label[2:]) for label in labels)


def _plain(rows: Sequence[Sequence[str | None]], code: dict[str, str]) -> list[list[str]]:
    return [[tag[:2] + code[tag[2:]] if tag is not None and tag[2:] else _OUTSIDE for tag in row] for row in rows]


def _both(predicted: Any, true: Any) -> tuple[list[list[str]], list[list[str]], dict[str, str]]:
    """Both sides with types by number; a word without a tag is outside of every span."""
    types = sorted(
        {tag[2:] for side in (predicted, true) for row in side for tag in row if tag is not None and tag[2:]}
    )
    code = {name: f"{index:06d}" for index, name in enumerate(types)}
    return _plain(predicted, code), _plain(true, code), code


def span_f1(predicted: Sequence[Sequence[str | None]], true: Sequence[Sequence[str]]) -> float:
    """F1 over whole spans, each right where beginning, end and type are."""
    return _score("f1_score", predicted, true)


def span_precision(predicted: Sequence[Sequence[str | None]], true: Sequence[Sequence[str]]) -> float:
    """Share of predicted spans that are right."""
    return _score("precision_score", predicted, true)


def span_recall(predicted: Sequence[Sequence[str | None]], true: Sequence[Sequence[str]]) -> float:
    """Share of true spans that are found."""
    return _score("recall_score", predicted, true)


def _score(name: str, predicted: Any, true: Any) -> float:
    a, b, code = _both(predicted, true)
    if not code:
        return 0.0
    metrics = library("seqeval.metrics", name)
    return number(quietly(lambda: getattr(metrics, name)(b, a, zero_division=0)))


def span_report(predicted: Sequence[Sequence[str | None]], true: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each type that occurs, and their averages."""
    a, b, code = _both(predicted, true)
    if not code:
        return {}
    metrics = library("seqeval.metrics", "report")
    found = quietly(lambda: metrics.classification_report(b, a, output_dict=True, zero_division=0))
    names = {plain: name for name, plain in code.items()}
    return tidy_report(found, names)


def word_accuracy(predicted: Sequence[Sequence[str | None]], true: Sequence[Sequence[str]]) -> float:
    """Share of words with the right tag."""
    pairs = [(a, b) for x, y in zip(predicted, true, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
