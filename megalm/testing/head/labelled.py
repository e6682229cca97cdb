"""Records: refused by field where they are wrong, cut where they are long, read through declared fields only."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np

from megalm.errors import DataError
from megalm.plugin.contract.objective import Example
from megalm.plugin.contract.records import FieldKind, FieldSpec
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.head.records import unlabelled
from megalm.testing.head.subject import HeadSubject
from megalm.train.head import as_corpus, head_objective

TARGETS = {"tags": "words", "span": "text", "spans": "text"}
HARD = {
    "a zero-width space": "\u200b",
    "an emoji": "🙂",
    "a combining accent": "a\u0301",
    "a control character": "\x01",
    "the names of special tokens": "[CLS] </s> <mask>",
    "one letter": "x",
}


def records_are_checked(subject: HeadSubject) -> str:
    """Bad records are refused with the field named; build_example reads no other fields, and changes none."""
    fields = subject.head.fields()
    _check_fields(subject, fields)
    good = dict(subject.records[0])
    covered = 0
    for name, value, why in _faults(fields, good):
        record = {key: v for key, v in good.items() if key != name} if why == "missing" else {**good, name: value}
        text = _refusal(subject, record)
        if text is None or f"field {name!r}" not in text:
            raise CheckFailed(f"head {subject.name}: a record whose {name!r} is {why} is not refused by field: {text}")
        covered += 1
    for given in subject.records[:10]:
        known = {key: value for key, value in given.items() if key in fields}
        before = copy.deepcopy(known)
        first = _build(subject, known, "its declared fields only")
        if known != before:
            raise CheckFailed(f"head {subject.name}: build_example changes the record")
        if not _alike(first, _build(subject, {**known, "zzz": 7}, "another field")):
            raise CheckFailed(f"head {subject.name}: a field that fields() does not name changes the row")
        _build(subject, unlabelled([known], fields)[0], "no labels")
    return f"{covered} bad records"


def long_texts_are_cut(subject: HeadSubject) -> str:
    """A text beyond the sequence length is cut and says so; strange texts give a row, or are refused by field."""
    fields = subject.head.fields()
    names = [name for name, field in fields.items() if field.kind in ("text", "words")]
    if not names:
        raise NotApplicable("the head reads no text")
    record: dict[str, Any] = dict(subject.records[0])
    for name in names:
        # Of its own words: the tokenizer has tokens for them, whatever stands between words.
        own = record[name] if fields[name].kind == "text" else " ".join(record[name])
        record = _with_text(record, fields, name, " ".join([own] * subject.sequence_length))
    row = _build(subject, record, "long text")
    if len(row["tokens"]) > subject.sequence_length:
        raise CheckFailed(
            f"head {subject.name}: a long text gives {len(row['tokens'])} tokens, more than the sequence length of "
            f"{subject.sequence_length}"
        )
    if not row.get("truncated", False):
        raise CheckFailed(f"head {subject.name}: a long text is cut without saying so; set 'truncated' in its row")
    for name in names:
        for what, text in HARD.items():
            strange = _with_text(dict(subject.records[0]), fields, name, text)
            try:
                subject.head.build_example(strange)
            except DataError as error:
                if f"{name!r}" not in str(error):
                    raise CheckFailed(
                        f"head {subject.name}: {what} is refused without the field {name!r}: {error}"
                    ) from error
            except Exception as error:
                raise CheckFailed(
                    f"head {subject.name}: build_example of {what} in {name!r} raises {type(error).__name__}: {error}; "
                    "give a row, or a DataError that names the field"
                ) from error
    return f"long text and {len(HARD)} strange ones in {', '.join(names)}"


def _check_fields(subject: HeadSubject, fields: Any) -> None:
    for name, field in fields.items():
        if not isinstance(field, FieldSpec) or field.kind not in get_args(FieldKind):
            raise CheckFailed(f"head {subject.name}: fields() says {field!r} of {name!r}; expected a FieldSpec")
        target = TARGETS.get(field.kind)
        if target and getattr(fields.get(field.of), "kind", None) != target:
            raise CheckFailed(
                f"head {subject.name}: the field {name!r} holds {field.kind} of {field.of!r}, which is no field of "
                f"kind {target!r}"
            )
        if not field.help.strip():
            raise CheckFailed(f"head {subject.name}: the field {name!r} has no help")


def _faults(fields: Any, good: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    wrong: dict[str, list[Any]] = {
        "text": [None, 7, "", " \n", ["a"]],
        "words": [None, "a b", [], ["a", " "], ["a", 1]],
        "class": [None, 0, "no such label"],
        "classes": [None, "no such label", ["no such label"]],
        "number": [None, "1", float("nan"), True],
        "tags": [None, ["no such label"], "O"],
        "span": [None, [0], [0, 10**6], [2, 1], "0-1"],
        "spans": [None, [[0, 10**6]], [0, 1]],
    }
    for name, field in fields.items():
        yield name, None, "missing"
        for value in wrong[field.kind]:
            yield name, value, repr(value)
        if field.kind == "tags":
            yield name, [*good[name], good[name][0]], "one too many"


def _refusal(subject: HeadSubject, record: Any) -> str | None:
    try:
        head_objective(subject.name, subject.head).check_corpus(as_corpus([record]))
    except DataError as error:
        return str(error)
    return None


def _build(subject: HeadSubject, record: dict[str, Any], how: str) -> Example:
    try:
        return subject.head.build_example(record)
    except Exception as error:
        raise CheckFailed(
            f"head {subject.name}: build_example of a record with {how} ({', '.join(record)}) raises "
            f"{type(error).__name__}: {error}; fields() names what may be read, and labels may be missing"
        ) from error


def _alike(a: Example, b: Example) -> bool:
    return set(a) == set(b) and all(np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in a)


def _with_text(record: dict[str, Any], fields: Any, name: str, text: str) -> dict[str, Any]:
    """The record with another text, and with labels that fit it."""
    words = fields[name].kind == "words"
    record[name] = text.split() or [text] if words else text
    for other, field in fields.items():
        if field.of == name and field.kind == "tags":
            record[other] = [record[other][0]] * len(record[name])
        elif field.of == name:
            record[other] = [0, 1] if field.kind == "span" else [[0, 1]]
    return record
