"""Metrics: named, finite, the same in any order of rows, and best for right predictions."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from megalm.plugin.contract.records import Record
from megalm.testing.check import CheckFailed
from megalm.testing.head.module import serial_model
from megalm.testing.head.subject import HeadSubject
from megalm.train.head import predict

RTOL = 1e-9


def metrics_are_sound(subject: HeadSubject) -> str:
    """Right predictions are best by every metric; the order of rows and a journey through JSON change none."""
    head, records = subject.head, subject.records
    goals = dict(head.goals())
    if not goals or not set(goals.values()) <= {"max", "min"}:
        raise CheckFailed(f"head {subject.name}: goals() gives {goals}; expected 'max' or 'min' for each metric")
    truths = _json(subject, [head.truth(record) for record in records], "truth()")
    best = _measure(subject, truths, records)
    predicted = predict(serial_model(subject), subject.name, head, subject.bare, micro_batch=16)
    found = _measure(subject, predicted, records)
    for name, goal in goals.items():
        if (found[name] > best[name] + RTOL) if goal == "max" else (found[name] < best[name] - RTOL):
            raise CheckFailed(
                f"head {subject.name}: an untrained model's {name} is {found[name]:.6g}, better than that of right "
                f"predictions, {best[name]:.6g} (goal: {goal})"
            )
    if found == best:
        raise CheckFailed(
            f"head {subject.name}: no metric tells an untrained model's predictions from right ones: {best}"
        )
    order = random.Random(subject.seed).sample(range(len(records)), len(records))
    _compare(subject, "in another order of rows", found, [predicted[n] for n in order], [records[n] for n in order])
    _compare(subject, "of predictions that were JSON", found, _json(subject, predicted, "predict()"), records)
    for prediction, record in zip(predicted[:5], records[:5], strict=True):
        _measure(subject, [prediction], [record])
    return ", ".join(f"{name} {found[name]:.3g} untrained, {best[name]:.3g} at best" for name in goals)


def _measure(subject: HeadSubject, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
    found: Mapping[str, Any] = subject.head.metrics(predictions, records)
    goals = subject.head.goals()
    if set(found) != set(goals):
        raise CheckFailed(f"head {subject.name}: metrics() gives {sorted(found)}, but goals() declares {sorted(goals)}")
    for name, value in found.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise CheckFailed(
                f"head {subject.name}: the metric {name!r} of {len(records)} records is {value!r}; "
                "expected a finite float"
            )
    return {name: float(value) for name, value in found.items()}


def _compare(
    subject: HeadSubject, how: str, expected: dict[str, float], predictions: list[Any], records: Sequence[Record]
) -> None:
    found = _measure(subject, predictions, records)
    for name, value in expected.items():
        if abs(found[name] - value) > RTOL * max(1.0, abs(value)):
            raise CheckFailed(f"head {subject.name}: the metric {name!r} {how} is {found[name]!r} instead of {value!r}")


def _json(subject: HeadSubject, values: list[Any], what: str) -> list[Any]:
    try:
        out: list[Any] = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckFailed(f"head {subject.name}: {what} gives what JSON cannot hold: {error}") from error
    return out
