"""Byte-level BPE at the speed of gigatoken (MIT licence), where its ids are shown to be those of tokenizers.

gigatoken remembers the tokens of words, and is some hundred times faster. It is young, so it is believed only as far as
it is compared: on probes of many scripts and odd spacing when it is loaded, and on a document of every batch. A batch
whose sample differs is encoded by tokenizers instead, with a warning; which engine serves a batch depends on its text
alone, never on what came before it.

Libraries know different versions of Unicode. A character that is a letter to one and unassigned to the other is cut off
differently ("'t" after it, say), so texts with characters that tokenizers takes for unassigned are encoded by it.

Without gigatoken (``pip install 'megalm[data]'``), or with ``MEGALM_BPE=tokenizers`` in the environment, everything is
encoded by tokenizers.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic_core import to_json
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

Reference = Callable[[list[str]], list[list[int]]]
"""Ids of texts by the library that the ids must equal."""

_FORGET_BYTES = 1 << 30
_SAMPLE_CHARACTERS = 512
_PROBES = (
    "",
    " ",
    "\n",
    "\n\n  \n\t\t \r\n x\r y",
    "The quick  brown   fox's don't WE'LL they've I'M 3.14159 1,000,000 1e-9 $5 100%",
    "    def f(x: int) -> None:\n\t\treturn x**2 if x != 0 else {'a': [1, 2]}  # comment\n",
    "https://example.org/a_b?c=d&e=%20#f user@example.org <!-- --> &amp; ``` ### | --- |",
    "《三国演义》第一回\uff1a宴桃园豪杰三结义\uff0c斩黄巾英雄首立功。話說天下大勢、分久必合",
    "ひらがなカタカナ漢字。한국어 문장입니다. Русский текст, ελληνικά, עברית مرحبا ไทย हिन्दी",
    "naïve café e\u0301 A\u030a ﬁ ﷽ Ⅷ ½ ²\u00b5 İstanbul ǅ ß \u017f",
    "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 ✈️ \U0001f600\U0001f9d1\U0001f3fd",
    "\u00a0\u2003\u3000\u200b\u2028\u2029\ufeff\u0085 \x00\x01\x1b[0m\x7f\ufffd\U0010ffff\ue000",
    "a" * 300 + " " * 300 + "b\n" * 100 + "é" * 100 + "1234567890" * 20,
    "!!!???...---___***((([[[{{{ \"'`~@#^&*+=|\\/<>;:,.",
    "'s't're've'm'll'd'S'T'RE ' s \u2019s",
)
_LETTERS = "\u0860\U00010d00\U0001e100\U00030000\U00010570\U00031350\U0002ebf0\U00010d4a\U000323b0"
"""A letter that each version of Unicode added, from 10 to 17."""
_SETTLED = (
    *((0x3400, 0x4DB5), (0x4E00, 0x9FA5), (0xA000, 0xA48C), (0xAC00, 0xD7A3), (0xD800, 0xF8FF)),
    *((0x17000, 0x187EC), (0x20000, 0x2A6D6), (0x2A700, 0x2B734), (0x2B740, 0x2B81D), (0x2B820, 0x2CEA1)),
    (0x2CEB0, 0x2EBE0),
)
"""Assigned by Unicode 10, or for private use: not asked for, to save time."""
_LAST_LATIN = 0x24F
"""Up to here everything is assigned."""
_LAST_ASKED = 0x334FF
"""Beyond are no letters yet, but a few tags and private use."""
_BLOCK = 256
_ASSIGNED, _UNASSIGNED = 1, 2


class _Unassigned:
    """Of code points whether tokenizers takes them for unassigned, or does not say. It is asked for a block of them
    when one is met: most texts have few scripts."""

    def __init__(self) -> None:
        self._known = np.zeros(0x110000, dtype=np.uint8)  # or _ASSIGNED, _UNASSIGNED
        self._known[: _LAST_LATIN + 1] = _ASSIGNED
        for first, last in _SETTLED:
            self._known[first : last + 1] = _ASSIGNED
        self._known[_LAST_ASKED + 1 :] = _UNASSIGNED
        self._split = Split(Regex(r"\p{Cn}+"), "removed", invert=True)

    def any(self, points: np.ndarray) -> bool:
        """Whether one of the code points, (characters,) integers, is unassigned."""
        found = self._known[points]
        if len(found) and not found.min():
            for block in np.unique(points[found == 0] // _BLOCK).tolist():
                self._ask(block)
            found = self._known[points]
        return bool(len(found)) and int(found.max()) == _UNASSIGNED

    def _ask(self, block: int) -> None:
        start = block * _BLOCK
        known = self._known[start : start + _BLOCK].copy()
        asked = np.flatnonzero(known == 0)
        known[asked] = _ASSIGNED
        for run, _ in self._split.pre_tokenize_str("".join(map(chr, (start + asked).tolist()))):
            known[np.frombuffer(run.encode("utf-32-le"), dtype="<u4") - start] = _UNASSIGNED
        self._known[start : start + _BLOCK] = known


@functools.cache
def _unassigned() -> _Unassigned:
    return _Unassigned()


def doubtful(texts: Sequence[str]) -> list[int]:
    """Numbers of the texts that hold such a character."""
    wide = [number for number, text in enumerate(texts) if not text.isascii()]
    if not wide or not _any_unassigned("".join([texts[number] for number in wide])):
        return []
    return [number for number in wide if _any_unassigned(texts[number])]


def _any_unassigned(text: str) -> bool:
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return _unassigned().any(points[points > _LAST_LATIN])


def fast_bpe(content: dict[str, Any], special: Sequence[str], reference: Reference) -> FastBPE | None:
    """A :class:`FastBPE` for the contents of a ``tokenizer.json``; None where gigatoken is missing, does not support
    it, or gives other ids for the probes (then with a warning). ``special`` are the texts of special tokens, which are
    text here as any other."""
    if os.environ.get("MEGALM_BPE") == "tokenizers":
        return None
    try:
        from gigatoken import Tokenizer
    except ImportError:
        return None
    plain = {
        **content,
        "added_tokens": [token for token in content.get("added_tokens") or () if not token.get("special")],
        **dict.fromkeys(("truncation", "padding", "post_processor")),
    }
    try:
        text = to_json(plain)
        engine = FastBPE(lambda: Tokenizer.from_json(text).encode, reference)
        probes = [*_PROBES, *special, "a".join(special), "\n".join([*_PROBES, *special])]
        same = engine.agrees(probes)
    except Exception:  # whatever a library says of what it does not support
        return None
    if not same:
        warnings.warn("gigatoken gives other ids than tokenizers for this tokenizer; it is not used", stacklevel=2)
        return None
    return engine


class FastBPE:
    """Encodes by a fast engine and compares with the reference."""

    def __init__(self, load: Callable[[], Callable[[bytes], np.ndarray]], reference: Reference) -> None:
        self._load = load
        self._reference = reference
        self._encode = load()
        self._encoded = 0

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether both give the same ids for each of the texts, and cut the letters that both must know."""
        known = [f"{letter}'t" for letter in _LETTERS if not doubtful([letter])]
        texts = [*texts, *known]
        expected = self._reference(texts)
        return all(np.array_equal(self._encode(text.encode()), ids) for text, ids in zip(texts, expected, strict=True))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        """Ids of texts, (tokens,) uint32 each; None where the sample is not encoded alike."""
        raw = [text.encode("utf-8") for text in texts]
        self._encoded += sum(map(len, raw))
        if self._encoded > _FORGET_BYTES:  # the engine never forgets a word by itself
            self._encode, self._encoded = self._load(), 0
        found = list(map(self._encode, raw))
        slow = doubtful(texts)
        if slow:
            for number, known in zip(slow, self._reference([texts[n] for n in slow]), strict=True):
                found[number] = np.array(known, dtype=np.uint32)
            apart = set(slow)
            texts = [text for number, text in enumerate(texts) if number not in apart]
        if not texts:
            return found
        sample = texts[len(texts) // 2][:_SAMPLE_CHARACTERS]
        if np.array_equal(self._encode(sample.encode()), self._reference([sample])[0]):
            return found
        warnings.warn(
            f"gigatoken gives other ids than tokenizers for {sample[:80]!r}; these documents are encoded by tokenizers",
            stacklevel=2,
        )
        return None
