"""gigatoken may be used only where its ids are those of tokenizers."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from megalm.data.sentences import split_sentences
from megalm_plugins.tokenizers import fast_bpe as module
from megalm_plugins.tokenizers.byte import ByteTokenizer
from megalm_plugins.tokenizers.hf import HFConfig, HFTokenizer

_PIECES = [
    *(
        "the ",
        "quick. ",
        "Fox's ",
        "don't ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "3.14 ",
        "2024",
        "1,000 ",
        "$x_1 = {a: [1]};",
        "# ",
    ),
    *(
        "\u3000",
        "中文",
        "三国演义\u3002",
        "話說天下",
        "ひら",
        "カナ",
        "한국어 ",
        "Ünï ",
        "e\u0301",
        "ß",
        "ſ",
        "İ",
        "Русский ",
        "ไทย",
    ),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "🏳️\u200d🌈",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "\x00",
        "\x1b[0m",
        "\u2028",
        "\U0010ffff",
        "\ue000",
    ),
    *(
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "    def f(x):\n\treturn x**2\n",
        "a" * 40,
        " " * 40,
        "é" * 20,
        "-" * 30,
        "\r\n",
        "'LL ",
    ),
]


def mixed(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(_PIECES, k=rng.randint(0, 120))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    trained = HFTokenizer.train(mixed(1, 400), HFConfig(vocab_size=900))
    return HFTokenizer(trained._text, "trained")


@pytest.fixture(params=["fast", "reference"])
def engine(request, tokenizer, monkeypatch):
    if request.param == "fast":
        pytest.importorskip("gigatoken")
    else:
        monkeypatch.setenv("MEGALM_BPE", "tokenizers")
    return HFTokenizer(tokenizer._text, "again")


def flat(parts):
    return [index for document in parts for segment in document for index in segment]


def test_documents_are_the_segments_of_the_reference(engine):
    texts = mixed(2, 700)
    for documents in ([split_sentences(text) for text in texts], [[text] for text in texts], []):
        expected = engine.encode_segments(documents)
        ids, lengths = engine.encode_documents(documents)
        assert ids.tolist() == flat(expected)
        assert lengths.tolist() == [len(segment) for document in expected for segment in document]


def test_the_fast_engine_is_what_ran(tokenizer):
    pytest.importorskip("gigatoken")
    found = HFTokenizer(tokenizer._text, "again")
    found.encode_documents([["text"]])
    assert isinstance(found._fast, module.FastBPE)


def test_a_batch_whose_sample_differs_is_encoded_by_the_reference(tokenizer, monkeypatch):
    found = HFTokenizer(tokenizer._text, "again")
    wrong = module.FastBPE(lambda: lambda text: np.zeros(len(text), dtype=np.uint32), found.encode_batch)
    found._fast = wrong
    documents = [[text] for text in mixed(3, 20) if text]
    with pytest.warns(UserWarning, match="gigatoken gives other ids"):
        ids, _ = found.encode_documents(documents)
    assert ids.tolist() == flat(found.encode_segments(documents))


def test_characters_that_one_library_does_not_know(engine, campaign_seed):
    """The engines know different versions of Unicode; one takes U+323B0 for a letter, after which 't is apart."""
    draw = random.Random(campaign_seed)
    newest = [*range(0x1C80, 0x1C90), *range(0xA7CB, 0xA7F2), *range(0x10940, 0x1095A), *range(0x323B0, 0x33480, 40)]
    points = [*newest, *(draw.randrange(1, 0xD800) for _ in range(300)), *draw.choices(range(0xE000, 0x110000), k=300)]
    documents = [[f"{chr(point)}'t a{chr(point)} 1{chr(point)}", "plain 中文 text"] for point in points]
    ids, lengths = engine.encode_documents(documents)
    expected = engine.encode_segments(documents)
    assert ids.tolist() == flat(expected)
    assert lengths.tolist() == [len(segment) for document in expected for segment in document]


def test_which_texts_are_left_to_the_reference():
    texts = ["plain", "中文 😀 é", "\u0378", "", "\U0003ffff", "a\U000323b0b", "\ue000"]
    assert set(module.doubtful(texts)) - {5} == {2, 4}
    assert module.doubtful([]) == []


def test_empty_documents_have_no_tokens(engine):
    """Alone, among others, and in sentences of which some are empty."""
    for documents in ([[""]], [["", ""]], [[""], ["a b"], [""], [""], ["c"], [""]], [["", "a ", ""], [""], ["é"]]):
        ids, lengths = engine.encode_documents(documents)
        expected = engine.encode_segments(documents)
        assert ids.tolist() == flat(expected)
        assert lengths.tolist() == [len(segment) for document in expected for segment in document]
        assert np.issubdtype(lengths.dtype, np.integer)


def test_an_engine_that_fails_the_probes_is_not_used(tokenizer):
    gigatoken = pytest.importorskip("gigatoken")
    content = json.loads(tokenizer._text)

    def shifted(texts):
        return [[i + 1 for i in ids] for ids in tokenizer.encode_batch(texts)]

    with pytest.warns(UserWarning, match="it is not used"):
        assert module.fast_bpe(content, [], shifted) is None
    assert gigatoken is not None
    assert module.fast_bpe({"model": {"type": "none"}}, [], tokenizer.encode_batch) is None


def test_it_forgets(tokenizer, monkeypatch):
    loads = []

    def load():
        loads.append(1)
        return lambda text: np.array(tokenizer.encode_batch([text.decode()])[0])

    monkeypatch.setattr(module, "_FORGET_BYTES", 100)
    engine = module.FastBPE(load, tokenizer.encode_batch)
    for _ in range(5):
        assert engine.encode(["x" * 60]) is not None
    assert len(loads) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_other_tokenizers_go_the_slow_way(tokenizer, change):
    found = HFTokenizer(json.dumps(json.loads(tokenizer._text) | change), "changed")
    documents = [split_sentences(text) for text in mixed(4, 30)]
    ids, lengths = found.encode_documents(documents)
    assert "_fast" not in vars(found), "the fast engine is not even looked for"
    assert ids.tolist() == flat(found.encode_segments(documents))
    assert int(lengths.sum()) == len(ids)


def test_bytes_as_arrays():
    documents = [split_sentences(text) for text in mixed(5, 50)]
    ids, lengths = ByteTokenizer().encode_documents(documents)
    expected = ByteTokenizer().encode_segments(documents)
    assert ids.tolist() == flat(expected)
    assert lengths.tolist() == [len(segment) for document in expected for segment in document]

    class Deaf(ByteTokenizer):
        def encode_batch(self, texts):
            return [[1] for _ in texts]

    assert Deaf().encode_documents([["a", "b"], ["c"]])[0].tolist() == [1, 1, 1]
