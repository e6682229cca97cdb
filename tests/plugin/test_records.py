"""Records are refused by field, with the value, and accepted where they are right."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.errors import DataError
from megalm.plugin.contract.records import FieldSpec, check_record, record_problems

LABELS = ("one", "two")
FIELDS = {
    "text": FieldSpec("text", "a text"),
    "words": FieldSpec("words", "words"),
    "class": FieldSpec("class", "a class", label=True),
    "classes": FieldSpec("classes", "classes", label=True),
    "number": FieldSpec("number", "a number", label=True),
    "tags": FieldSpec("tags", "tags", of="words", label=True),
    "span": FieldSpec("span", "a span", of="text", label=True),
    "spans": FieldSpec("spans", "spans", of="text", label=True),
}
GOOD: dict[str, Any] = {
    "text": "a text",
    "words": ["a", "text"],
    "class": "two",
    "classes": ["one"],
    "number": -1,
    "tags": ["one", "one"],
    "span": [2, 6],
    "spans": [[0, 1], [2, 6]],
    "something else": object(),
}


def test_a_good_record() -> None:
    assert record_problems(GOOD, FIELDS, LABELS) == []
    check_record({**GOOD, "classes": [], "spans": [], "number": 0.5}, FIELDS, LABELS)


def test_labels_may_be_missing_where_they_are_not_needed() -> None:
    bare = {"text": "a text", "words": ["a"]}
    assert record_problems(bare, FIELDS, LABELS, labelled=False) == []
    missing = record_problems(bare, FIELDS, LABELS)
    assert missing == [f"field {n!r} is missing; it holds {FIELDS[n].help}" for n in FIELDS if FIELDS[n].label]
    wrong = record_problems({**bare, "class": "three"}, FIELDS, LABELS, labelled=False)
    assert wrong == ["field 'class': expected one of 'one, two', found 'three'"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text", 3, "expected text, found 3"),
        ("text", " \n", "text that is not blank, found"),
        ("words", "a text", "expected a list of words, found 'a text'"),
        ("words", [], "expected a list of words, found []"),
        ("words", ["a", ""], "words that are not blank, found ''"),
        ("class", "tow", "found 'tow'; did you mean \"two\"?"),
        ("class", 1, "expected one of 'one, two', found 1"),
        ("classes", "one", "expected a list of labels, found 'one'"),
        ("classes", ["one", "three"], "found 'three'"),
        ("classes", ["one", "one"], "names a label twice"),
        ("number", True, "expected a finite number, found True"),
        ("number", float("inf"), "expected a finite number, found inf"),
        ("number", "1", "expected a finite number, found '1'"),
        ("tags", ["one"], "1 labels for the 2 words of 'words'"),
        ("tags", ["one", "x"], "found 'x'"),
        ("tags", "one", "expected a list of labels, one for each word of 'words'"),
        ("span", [2, 2], "characters within the 6 of 'text', at least one"),
        ("span", [0, 7], "characters within the 6 of 'text'"),
        ("span", [False, True], "expected [start, stop], characters of 'text'"),
        ("spans", [0, 1], "expected [start, stop], characters of 'text', found 0"),
        ("spans", [[-1, 1]], "characters within the 6 of 'text'"),
    ],
)
def test_a_bad_value_is_named(field: str, value: Any, message: str) -> None:
    problem = record_problems({**GOOD, field: value}, FIELDS, LABELS)[0]
    assert problem.startswith(f"field {field!r}: ")
    assert message in problem


def test_everything_is_said_at_once() -> None:
    with pytest.raises(DataError) as caught:
        check_record({**{k: v for k, v in GOOD.items() if k != "text"}, "txt": "x", "number": None}, FIELDS, LABELS)
    assert "field 'text' is missing; it holds a text; did you mean \"txt\"?" in str(caught.value)
    assert "; field 'number': expected a finite number, found None" in str(caught.value)
    assert record_problems(["a"], FIELDS, LABELS) == ["expected fields with values, found ['a']"]
    (long,) = record_problems({**GOOD, "number": "x" * 999}, FIELDS, LABELS)
    assert len(long) < 150
