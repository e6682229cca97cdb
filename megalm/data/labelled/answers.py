"""Answers as question answering data sets give them, as spans of the text.

They are a text and the place where it begins. Some places are wrong in every large data set; the text is then looked
for, and the occurrence nearest to that place is taken and counted. An answer that does not occur is an error.
"""

from __future__ import annotations

from typing import Any

from megalm.data.labelled.request import RowError


def answer_span(context: str, text: Any, start: Any) -> tuple[list[int], bool]:
    """``[start, stop]`` of an answer in characters of the context, and whether its place was mended. RowError where
    there is none.
    """
    if not isinstance(text, str) or not text.strip():
        raise RowError("an answer without text", f"expected an answer's text, found {text!r}")
    if type(start) is not int:
        raise RowError("an answer without a place", f"expected the character where {text!r} begins, found {start!r}")
    inside = text.strip()
    start += text.index(inside)
    if start >= 0 and context.startswith(inside, start):
        return [start, start + len(inside)], False
    places, at = [], context.find(inside)
    while at >= 0:
        places.append(at)
        at = context.find(inside, at + 1)
    if not places:
        raise RowError("an answer that is not in the text", f"the answer {text!r} does not occur in the context")
    nearest = min(places, key=lambda place: (abs(place - start), place))
    return [nearest, nearest + len(inside)], True


def answer_spans(context: Any, texts: Any, starts: Any) -> tuple[list[list[int]], int]:
    """Spans of parallel lists of answers, each span once, and how many were mended."""
    if not isinstance(context, str):
        raise RowError("no context", f"expected the context's text, found {context!r}")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise RowError("answers that do not fit", "expected a list of texts and one of as many places")
    spans: list[list[int]] = []
    mended = 0
    for text, start in zip(texts, starts, strict=True):
        span, wrong = answer_span(context, text, start)
        mended += wrong
        if span not in spans:
            spans.append(span)
    return spans, mended
