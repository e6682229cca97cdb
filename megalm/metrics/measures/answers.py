"""Exact match and F1 of answers, as SQuAD's evaluation has them. (Rajpurkar et al., 2016, and 2018 for no answer.)

Before comparison, texts are in lower case, without ASCII punctuation, the articles a, an and the, and further spaces.
Words are divided by spaces; a character of a script that writes none is a word, since a Chinese answer would be one
otherwise, and its F1 the exact match.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]|[^\\s\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]+"
)


def normalised(text: str) -> str:
    """The text as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(predicted: str, true: str) -> float:
    a, b = _WORD.findall(normalised(predicted)), _WORD.findall(normalised(true))
    if not a or not b:
        return float(a == b)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def _best(predicted: Sequence[str], true: Sequence[Sequence[str]], score: Callable[[str, str], float]) -> float:
    """Mean over the questions of the score against the best of its answers; "" is no answer."""
    each = [
        max(score(text, answer) for answer in (answers or [""])) for text, answers in zip(predicted, true, strict=True)
    ]
    return sum(each) / len(each) if each else 0.0


def exact_match(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> float:
    """Share of answers that equal one of the true ones; a question without any is right where "" is predicted."""
    return _best(predicted, true, lambda a, b: float(normalised(a) == normalised(b)))


def answer_f1(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> float:
    """Mean F1 over words with the nearest true answer."""
    return _best(predicted, true, _f1)
