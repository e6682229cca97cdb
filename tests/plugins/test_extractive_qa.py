"""Extractive QA: windows that cover a context, answers in them, and spans against all pairs of places."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalm.errors import ConfigError, DataError
from megalm.plugin.contract.head import HeadEnv
from megalm.plugin.contract.objective import IGNORE
from megalm_plugins.heads.extractive_qa import ExtractiveQA
from megalm_plugins.heads.pieces import read_pieces
from megalm_plugins.tokenizers.byte import ByteTokenizer

LENGTH = 32
CONTEXT = "Ely is a city in the Fens, which are in the east of England."


def make_head(length: int = LENGTH, attention: Any = "bidirectional", **settings: Any) -> ExtractiveQA:
    return ExtractiveQA(ExtractiveQA.Config(**settings), HeadEnv(ByteTokenizer(), length, (), attention))


def record(context: str = CONTEXT, **more: Any) -> dict[str, Any]:
    return {"question": "Where?", "context": context, **more}


class Plain:
    """A context of the engine's for a model whose vectors are given."""

    def take(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))

    def dropout(self, x: torch.Tensor, p: float, site: str) -> torch.Tensor:
        return x

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scored(head: ExtractiveQA, records: list[dict[str, Any]]) -> tuple[Any, Any, torch.Tensor]:
    """(terms, predictions of the parts, logits (rows, length, 2)) where the vectors are random logits."""
    batch = head.collate([head.build_example(each) for each in records], head.env.sequence_length)
    tensors: Any = {name: torch.from_numpy(array) for name, array in batch.items()}
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(len(records), head.env.sequence_length, 2, generator=draw, dtype=torch.float64)
    ctx: Any = Plain()
    identity = torch.nn.Identity()
    return head.loss(identity, logits, tensors, ctx), head.predict(identity, logits, tensors, ctx), logits


def test_windows_cover_the_context_and_share_tokens() -> None:
    for stride, length in itertools.product((0, 3, 100), (24, 32, 50)):
        head = make_head(length, stride=stride)
        parts = [head.build_example(part) for part in head.parts(record())]
        size = length - 3 - len("Where?")
        starts = [part["from_character"][1] for part in parts]
        assert starts[0] == 0
        covered: list[int] = []
        for part in parts:
            text = bytes(part["tokens"][len("Where?") + 2 : -1].tolist()).decode()
            assert text in CONTEXT
            covered.append(len(text))
            assert len(part["tokens"]) <= length
        assert parts[-1]["to_character"][-1] == len(CONTEXT)
        assert len(parts) == 1 + max(0, -(-(len(CONTEXT) - size) // (size - min(stride, size // 2))))
        assert not any(part["truncated"] for part in parts)
    assert head.parts(record("short")) == [record("short")]
    assert make_head(24).build_example(record())["truncated"]


def test_an_answer_is_in_the_windows_that_hold_all_of_it() -> None:
    head = make_head(stride=8)
    start = CONTEXT.index("Fens")
    rows = [head.build_example(part) for part in head.parts(record(answers=[[start, start + 4], [0, 3]]))]
    held = []
    for row in rows:
        if row["start"]:
            places = slice(row["start"], row["end"] + 1)
            assert row["from_character"][places].tolist() == [start] * 5  # with the space before the word
            assert row["to_character"][row["end"]] == start + 4
        held.append(bool(row["start"]))
        whole = row["from_character"][1] <= start and row["to_character"][-1] >= start + 4
        assert whole or not row["start"]
    assert any(held)
    assert not all(held)
    assert {(row["start"], row["end"]) for row in map(head.build_example, head.parts(record(answers=[])))} == {(0, 0)}
    assert head.build_example(record())["start"] == IGNORE


def test_the_loss_is_the_cross_entropy_over_context_and_nowhere() -> None:
    head = make_head(64)
    records = [record("the Fens", answers=[[4, 8]]), record("a much longer text", answers=[]), record("unknown")]
    terms, _, logits = scored(head, records)
    first = len("Where?") + 2
    for column, (name, place) in enumerate((("start", 4), ("end", 8))):
        expected = torch.zeros((), dtype=torch.float64)
        for row, (length, right) in enumerate(((8, place), (18, 0))):
            chosen = torch.cat([logits[row, :1, column], logits[row, first : first + length, column]])
            expected = expected - F.log_softmax(chosen, dim=0)[right]
        # "the Fens": the word's tokens are those of " Fens".
        assert terms[name].sum.item() == pytest.approx(expected.item(), rel=1e-12)


def test_spans_are_the_best_of_all_pairs() -> None:
    for longest, best in ((1, 3), (4, 5), (100, 40)):
        head = make_head(64, max_answer=longest, n_best=best)
        records = [record("the Fens of Ely"), record("no"), record("中文字")]
        _, found, logits = scored(head, records)
        for row, given in enumerate(records):
            pieces = read_pieces(ByteTokenizer(), given["context"])
            first = len("Where?") + 2
            every: dict[tuple[int, int], float] = {}
            for a, b in itertools.product(range(len(pieces)), repeat=2):
                if a <= b < a + longest:
                    span = (int(pieces.starts[a]), int(pieces.stops[b]))
                    score = (logits[row, first + a, 0] + logits[row, first + b, 1]).item()
                    every[span] = max(score, every.get(span, score))
            order = sorted(every, key=lambda span: -every[span])
            joined = head.join(given, [found[row]])
            assert tuple(joined["span"]) == order[0]
            assert joined["text"] == given["context"][order[0][0] : order[0][1]]
            assert joined["score"] == pytest.approx(every[order[0]], rel=1e-12)
            assert [tuple(each["span"]) for each in joined["candidates"]] == order[:best]
            assert found[row]["no_answer"] == pytest.approx(logits[row, 0].sum().item(), rel=1e-12)


def test_windows_are_joined_by_score() -> None:
    head = make_head(n_best=2)
    parts = [
        {"no_answer": 3.0, "candidates": [{"span": [0, 3], "score": 1.0}, {"span": [4, 6], "score": 0.5}]},
        {"no_answer": 2.5, "candidates": [{"span": [21, 25], "score": 2.0}, {"span": [0, 3], "score": 1.5}]},
    ]
    found = head.join(record(), parts)
    assert (found["text"], found["span"], found["score"]) == ("Fens", [21, 25], 2.0)
    assert [(each["text"], each["score"]) for each in found["candidates"]] == [("Fens", 2.0), ("Ely", 1.5)]
    none = make_head(no_answer=True, n_best=2).join(record(), parts)
    assert (none["text"], none["span"], none["score"]) == ("", None, 2.5)
    assert make_head(no_answer=True, threshold=0.6, n_best=2).join(record(), parts)["text"] == "Fens"


def test_what_cannot_be_read_is_named() -> None:
    head = make_head(max_question=4)
    row = head.build_example({"question": "x" * 99, "context": "ab"})
    assert row["truncated"]
    assert row["tokens"].tolist().count(ord("x")) == 4
    with pytest.raises(DataError, match="field 'context': the tokenizer has no token"):
        head.build_example(record("  "))
    with pytest.raises(DataError, match="field 'answers': the tokenizer has no token for anything in ' '"):
        head.build_example(record(" ab", answers=[[0, 1]]))
    with pytest.raises(ConfigError, match="a sequence length of 4 leaves no room for text"):
        make_head(4)
    causal = make_head(attention="causal").build_example(record("ab"))
    assert causal["places"][0] == len(causal["tokens"]) - 1


def test_pieces_of_a_text() -> None:
    text = " Ann's 中文 cafés,  x  "
    pieces = read_pieces(ByteTokenizer(), text)
    words = {text[a:b] for a, b in zip(pieces.starts, pieces.stops, strict=True)}
    assert words == {"Ann", "'", "s", "中", "文", "cafés", ",", "x"}
    assert bytes(pieces.ids.tolist()).decode() == text.rstrip()
    for word in sorted(words):
        first, last = pieces.covering(text.index(word), text.index(word) + 1) or (0, 0)
        assert set(zip(pieces.starts[first:last], pieces.stops[first:last], strict=True)) == {
            (text.index(word), text.index(word) + len(word))
        }


def test_a_token_over_several_segments_stands_for_all_of_them() -> None:
    class Pairs(ByteTokenizer):
        """Two characters a token."""

        def encode_segments(self, documents: Any) -> list[list[list[int]]]:
            (segments,) = documents
            ends = np.cumsum([len(segment) for segment in segments])
            starts = range(0, ends[-1], 2)
            return [[[7 for at in starts if end - len(s) <= at < end] for s, end in zip(segments, ends, strict=True)]]

    pieces = read_pieces(Pairs(), "中文字")
    assert (pieces.starts.tolist(), pieces.stops.tolist()) == ([0, 2], [2, 3])
    assert pieces.covering(1, 2) == (0, 1)
    assert pieces.covering(1, 3) == (0, 2)
