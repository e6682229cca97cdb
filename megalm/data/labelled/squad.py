"""SQuAD-like JSON: documents with paragraphs with questions, each with answers as text and place.

Such a file is one JSON value, often on one line. So an error names the way to a question besides the line. The
library's parser says where a value ends, and so where the next begins; each level is parsed once more to learn that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.data.labelled.answers import answer_spans
from megalm.data.labelled.jsonl import MENDED, check_unicode
from megalm.data.labelled.lines import read_text
from megalm.data.labelled.records import Place, Records
from megalm.data.labelled.request import ID, Request, RowError, add
from megalm.errors import DataError

GIVES = ("question", "context", "answers")
_SPACE = re.compile(r"[ \t\n\r]*")


def read_squad(path: Path, request: Request, records: Records) -> None:
    """Add the questions of a SQuAD-like file, with ``answers`` as spans; a question without any has an empty list."""
    if missing := [name for name in request.fields if request.column(name) not in GIVES]:
        raise DataError(
            f"{path}: SQuAD-like data has {', '.join(GIVES)}, but this head reads {', '.join(missing)}; "
            "give the data as JSONL"
        )
    text = read_text(path)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line 1: not usable JSON: {error}") from None
    line, counted = 1, 0
    for node, context in _questions(path, text):
        line, counted = line + text.count("\n", counted, node.start), node.start
        place = Place(path, line, line, node.way)
        try:
            record, mended = _record(context, node.value, request)
        except RowError as error:
            add(records, request, place, error)
            continue
        add(records, request, place, record)
        if mended:
            records.mended[MENDED] += mended


@dataclass(frozen=True)
class _Node:
    """A value in the text: where it begins, what it is, and the way to it."""

    text: str
    start: int
    value: Any
    way: str

    def items(self) -> Iterator[_Node]:
        """Of a list."""
        at = _skip(self.text, self.start + 1)
        for number in range(len(self.value)):
            value, end = _DECODER.raw_decode(self.text, at)
            yield _Node(self.text, at, value, f"{self.way}[{number}]")
            at = _skip(self.text, _skip(self.text, end) + 1)

    def member(self, key: str, kind: type, path: Path) -> _Node:
        """Of an object: the member of this name, which is of this kind. DataError where there is none."""
        found = None
        at = _skip(self.text, self.start + 1)
        while isinstance(self.value, dict) and key in self.value and self.text[at] != "}":
            name, end = _DECODER.raw_decode(self.text, at)
            start = _skip(self.text, _skip(self.text, end) + 1)
            value, end = _DECODER.raw_decode(self.text, start)
            if name == key:
                found = _Node(self.text, start, value, f"{self.way}.{key}" if self.way else key)
            at = _skip(self.text, end)
            if self.text[at] == ",":
                at = _skip(self.text, at + 1)
        if found is None or not isinstance(found.value, kind):
            line = self.text.count("\n", 0, self.start) + 1
            what = "nothing" if found is None else type(found.value).__name__
            raise DataError(
                f"{path}: line {line}{', ' if self.way else ''}{self.way}: expected {key!r} with a "
                f"{'list' if kind is list else 'text'}, found {what}; SQuAD-like data is "
                "{data: [{paragraphs: [{context, qas: [{id, question, answers}]}]}]}"
            )
        return found


_DECODER = json.JSONDecoder()


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _questions(path: Path, text: str) -> Iterator[tuple[_Node, str]]:
    at = _skip(text, 0)
    root = _Node(text, at, _DECODER.raw_decode(text, at)[0], "")
    for document in root.member("data", list, path).items():
        for paragraph in document.member("paragraphs", list, path).items():
            context = paragraph.member("context", str, path).value
            for question in paragraph.member("qas", list, path).items():
                yield question, context


def _record(context: str, question: Any, request: Request) -> tuple[dict[str, Any], int]:
    if not isinstance(question, dict):
        raise RowError("not an object", f"expected an object with a question, found {type(question).__name__}")
    check_unicode([context, question])
    given: dict[str, Any] = {"context": context, "question": question.get("question")}
    mended = 0
    answers = question.get("answers")
    if answers is not None:
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise RowError("answers that do not fit", "expected 'answers' with a list of {text, answer_start}")
        texts = [answer.get("text") for answer in answers]
        starts = [answer.get("answer_start") for answer in answers]
        given["answers"], mended = answer_spans(context, texts, starts)
    record = {
        name: given[request.column(name)] for name in request.fields if given.get(request.column(name)) is not None
    }
    if ID in question:
        record[ID] = question[ID]
    return record, mended
