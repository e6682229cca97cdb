"""A gallery of broken tokenizers: each is caught by the check that is meant for it, and passes when it is repaired.

The tokenizer that they are made from is the one that ``megalm new-plugin`` writes; it passes every check.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from megalm.cli.scaffold import write_plugin
from megalm.errors import ConfigError, PluginError, TokenizerError
from megalm.testing import TokenizerSuite
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.tokenizer import texts
from megalm.testing.tokenizer.checks import CHECKS
from megalm.testing.tokenizer.subject import TokenizerSubject

BY_NAME = {check.name: check for check in CHECKS}
SLOW = {"torch_free_import", "training_repeats", "damaged_files", "long_text"}
"""Run where they are meant to catch something, and on the whole tokenizer."""

HEAD = """\
import hashlib, json, random, time
import numpy as np
from megalm.api import Settings, SpecialTokens, TokenizerError
from megalm_good.tokenizer import GoodConfig, GoodTokenizer

class Broken(GoodTokenizer):
"""

GALLERY: dict[str, tuple[str, set[str], str, str]] = {
    # What is wrong: (the check, others that may notice too, part of the message, the body of the class).
    "ids in the order of a set": (
        "training_repeats",
        set(),
        "another hash seed",
        """
    @classmethod
    def train(cls, texts, cfg):
        good = super().train(texts, cfg)
        return cls(list(set(good._characters)))
""",
    ),
    "texts read twice, though an iterator can be read once": (
        "training_repeats",
        set(),
        "iterator that can be read once",
        """
    @classmethod
    def train(cls, texts, cfg):
        total = sum(map(len, texts))
        return super().train(texts, cfg)
""",
    ),
    "a sample of the texts from the global generator": (
        "random_state",
        {"identity"},
        "generator with a fixed seed",
        """
    @classmethod
    def train(cls, texts, cfg):
        good = super().train(texts, cfg)
        return cls(random.sample(good._characters, len(good._characters)))
""",
    ),
    "a dropout of tokens while encoding": (
        "random_state",
        {"batch_independence", "segments", "documents", "round_trip", "saved_and_loaded"},
        "encoding .* again gives other ids",
        """
    lossless = False
    def _encode(self, text):
        ids = []
        for c in text:
            ids += super()._encode(c) if np.random.random() < 0.9 else list(c.encode())
        return ids
""",
    ),
    "an identity of the name alone": (
        "identity",
        set(),
        "on other texts.*the identity is the same",
        """
    identity = hashlib.sha256(b"mine").hexdigest()
""",
    ),
    "an identity that is a version": (
        "identity",
        set(),
        "must be the 64 hex digits",
        """
    identity = "mine 1.0"
""",
    ),
    "a setting that changes ids and not the identity": (
        "identity",
        {"round_trip"},
        "with fold = true",
        """
    class Config(GoodConfig):
        fold: bool = False
        "Fold case."
    fold = False
    lossless = False
    @classmethod
    def train(cls, texts, cfg):
        self = super().train(texts, cfg)
        self.fold = cfg.fold
        return self
    def _encode(self, text):
        return super()._encode(text.lower() if self.fold else text)
""",
    ),
    "a file without the last character": (
        "saved_and_loaded",
        set(),
        "saved and loaded: vocab_size",
        """
    def save(self, folder):
        type(self)(self._characters[:-1]).__class__.__mro__[1].save(GoodTokenizer(self._characters[:-1]), folder)
""",
    ),
    "the time in the file": (
        "saved_and_loaded",
        set(),
        "characters.json differs from byte .* without times",
        """
    def save(self, folder):
        super().save(folder)
        path = folder / "characters.json"
        path.write_text(path.read_text()[:-3] + f', "time": {time.time_ns()}' + "}")
""",
    ),
    "a file read on trust": (
        "damaged_files",
        set(),
        "raises (JSONDecodeError|UnicodeDecodeError|KeyError|FileNotFoundError|TypeError|ValueError)",
        """
    @classmethod
    def load(cls, path):
        return cls(json.loads((path / "characters.json").read_text())["characters"])
""",
    ),
    "an error that does not name the file": (
        "damaged_files",
        set(),
        "does not name the file: sorry",
        """
    @classmethod
    def load(cls, path):
        try:
            return super().load(path)
        except TokenizerError:
            raise TokenizerError("sorry") from None
""",
    ),
    "an identity read from the file": (
        "damaged_files",
        set(),
        "under the same identity",
        """
    known = None
    def save(self, folder):
        super().save(folder)
        path = folder / "characters.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"identity": self.identity, **content}))
    @classmethod
    def load(cls, path):
        self = super().load(path)
        self.known = json.loads((path / "characters.json").read_text()).get("identity")
        return self
    @property
    def identity(self):
        return self.known or super().identity
""",
    ),
    "a file that kills the process": (
        "damaged_files",
        set(),
        "ends the process: it was killed by SIGKILL",
        """
    @classmethod
    def load(cls, path):
        try:
            return super().load(path)
        except TokenizerError:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
""",
    ),
    "a vocabulary that is one too small": (
        "ids_in_range",
        {"round_trip"},
        "ids are 0 to vocab_size - 1",
        """
    @property
    def vocab_size(self):
        return super().vocab_size - 1
    def save(self, folder):
        super().save(folder)
    def _encode(self, text):
        return [self.vocab_size if i == self.vocab_size - 1 else i for i in super()._encode(text)]
    def decode(self, ids):
        return super().decode([self.vocab_size - 1 if i == self.vocab_size else i for i in ids])
""",
    ),
    "ids of numpy": (
        "ids_in_range",
        set(),
        "of type int64; use int",
        """
    def encode_batch(self, texts):
        return [list(np.array(ids, dtype=np.int64)) for ids in super().encode_batch(texts)]
""",
    ),
    "rows padded to the longest of the batch": (
        "batch_independence",
        {"round_trip"},
        "other ids alone than in a batch.*without padding",
        """
    def encode_batch(self, texts):
        rows = super().encode_batch(texts)
        return [row + [self.special.pad] * (max(map(len, rows)) - len(row)) for row in rows]
    def encode_segments(self, documents):
        return [[self._encode(s) for s in document] for document in documents]
""",
    ),
    "an end-of-document token added to every text": (
        "any_text",
        {"special_text", "segments", "documents"},
        "add no special tokens in encode_batch",
        """
    def _encode(self, text):
        return [*super()._encode(text), self.special.eos]
""",
    ),
    "a character that has no id": (
        "any_text",
        set(),
        "raises KeyError",
        """
    def _encode(self, text):
        return [self._ids[c] if ord(c) > 0xFFFF else i for c in text for i in super(Broken, self)._encode(c)]
""",
    ),
    "work that grows with the square of the length": (
        "long_text",
        set(),
        "characters .* take .* s of processor time",
        """
    def _encode(self, text):
        work = 20 * len(text) if len(text) > 1000 else 0
        return [sum(range(work)) * 0 + i for i in super()._encode(text)]
""",
    ),
    "long words dropped": (
        "long_text",
        set(),
        "nothing may be dropped for its length",
        """
    def _encode(self, text):
        return super()._encode(text) if len(text) < 2000 else []
""",
    ),
    "special tokens read from text": (
        "special_text",
        {"round_trip"},
        "the (eos|pad|bos|cls|sep|mask) token",
        """
    lossless = False
    def _encode(self, text):
        first, found, rest = text.partition("<eos>")
        return [*super()._encode(first), *([self.special.eos] if found else []), *(self._encode(rest) if rest else [])]
    def encode_segments(self, documents):
        return [[GoodTokenizer._encode(self, s) for s in document] for document in documents]
""",
    ),
    "special tokens read from segments alone": (
        "special_text",
        {"segments", "documents"},
        "encode_segments",
        """
    def encode_segments(self, documents):
        names = {self.token(i): i for i in self.special.ids()}
        return [[[names[s]] if s in names else self._encode(s) for s in document] for document in documents]
""",
    ),
    "all ids in the first segment": (
        "segments",
        {"documents"},
        "a token belongs to the segment in which it begins",
        """
    def encode_segments(self, documents):
        whole = self.encode_batch(["".join(document) for document in documents])
        return [[ids, *([] for _ in document[1:])] if document else [] for ids, document in zip(whole, documents)]
""",
    ),
    "segments without the spaces around them": (
        "segments",
        {"documents"},
        "other ids than their whole text",
        """
    def encode_segments(self, documents):
        return [[self._encode(s.strip(" ")) for s in document] for document in documents]
""",
    ),
    "empty segments left out": (
        "segments",
        {"documents"},
        "empty ones included",
        """
    def encode_segments(self, documents):
        return [[self._encode(s) for s in document if s] for document in documents]
""",
    ),
    "arrays of other ids than lists": (
        "documents",
        set(),
        "encode_documents gives other ids",
        """
    def encode_documents(self, documents):
        ids, lengths = super().encode_documents(documents)
        return np.where(ids == ids.max(), ids.min(), ids), lengths
""",
    ),
    "arrays that leave empty segments out": (
        "documents",
        set(),
        "one for each of the .* segments",
        """
    def encode_documents(self, documents):
        ids, lengths = super().encode_documents(documents)
        return ids, lengths[lengths > 0]
""",
    ),
    "arrays cut in the wrong places": (
        "documents",
        set(),
        "a token belongs to the segment in which it begins",
        """
    def encode_documents(self, documents):
        ids, lengths = super().encode_documents(documents)
        first = np.cumsum([0, *map(len, documents)])
        for start, stop in zip(first[:-1], first[1:]):
            lengths[start:stop] = lengths[start:stop][::-1].copy()
        return ids, lengths
""",
    ),
    "a claim to be lossless that folds case": (
        "round_trip",
        set(),
        "says that it is lossless, but",
        """
    def _encode(self, text):
        return super()._encode(text.lower())
    def encode_segments(self, documents):
        return [[[i for c in s for i in self._encode(c)] for s in document] for document in documents]
""",
    ),
    "a space between all tokens": (
        "round_trip",
        {"special_tokens"},
        "decode must undo",
        """
    lossless = False
    def decode(self, ids):
        return " ".join(super(Broken, self).decode([i]) for i in ids)
""",
    ),
    "special tokens decoded as text": (
        "special_tokens",
        set(),
        "decode does not leave out the pad token",
        """
    def _bytes(self, index):
        return self.token(index).encode() if 256 <= index < 262 else super()._bytes(index)
""",
    ),
    "padding that ends documents": (
        "special_tokens",
        set(),
        "eos and pad are both 256",
        """
    @property
    def special(self):
        return SpecialTokens(pad=256, eos=256, bos=258, cls=259, sep=260, mask=261)
""",
    ),
    "no name for an unused id": (
        "printable_tokens",
        set(),
        r"token\(\d+\) raises IndexError",
        """
    @property
    def vocab_size(self):
        return -(-super().vocab_size // 64) * 64 + 64
""",
    ),
    "a division by the number of texts": (
        "little_text",
        set(),
        "training on no text .* raises ZeroDivisionError",
        """
    @classmethod
    def train(cls, texts, cfg):
        texts = list(texts)
        mean = sum(map(len, texts)) / len(texts)
        return super().train(texts, cfg)
""",
    ),
    "a record without a summary and settings without docstrings": (
        "component",
        set(),
        "(?s)no summary.*Config.depth has no docstring",
        """
    class Config(GoodConfig):
        depth: int = 1
""",
    ),
}


@pytest.fixture
def good(fake_dist, tmp_path):
    """The package of ``megalm new-plugin good``, installed as its metadata says."""
    folder = tmp_path / "written"
    write_plugin(folder, "good", "tokenizers")
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}
    fake_dist("megalm-good", {"good": "megalm_good"}, files)


def install(fake_dist, body: str, summary: str) -> None:
    offer = (
        "from megalm.api import Component, hookimpl\nMEGALM_API = (1, 0)\n@hookimpl\ndef megalm_tokenizers():\n"
        f"    return [Component('broken', 'broken_parts:Broken', {summary!r})]\n"
    )
    fake_dist("megalm-broken", {"broken": "broken_offer"}, {"broken_offer.py": offer, "broken_parts.py": HEAD + body})


def outcome(check: str, subject: TokenizerSubject) -> str | None:
    """The message of what is wrong, None where nothing is."""
    try:
        BY_NAME[check].run(subject)
    except CheckFailed as error:
        return str(error)
    except NotApplicable:
        return None
    return None


def test_the_tokenizer_that_the_gallery_breaks_passes_every_check(good) -> None:
    with TokenizerSubject("good", seed=7) as subject:
        assert {name: outcome(name, subject) for name in BY_NAME} == dict.fromkeys(BY_NAME)


@pytest.mark.parametrize("fault", GALLERY)
def test_a_broken_tokenizer_is_caught_by_the_check_that_is_meant_for_it(fault, good, fake_dist, campaign_seed) -> None:
    meant, others, message, body = GALLERY[fault]
    install(fake_dist, body, "" if meant == "component" else "broken on purpose")
    # Which bytes are changed is drawn, and only some of them show a fault: many are drawn where it matters.
    with TokenizerSubject("broken", seed=campaign_seed, full=meant == "damaged_files") as subject:
        found = {name: outcome(name, subject) for name in BY_NAME if name == meant or name not in SLOW}
    failed = {name for name, text in found.items() if text is not None}
    assert meant in failed, found
    assert failed <= {meant, *others}, found

    assert re.search(message, found[meant]), found[meant]
    assert "\n  File" not in found[meant]


def test_a_broken_tokenizer_that_cannot_be_trained_says_why_once_and_for_all(good, fake_dist) -> None:
    body = (
        "    @classmethod\n    def train(cls, texts, cfg):\n        raise TokenizerError('mine: wants 9 GB of text')\n"
    )
    install(fake_dist, body, "never happy")
    with TokenizerSubject("broken") as subject:
        text = outcome("ids_in_range", subject)
    assert "training on" in text
    assert "failed: mine: wants 9 GB of text; give it settings that fit the text" in text


def test_larger_texts_are_tried_until_the_settings_fit() -> None:
    with TokenizerSubject("sentencepiece", settings=["vocab_size=2000"]) as subject:
        assert subject.tokenizer.vocab_size == 2000
        assert sum(map(len, subject.texts)) > 50_000
    with TokenizerSubject("sentencepiece", settings=["vocab_size=400"]) as subject:
        assert subject.tokenizer.vocab_size == 400
        assert sum(map(len, subject.texts)) < 50_000
    with (
        TokenizerSubject("sentencepiece", texts=["too little"]) as subject,
        pytest.raises(CheckFailed, match="too high"),
    ):
        _ = subject.tokenizer


def test_what_a_subject_cannot_be_made_of() -> None:
    with pytest.raises(PluginError, match='did you mean "byte"'):
        TokenizerSubject("bite")
    with pytest.raises(ConfigError, match=r"tokenizer\.hf\.vocab_size: .*\(owner: plugin tokenizers \(megalm"):
        TokenizerSubject("hf", settings=["vocab_size=many"])


def test_texts_are_of_the_seed_alone() -> None:
    state = random.getstate()
    assert texts.corpus(3, 500) == texts.corpus(3, 500) != texts.corpus(4, 500)
    assert texts.drawn(3, 20) == texts.drawn(3, 20) != texts.drawn(4, 20)
    assert random.getstate() == state
    for text in texts.drawn(5, 200).values():
        text.encode("utf-8")
    draw = random.Random(1)
    assert all("".join(texts.pieces(text, draw)) == text for text in ("", "a", "some text") for _ in range(50))


class TestBytes(TokenizerSuite):
    tokenizer = "byte"


def test_a_suite_has_a_test_for_each_check(tmp_path: Path) -> None:
    assert {name for name in dir(TestBytes) if name.startswith("test_")} == {f"test_{name}" for name in BY_NAME}
    assert issubclass(TokenizerError, Exception)
