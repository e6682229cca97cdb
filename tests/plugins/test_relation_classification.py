"""Relations: which tokens a row keeps, where its marks stand, and what is classified."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.errors import ConfigError, DataError
from megalm.plugin.contract.head import HeadEnv
from megalm_plugins.heads.relation_classification import RelationClassification
from megalm_plugins.tokenizers.byte import ByteTokenizer

LABELS = ("born in", "works for")


def make_head(length: int = 40, **settings: Any) -> RelationClassification:
    return RelationClassification(RelationClassification.Config(**settings), HeadEnv(ByteTokenizer(), length, LABELS))


def row(text: str, first: str, second: str, length: int = 40, **settings: Any) -> tuple[str, dict[str, Any]]:
    spans = {
        name: [text.index(word), text.index(word) + len(word)] for name, word in (("first", first), ("second", second))
    }
    example = make_head(length, **settings).build_example({"text": text, **spans, "label": "works for"})
    return bytes(example["tokens"][1:-1].tolist()).decode(), example


def test_marks_stand_around_the_spans() -> None:
    text, example = row("Ann of Ely", "Ely", "Ann")
    assert text == "#Ann# of@ Ely@"
    assert [text[place - 1] for place in example["places"]] == ["@", "#"]
    assert example["label"] == 1
    assert not example["truncated"]
    text, example = row("Ann of Ely", "Ann of Ely", "Ely", marks=("<", ">"))
    assert text == "<Ann of> Ely><"
    assert [text[place - 1] for place in example["places"]] == ["<", ">"]


def test_means_are_over_the_words_of_the_spans() -> None:
    text, example = row("Ann of Ely", "n of", "Ely", vectors="mean")
    assert text == "Ann of Ely"
    covered = [[bool(x) for x in example[name][1:-1]] for name in ("first", "second")]
    assert ["".join(c for c, own in zip(text, each, strict=True) if own) for each in covered] == ["Ann of", " Ely"]
    assert len(example["first"]) == len(example["tokens"])


def test_long_texts_keep_what_is_around_the_spans() -> None:
    text = "a" * 30 + " Ann of Ely " + "b" * 30
    found, example = row(text, "Ann", "Ely")
    assert example["truncated"]
    assert len(example["tokens"]) == 40
    assert "@ Ann@ of# Ely#" in found
    assert 8 <= found.count("a") <= 12
    assert 8 <= found.count("b") <= 14
    far = "Ann " + "c" * 99 + " Ely"
    found, example = row(far, "Ann", "Ely")
    assert found.startswith("@Ann@ c")
    assert found.endswith("c# Ely#")
    assert len(example["tokens"]) <= 40
    found, example = row("x" * 99 + " y", "x" * 99, "y")
    assert found.startswith("@x")
    assert found.endswith("# y#")
    assert len(example["tokens"]) <= 40


def test_what_cannot_be_read_or_made_is_named() -> None:
    head = make_head()
    with pytest.raises(DataError, match="field 'text': the tokenizer has no token"):
        head.build_example({"text": "  ", "first": [0, 1], "second": [0, 1]})
    with pytest.raises(DataError, match="field 'second': the tokenizer has no token for anything in ' '"):
        head.build_example({"text": " a", "first": [1, 2], "second": [0, 1]})
    with pytest.raises(ConfigError, match="expected two texts with tokens of their own"):
        make_head(marks=("@", "@"))
    with pytest.raises(ConfigError, match="leaves no room for text"):
        make_head(7)
