"""Measures of labels, through scikit-learn. Predictions that are no label, such as of what was cut off, are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megalm.metrics.measures.library import library, number, quietly

_NONE = -1


def _codes(predicted: Sequence[Any], true: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Both sides as numbers, and the labels that occur; -1 is no label."""
    names = sorted({each for side in (predicted, true) for each in side if each is not None})
    code: dict[Any, int] = {name: index for index, name in enumerate(names)}
    code[None] = _NONE
    return (
        np.array([code[each] for each in predicted], dtype=np.int64),
        np.array([code[each] for each in true], dtype=np.int64),
        names,
    )


def accuracy(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """Share of predictions that are right."""
    a, b, _ = _codes(predicted, true)
    return number((a == b).mean()) if len(b) else 0.0


def f1_micro(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """F1 over the decisions of all labels together."""
    return _f1(predicted, true, "micro")


def f1_macro(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """Mean of the F1 of each label that occurs on either side."""
    return _f1(predicted, true, "macro")


def _f1(predicted: Sequence[Any], true: Sequence[Any], average: str) -> float:
    a, b, names = _codes(predicted, true)
    if not names:
        return 0.0
    metrics = library("sklearn.metrics", f"f1_{average}")
    labels = range(len(names))
    return number(quietly(lambda: metrics.f1_score(b, a, labels=labels, average=average, zero_division=0)))


def matthews(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """Matthews' correlation; 0 where either side is constant."""
    a, b, _ = _codes(predicted, true)
    if len(b) == 0:
        return 0.0
    metrics = library("sklearn.metrics", "matthews")
    return number(quietly(lambda: metrics.matthews_corrcoef(b, a)))


def class_report(predicted: Sequence[Any], true: Sequence[Any]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each label that occurs, and their averages."""
    a, b, names = _codes(predicted, true)
    return _report(a, b, names) if names else {}


def _rows(chosen: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    code = {name: index for index, name in enumerate(names)}
    out = np.zeros((len(chosen), len(names)), dtype=np.int64)
    for row, labels in enumerate(chosen):
        out[row, [code[label] for label in labels]] = 1
    return out


def _both(predicted: Sequence[Any], true: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    names = sorted({label for side in (predicted, true) for labels in side for label in labels})
    return _rows(predicted, names), _rows(true, names), names


def set_accuracy(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """Share of rows whose labels are all right, and no others."""
    equal = [set(a) == set(b) for a, b in zip(predicted, true, strict=True)]
    return sum(equal) / len(equal) if equal else 0.0


def set_f1_micro(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """F1 over all decisions on a label."""
    return _set_f1(predicted, true, "micro")


def set_f1_macro(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """Mean of the F1 of each label that occurs on either side."""
    return _set_f1(predicted, true, "macro")


def _set_f1(predicted: Sequence[Any], true: Sequence[Any], average: str) -> float:
    a, b, names = _both(predicted, true)
    if not names:
        return 0.0
    metrics = library("sklearn.metrics", f"f1_{average}")
    return number(
        quietly(
            lambda: metrics.f1_score(_wide(b), _wide(a), labels=range(len(names)), average=average, zero_division=0)
        )
    )


def _wide(rows: np.ndarray) -> np.ndarray:
    """One label alone would be taken for the classes 0 and 1: it gets a neighbour that is never chosen."""
    return np.pad(rows, ((0, 0), (0, 1))) if rows.shape[1] == 1 else rows


def set_report(predicted: Sequence[Any], true: Sequence[Any]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each label that occurs, and their averages."""
    a, b, names = _both(predicted, true)
    return _report(_wide(a), _wide(b), names) if names else {}


def _report(predicted: np.ndarray, true: np.ndarray, names: list[str]) -> dict[str, Any]:
    metrics = library("sklearn.metrics", "report")
    codes = [f"{index:06d}" for index in range(len(names))]
    out: dict[str, Any] = quietly(
        lambda: metrics.classification_report(
            true, predicted, labels=range(len(names)), target_names=codes, output_dict=True, zero_division=0
        )
    )
    return tidy_report(out, dict(zip(codes, names, strict=True)))


def tidy_report(report: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A library's report as JSON: ``{"labels": {NAME: row}, "averages": {NAME: row}}``. ``names`` of its labels, which
    are called by number in it, since a label may be called as an average is.
    """
    rows = {
        name: {key: number(value) for key, value in row.items()}
        for name, row in report.items()
        if isinstance(row, dict)
    }
    return {
        "labels": {names[code]: rows[code] for code in names if code in rows},
        "averages": {name: row for name, row in rows.items() if name not in names},
    }
