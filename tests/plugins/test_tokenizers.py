"""First-party tokenizers against the libraries' own interfaces, and against Python's codec for bytes."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers

from megalm.api import Tokenizer, begins_word
from megalm.data.sentences import split_sentences
from megalm.errors import TokenizerError
from megalm_plugins.tokenizers import MEGALM_API, megalm_tokenizers
from megalm_plugins.tokenizers.byte import ByteTokenizer
from megalm_plugins.tokenizers.hf import HFConfig, HFTokenizer
from megalm_plugins.tokenizers.segments import cut_at_segments
from megalm_plugins.tokenizers.sentencepiece import SentencePieceConfig, SentencePieceTokenizer

WORDS = [
    "the",
    "a",
    "king",
    "queen",
    "Rome",
    "sword.",
    "Where",
    "come",
    "Wörld",
    "中文",
    "night;",
    "day!",
    "help,",
    "help:",
    "said",
    "yes?",
    "kings",
    "queens",
    "nightly",
    "day's",
    "unkingly",
    "再见。",
    "12",
    "1999",
    "(so)",
    '"quoted"',
    "and",
]
WORDS += ["".join(random.Random(i).choices(["ba", "ke", "lo", "mi", "nus", "ing"], k=2 + i % 3)) for i in range(200)]
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(400)]
TEXTS = [
    "Where is the king? He said: “No!” Then nightly  queens\n\n came, in 1999.",
    "再见。中文！你好 world",
    "unseen žluťoučký 😀 \t tab",
    "a",
    "</s> [MASK] <mask> <eos> <|endoftext|> text is text",
    *CORPUS[:20],
]


@pytest.fixture(scope="module")
def unigram():
    return SentencePieceTokenizer.train(CORPUS, SentencePieceConfig(vocab_size=420))


@pytest.fixture(scope="module")
def bpe():
    return HFTokenizer.train(CORPUS, HFConfig(vocab_size=400))


@pytest.fixture(scope="module")
def wordpiece():
    return HFTokenizer.train(CORPUS, HFConfig(vocab_size=200, model="wordpiece"))


@pytest.fixture(scope="module", params=["byte", "unigram", "sp-bpe", "bpe", "wordpiece"])
def tokenizer(request):
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "sp-bpe":
        return SentencePieceTokenizer.train(CORPUS, SentencePieceConfig(vocab_size=420, model="bpe"))
    return request.getfixturevalue(request.param)


def test_components():
    assert MEGALM_API == (1, 0)
    assert [c.name for c in megalm_tokenizers()] == ["byte", "sentencepiece", "hf"]
    assert all(c.summary for c in megalm_tokenizers())


def test_all_special_tokens_exist_and_never_come_from_text(tokenizer):
    special = tokenizer.special
    roles = [special.pad, special.eos, special.bos, special.cls, special.sep, special.mask]
    assert None not in roles
    assert len(set(roles)) == 6
    assert all(0 <= i < tokenizer.vocab_size for i in special.ids())
    names = [tokenizer.token(i) for i in special.ids()]
    for ids in tokenizer.encode_batch([" ".join(names), "".join(names), *names, *TEXTS]):
        assert not set(ids) & set(roles)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_round_trip(tokenizer, wordpiece):
    for text in TEXTS:
        ids = tokenizer.encode_batch([text])[0]
        special = tokenizer.special
        marked = [special.bos, special.cls, *ids, special.sep, special.pad, special.mask, special.eos]
        assert tokenizer.decode(marked) == tokenizer.decode(ids)
        if tokenizer is not wordpiece:
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch([""]) == [[]]
    assert tokenizer.decode([]) == ""


def test_every_id_has_a_printable_form(tokenizer):
    assert all(isinstance(tokenizer.token(i), str) and tokenizer.token(i) for i in range(tokenizer.vocab_size))


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = type(tokenizer).load(tmp_path)
    assert again.identity == tokenizer.identity
    assert again.special == tokenizer.special
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_segments_do_not_change_the_tokens(tokenizer):
    documents = [split_sentences(text) for text in TEXTS]
    for text, segments, ids in zip(TEXTS, documents, tokenizer.encode_segments(documents), strict=True):
        assert len(ids) == len(segments)
        assert [i for piece in ids for i in piece] == tokenizer.encode_batch([text])[0]
        if tokenizer.decode([i for piece in ids for i in piece]) == text:
            pieces = [tokenizer.decode(piece).strip() for piece in ids]
            assert pieces == [segment.strip() for segment in segments]


def test_cut_at_segments():
    assert cut_at_segments([1, 2, 3, 4], [0, 2, 2, 5], ["ab", "c", "def"]) == [[1], [2, 3], [4]]
    assert cut_at_segments([1, 2], [0, 1], ["abc", "d", "e"]) == [[1, 2], [], []]
    assert cut_at_segments([], [], ["a", "b"]) == [[], []]


def test_bytes_are_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_batch(["aé中"]) == [list("aé中".encode())]
    assert tokenizer.vocab_size == 262
    assert (tokenizer.special.pad, tokenizer.special.eos, tokenizer.special.mask) == (256, 257, 261)
    assert tokenizer.decode([0xE4, 0xB8, 257, 97]) == "\ufffda"
    assert tokenizer.token(257) == "<eos>"
    assert tokenizer.identity == "a95386e70337aac6029708841b336728a5f913ab253b1eeb2e50ccde1a0a0166"


def test_sentencepiece_equals_its_own_api(unigram, tmp_path):
    unigram.save(tmp_path)
    (file,) = tmp_path.iterdir()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert unigram.encode_batch(TEXTS) == [sp.encode(text) for text in TEXTS]
    assert unigram.vocab_size == sp.get_piece_size() == 420
    special = unigram.special
    assert (special.pad, special.eos, special.bos) == (sp.pad_id(), sp.eos_id(), sp.bos_id())
    assert sp.id_to_piece(special.mask) == "<mask>"
    assert SentencePieceTokenizer.load(file).identity == unigram.identity


def test_sentencepiece_models_of_others_have_the_special_tokens_that_they_have(tmp_path):
    prefix = str(tmp_path / "m")
    common = {"vocab_size": 60, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_prefix=prefix, **common)
    plain = SentencePieceTokenizer.load(tmp_path / "m.model")
    assert (plain.special.unk, plain.special.bos, plain.special.eos) == (0, 1, 2)
    assert (plain.special.pad, plain.special.cls, plain.special.sep, plain.special.mask) == (None,) * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=prefix,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        control_symbols=["[CLS]", "[SEP]"],
        user_defined_symbols=["[MASK]"],
        **common,
    )
    albert = SentencePieceTokenizer.load(tmp_path / "m.model")
    assert (albert.special.pad, albert.special.bos, albert.special.eos) == (0, None, None)
    names = [albert.token(i) for i in (albert.special.cls, albert.special.sep, albert.special.mask)]
    assert names == ["[CLS]", "[SEP]", "[MASK]"]


def test_sentencepiece_refusals(tmp_path):
    for content, message in ((b"", "is empty"), (b"junk", "not a SentencePiece model"), (bytes(50), "not a|without")):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=rf"x\.model: .*({message})"):
            SentencePieceTokenizer.load(tmp_path / "x.model")
    with pytest.raises(TokenizerError, match="cannot be read"):
        SentencePieceTokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match=r"vocab_size 9000: .*too high"):
        SentencePieceTokenizer.train(CORPUS, SentencePieceConfig(vocab_size=9000))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_hf_equals_transformers(request, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    mine = request.getfixturevalue(kind)
    mine.save(tmp_path)
    (file,) = tmp_path.iterdir()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    plain = [text for text in TEXTS if "</s>" not in text]
    assert mine.encode_batch(plain) == theirs(plain, add_special_tokens=False)["input_ids"]
    assert mine.vocab_size == len(theirs)


def test_trained_wordpiece_is_berts_algorithm(wordpiece, tmp_path):
    """Greedy longest match, written out."""
    vocab = wordpiece._hf.get_vocab()
    for word in [w.lower() for w in WORDS if w.isascii() and w.isalpha()] + ["kingqueen", "nightnight", "zzz"]:
        pieces, start = [], 0
        while start < len(word):
            end = next((e for e in range(len(word), start, -1) if ("##" * (start > 0) + word[start:e]) in vocab), None)
            if end is None:
                pieces = ["[UNK]"]
                break
            pieces.append("##" * (start > 0) + word[start:end])
            start = end
        assert wordpiece.encode_batch([word])[0] == [vocab[p] for p in pieces]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}),
        (["<|endoftext|>"], {"eos": 0}),
        (
            ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            {"bos": 0, "cls": 0, "pad": 1, "eos": 2, "sep": 2, "unk": 3, "mask": 4},
        ),
        (["<|begin_of_text|>", "<|end_of_text|>"], {"bos": 0, "eos": 1}),
        ([], {}),
    ],
)
def test_hf_recognises_common_names(names, expected, tmp_path):
    other = tokenizers.Tokenizer(models.WordLevel({**{n: i for i, n in enumerate(names)}, "x": 20}, unk_token="x"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.add_special_tokens(names)
    other.enable_padding(length=8)
    other.enable_truncation(2)
    path = tmp_path / "tokenizer.json"
    other.save(str(path))
    mine = HFTokenizer.load(path)
    found = {r: i for r, i in vars(mine.special).items() if i is not None}
    assert found == expected
    assert mine.vocab_size == 21
    assert mine.encode_batch(["x x x"]) == [[20, 20, 20]]


def test_hf_identity_is_of_what_decides_ids(bpe, tmp_path):
    content = json.loads(bpe._text)

    def identity(**changes):
        return HFTokenizer(json.dumps({**content, **changes}, indent=3), "x").identity

    assert identity() == bpe.identity
    assert identity(truncation={"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}) == (
        bpe.identity
    )
    assert identity(normalizer={"type": "Lowercase"}) != bpe.identity
    assert identity(model={**content["model"], "merges": content["model"]["merges"][:-1]}) != bpe.identity


def test_hf_identity_is_the_hash_of_sorted_json():
    """Stores hold it: whatever way it is computed, it stays this."""
    tokens = ["z", "\xff", "a", "\u0120the", "\u4e2d", "\uffff", "\U0001f600", "\u0120", "aa", '"', "\x00", "\ue000"]
    decides = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {token: id for id, token in enumerate(tokens)}, "unk_token": "z"},
    }
    canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"))
    found = HFTokenizer(json.dumps(decides | {"decoder": None, "truncation": None}, ensure_ascii=False), "x").identity
    assert found == hashlib.sha256(b"hf 1\0" + canonical.encode()).hexdigest()
    assert found == "3897b664b57d9f81258a34469e002609f9bbac47e7fef42fcfc5d74cbac3d6b6"


@pytest.mark.parametrize("added", [[], ["<new>", "<pad>"]])
@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 3, "b": 7}, unk_token="a"),
        models.WordPiece({"a": 0, "##a": 9, "[UNK]": 4}, unk_token="[UNK]"),
        models.BPE({"a": 0, "b": 1, "ab": 5}, [("a", "b")]),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.5)], 0, False),
    ],
    ids=lambda model: type(model).__name__,
)
def test_hf_vocabulary_reaches_to_the_largest_id(model, added):
    other = tokenizers.Tokenizer(model)
    other.add_special_tokens(added)
    assert HFTokenizer(other.to_str(), "x").vocab_size == max(other.get_vocab(with_added_tokens=True).values()) + 1


def test_hf_refusals(tmp_path):
    path = tmp_path / "t.json"
    for content in (b"", b"{", b"[]", b'{"model": 1}', b'{"version": "1.0", "model": {"type": "Nope"}}'):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=r"t\.json: not a tokenizer\.json"):
            HFTokenizer.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        HFTokenizer.load(path)
    with pytest.raises(TokenizerError, match="vocab_size 20 is too small"):
        HFTokenizer.train(CORPUS, HFConfig(vocab_size=20, model="wordpiece"))


TRAIN = """
import sys, json
from megalm_plugins.tokenizers.hf import HFConfig, HFTokenizer
from megalm_plugins.tokenizers.sentencepiece import SentencePieceConfig, SentencePieceTokenizer
corpus = json.load(sys.stdin)
for model in ("bpe", "wordpiece"):
    print(HFTokenizer.train(iter(corpus), HFConfig(vocab_size=330, model=model)).identity)
print(SentencePieceTokenizer.train(iter(corpus), SentencePieceConfig(vocab_size=420)).identity)
"""


def test_training_is_repeatable_in_other_processes():
    """The libraries number things by hash maps that differ from process to process, and by number of threads."""
    found = set()
    for threads in ("1", "3"):
        env = {"RAYON_NUM_THREADS": threads, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN], input=json.dumps(CORPUS), capture_output=True, text=True, env=env, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1
    assert len(found.pop().split()) == 3


def test_identities_differ(unigram, bpe, wordpiece):
    identities = {t.identity for t in (unigram, bpe, wordpiece, ByteTokenizer())}
    assert len(identities) == 4
    assert all(len(i) == len(hashlib.sha256().hexdigest()) for i in identities)


def test_text_that_a_tokenizer_has_no_token_for_is_the_users(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.Tokenizer(model).to_str(), encoding="utf-8")
    tokenizer = HFTokenizer.load(path)
    assert tokenizer.encode_batch(["a"]) == [[0]]
    with pytest.raises(TokenizerError, match=r"hf: cannot encode the text: .*UNK"):
        tokenizer.encode_batch(["b"])
    with pytest.raises(TokenizerError, match="a token for what it does not know"):
        tokenizer.encode_segments([["a", "b"]])


def test_words_begin_where_they_do(tokenizer, wordpiece):
    """Ids that begin a word cut a text into its words and marks."""
    text = "the king, banished mercutio hereafter. tomorrow creeps; the petty pace"
    (ids,) = tokenizer.encode_batch([text])
    starts = tokenizer.word_starts()
    assert starts.dtype == bool
    assert len(starts) == tokenizer.vocab_size
    groups: list[list[int]] = []
    for at, index in enumerate(ids):
        if at == 0 or starts[index]:
            groups.append([])
        groups[-1].append(index)
    words = re.findall(r"\w+|[^\w\s]", text.lower() if tokenizer is wordpiece else text)
    found = [word for group in groups if (word := tokenizer.decode(group).strip())]
    assert len(found) == len(words)
    assert all(mine in (word, "[UNK]") for mine, word in zip(found, words, strict=True))
    assert len(groups) < len(ids)


def test_characters_of_chinese_are_words(bpe):
    (ids,) = ByteTokenizer().encode_batch(["再见king"])
    assert ByteTokenizer().word_starts()[ids].tolist() == [True, False, False] * 2 + [False] * 4
    for text, starts in (("привет", [True, False] * 6), ("漢", [True, False, False])):
        (ids,) = bpe.encode_batch([text])
        if len(ids) == len(text.encode()):
            assert bpe.word_starts()[ids].tolist() == starts
    assert all(begins_word(text) for text in ("再", "か", " k", ",", ""))
    assert not any(begins_word(text) for text in ("k", "é", "3", "\u0301"))


@pytest.mark.parametrize(
    ("cls", "engines"),
    [
        (ByteTokenizer, set()),
        (HFTokenizer, {"tokenizers", "gigatoken"}),
        (SentencePieceTokenizer, {"sentencepiece"}),
    ],
)
def test_libraries_that_compute_ids_are_named(cls: type[Tokenizer], engines: set[str]) -> None:
    """Else pieces of an unfinished preparation would be joined with what another version of them makes."""
    assert set(cls.libraries) == engines
