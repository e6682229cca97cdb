from __future__ import annotations

import random

import pytest

from megalm.data.sentences import split_sentences

CASES = {
    "It rains. We stay! Do we? Yes.": ["It rains.", "We stay!", "Do we?", "Yes."],
    'He said "Go." Then he left.': ['He said "Go."', "Then he left."],
    "Mr. Smith met J. Doe at 3.14 p.m. sharp.": ["Mr. Smith met J. Doe at 3.14 p.m. sharp."],
    "So it was I. And you?": ["So it was I.", "And you?"],
    "Wait... what? Well... No.": ["Wait... what?", "Well...", "No."],
    "今天下雨。我们走吧！“好吗？”他说。": ["今天下雨。", "我们走吧！", "“好吗？”", "他说。"],
    "Wrapped\nline goes on. Next": ["Wrapped\nline goes on.", "Next"],
    "A heading\n\nThen text.": ["A heading", "Then text."],
    "Hm.\n\n\n": ["Hm."],
    "no end": ["no end"],
    "...": ["..."],
}


@pytest.mark.parametrize("text", CASES)
def test_known_cases(text):
    assert [piece.strip() for piece in split_sentences(text)] == CASES[text]


def test_pieces_partition_any_text():
    rng = random.Random(7)
    alphabet = 'aA. .!?。！…"”\n\n \tMr.9é'
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 40)))
        pieces = split_sentences(text)
        assert "".join(pieces) == text
        assert text.isspace() or not any(piece.isspace() or not piece for piece in pieces), repr(text)


def test_white_space_goes_to_the_later_sentence():
    assert split_sentences("One.  Two.\n\nThree.") == ["One.", "  Two.", "\n\nThree."]
