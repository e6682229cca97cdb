"""Labelled records: what a head needs of one, and one check for all heads.

A head declares its fields; the engine checks every record against them before training. So all heads refuse the same
mistakes in the same words, and :meth:`megalm.plugin.contract.head.Head.build_example` reads fields without doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megalm.errors import DataError
from megalm.plugin.suggest import did_you_mean

Record = Mapping[str, Any]
"""One row of a data set: JSON values by field. Fields that the head does not name are ignored."""
FieldKind = Literal["text", "words", "class", "classes", "number", "tags", "span", "spans"]

_SHOWN = 60


@dataclass(frozen=True)
class FieldSpec:
    """A field of a record.

    ========= ==========================================================================================
    text      text that is not blank
    words     a list of at least one word, none of them blank
    class     one of the head's labels
    classes   a list of different labels, maybe empty
    number    a finite number
    tags      a label for each word of the field ``of``
    span      ``[start, stop]``: characters [start, stop) of the field ``of``, at least one
    spans     a list of such spans, maybe empty
    ========= ==========================================================================================
    """

    kind: FieldKind
    help: str
    """What it holds, as part of a sentence."""
    of: str | None = None
    """For tags and spans: the field that they speak of."""
    label: bool = False
    """It is what the head predicts: training and metrics need it, prediction does not."""


def record_problems(
    record: Any, fields: Mapping[str, FieldSpec], labels: Sequence[str], *, labelled: bool = True
) -> list[str]:
    """What is wrong with a record, a sentence for each field; empty where it will do.

    Without ``labelled``, fields with ``label`` may be left out; one that is there is checked.
    """
    if not isinstance(record, Mapping):
        return [f"expected fields with values, found {_show(record)}"]
    problems = []
    for name, field in fields.items():
        if name not in record:
            if labelled or not field.label:
                near = did_you_mean(name, [key for key in record if isinstance(key, str) and key not in fields])
                problems.append(f"field {name!r} is missing; it holds {field.help}{near}")
            continue
        if text := _CHECKS[field.kind](record[name], field, record, labels):
            problems.append(f"field {name!r}: {text}")
    return problems


def check_record(record: Any, fields: Mapping[str, FieldSpec], labels: Sequence[str], *, labelled: bool = True) -> None:
    """DataError with everything that :func:`record_problems` finds."""
    if problems := record_problems(record, fields, labels, labelled=labelled):
        raise DataError("; ".join(problems))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({type(value).__name__})"


def _text(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    if not isinstance(value, str):
        return f"expected text, found {_show(value)}"
    return None if value.strip() else f"expected text that is not blank, found {_show(value)}"


def _words(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    if not isinstance(value, list) or not value:
        return f"expected a list of words, found {_show(value)}"
    wrong = next((word for word in value if not (isinstance(word, str) and word.strip())), None)
    return None if wrong is None else f"expected words that are not blank, found {_show(wrong)}"


def _class(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    if isinstance(value, str) and value in labels:
        return None
    near = did_you_mean(value, labels) if isinstance(value, str) else ""
    return f"expected one of {_show(', '.join(labels))}, found {_show(value)}{near}"


def _classes(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    if not isinstance(value, list):
        return f"expected a list of labels, found {_show(value)}"
    found = next((text for each in value if (text := _class(each, field, record, labels))), None)
    return found or (f"names a label twice: {_show(value)}" if len(set(value)) < len(value) else None)


def _number(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return None if good else f"expected a finite number, found {_show(value)}"


def _tags(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    words = record.get(field.of or "")
    if not isinstance(value, list):
        return f"expected a list of labels, one for each word of {field.of!r}, found {_show(value)}"
    if isinstance(words, list) and len(words) != len(value):
        return f"{len(value)} labels for the {len(words)} words of {field.of!r}"
    return next((text for each in value if (text := _class(each, field, record, labels))), None)


def _span(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    text = record.get(field.of or "")
    whole = isinstance(value, list) and len(value) == 2 and all(type(place) is int for place in value)
    if not whole:
        return f"expected [start, stop], characters of {field.of!r}, found {_show(value)}"
    if isinstance(text, str) and not 0 <= value[0] < value[1] <= len(text):
        return f"expected characters within the {len(text)} of {field.of!r}, at least one, found {_show(value)}"
    return None


def _spans(value: Any, field: FieldSpec, record: Record, labels: Sequence[str]) -> str | None:
    if not isinstance(value, list):
        return f"expected a list of [start, stop], found {_show(value)}"
    return next((text for each in value if (text := _span(each, field, record, labels))), None)


_CHECKS: dict[FieldKind, Callable[[Any, FieldSpec, Record, Sequence[str]], str | None]] = {
    "text": _text,
    "words": _words,
    "class": _class,
    "classes": _classes,
    "number": _number,
    "tags": _tags,
    "span": _span,
    "spans": _spans,
}
