"""Streams of documents as blocks: against the token store that ``prepare`` makes of the same documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.settings import Settings
from megalm.data.prepare import prepare
from megalm.data.store import TokenStore
from megalm.data.stream import Block, Place, Stream, read_blocks, unpacked
from megalm.errors import DataError
from megalm.parallel import rng
from megalm.plugin.contract.source import StreamSource
from megalm_plugins.tokenizers.byte import ByteTokenizer


class Texts(StreamSource):
    """A list of documents, and how often they were asked for."""

    def __init__(self, texts: list[Any]) -> None:
        super().__init__(Settings())
        self.texts = texts
        self.asked: list[int] = []

    @property
    def identity(self) -> str:
        return "a list"

    def documents(self, skip: int) -> Iterator[str]:
        self.asked.append(skip)
        return iter(self.texts[skip:])


@pytest.fixture(scope="module")
def byte() -> ByteTokenizer:
    return ByteTokenizer.train([], ByteTokenizer.Config())


def drawn(seed: int, documents: int) -> list[str]:
    draw = rng.generator("streamed text", seed)
    return [
        " ".join("".join(draw.choice(list("abc"), size=int(n))) + "." for n in draw.integers(1, 9, size=int(k))).title()
        for k in draw.integers(1, 12, size=documents)
    ]


def joined(blocks: list[Block]) -> np.ndarray:
    return np.concatenate([block.stream(0, block.num_tokens) for block in blocks])


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("block", [1, 50, 333, 1 << 20])
def test_blocks_are_the_store_of_the_same_documents(
    block: int, sentences: bool, tmp_path: Path, byte: ByteTokenizer, campaign_seed: int
) -> None:
    texts = drawn(campaign_seed, 40)
    (tmp_path / "text.txt").write_text("\n\n".join(texts) + "\n")
    prepare([tmp_path / "text.txt"], byte, tmp_path / "data", component="byte", validation=0.0, sentences=sentences)
    store = TokenStore.open(tmp_path / "data", "train")
    blocks = list(read_blocks(Stream(Texts(texts), block, sentences, 1), byte, Place()))
    assert np.array_equal(joined(blocks), store.stream(0, store.num_tokens))
    assert sum(each.num_documents for each in blocks) == store.num_documents == len(texts)
    assert sum(each.num_sentences for each in blocks) == store.num_sentences
    tokens = documents = spoken = 0
    for each in blocks:
        assert each.num_tokens >= block or each is blocks[-1]
        whole = store.document_offsets(documents, documents + each.num_documents + 1)
        assert np.array_equal(each.document_offsets(0, each.num_documents + 1), whole - tokens)
        for index in range(each.num_documents):
            assert [tokens + at for at in each.document(index)] == list(store.document(documents + index))
            assert each.document_at(each.document(index)[0]) == index
        for index in range(each.num_sentences):
            assert [tokens + at for at in each.sentence(index)] == list(store.sentence(spoken + index))
            assert each.sentence_at(each.sentence(index)[1] - 1) == index
        tokens += each.num_tokens
        documents += each.num_documents
        spoken += each.num_sentences


def test_a_block_survives_being_sent(byte: ByteTokenizer) -> None:
    for block in read_blocks(Stream(Texts(drawn(1, 20)), 60, True, 1), byte, Place()):
        found = unpacked(*block.packed(), block.eos)
        assert (found.begin, found.end) == (block.begin, block.end)
        for name in ("tokens", "documents", "firsts", "sentences"):
            assert np.array_equal(getattr(found, name), getattr(block, name)), name


def test_reading_goes_on_where_any_block_begins(byte: ByteTokenizer) -> None:
    """Documents without text count, so that what is skipped is what the source calls a document."""
    texts = [text for pair in zip(drawn(2, 30), [""] * 30, strict=True) for text in pair]
    stream = Stream(Texts(texts), 70, False, 3)
    whole = list(read_blocks(stream, byte, Place()))
    for before, after in itertools.pairwise(whole):
        # Nothing but a document without text may be between them, at the end of an epoch.
        assert after.begin in (before.end, Place(before.end.epoch + 1)), (before.end, after.begin)
    assert {block.begin.epoch for block in whole} == {0, 1, 2}
    for number, block in enumerate(whole):
        rest = list(read_blocks(stream, byte, block.begin))
        assert np.array_equal(joined(rest), joined(whole[number:]))
    once = list(read_blocks(Stream(Texts(texts), 70, False, 1), byte, Place()))
    assert np.array_equal(joined(whole), np.tile(joined(once), 3))


def test_a_stream_that_ends_with_its_last_block_begins_anew(byte: ByteTokenizer) -> None:
    texts = ["abc", "def"]
    places = [block.begin for block in read_blocks(Stream(Texts(texts), 1, False, 2), byte, Place())]
    assert places == [Place(0, 0), Place(0, 1), Place(1, 0), Place(1, 1)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "a list has no documents with text"),
        (["", ""], "a list has no documents with text"),
        (["a", {"text": "b"}], "document 1 of a list is of type dict, expected str"),
    ],
)
def test_what_is_no_text_is_refused(texts: list[Any], message: str, byte: ByteTokenizer) -> None:
    with pytest.raises(DataError, match=message):
        list(read_blocks(Stream(Texts(texts), 1 << 20, False, 0), byte, Place()))
