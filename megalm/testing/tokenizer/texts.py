"""Texts to train tokenizers on, and texts that have broken some.

Everything that is drawn comes from a seed, and nothing from a file: the same texts on every machine.
"""

# ruff: noqa: RUF001 -- texts of many scripts are what this file is for

from __future__ import annotations

import random
from collections.abc import Sequence

_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
_OTHERS = ("äöüßéèñç", "жизнь", "λόγος", "中文再见你好", "ひらがな", "한국어", "שלום", "مرحبا", "नमस्ते")
_ENDS = (".", ".", ".", "!", "?", ";", ":", "...")

HARD: dict[str, str] = {
    "one letter": "a",
    "one space": " ",
    "spaces at both ends": "  two  spaces between ",
    "white space of many kinds": " \t\n\r\n\u00a0\u2003\u2028\u2029\u3000\v\f ",
    "a line break at the end": "line\n",
    "NUL": "a\0b\0",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "a byte-order mark": "\ufefftext",
    "Chinese and Japanese": "今日は、世界。再见！中文English混排。",
    "Arabic and Hebrew, right to left": "مرحبا بالعالم (123) שלום עולם",
    "Devanagari and Thai": "नमस्ते दुनिया ภาษาไทยไม่มีช่องว่าง",
    "combining marks": "e\u0301 n\u0303 Z\u0351\u036b\u0343a\u0323\u0307lgo q\u0307\u0323",
    "composed and decomposed": "\u00e9 e\u0301 \u212b \u00c5 \uac00 \u1100\u1161 \ufb01",
    "emoji with joiners": "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "letters of the upper planes": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎 \U0010fffd",
    "private and unassigned": "\ue000 \u0378 \ufffd \uffff",
    "marks that tokenizers use": "▁a Ġb Ċ ##c c@@ </w> ⁇",
    "upper and lower case": "ISTANBUL İstanbul straße STRASSE ﬀ ǅ",
    "digits": "1999 3.14 1,000,000 ١٢٣ ²³ ½ 0x1F",
    "contractions": "do not don't do n't can ' t I 'm it 's they've",
    "a program": 'def f(x):\n\tif x != "y":  # note\n\t\treturn [x ** 2, {}]\n',
    "an address": "https://example.org/a?b=c&d=%20#e user@example.org",
    "brackets that are no tokens": "[ MASK ] < s > [] <> <| |> [[PAD]",
}
"""By name."""

SPELLINGS = (
    *("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<cls>", "<sep>", "<eos>", "<bos>"),
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOS]", "[BOS]"),
    *("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|startoftext|>", "<|pad|>", "<|mask|>", "<|eos|>"),
)
"""How special tokens are commonly written."""


def corpus(seed: int, words: int) -> list[str]:
    """Documents of about ``words`` words in all, as many distinct ones as a text of that length would have.

    Few words are frequent and most are rare, some are of other scripts; sentences and paragraphs have their marks.
    """
    draw = random.Random(f"corpus {seed} {words}")
    weights = [1 / (rank + 2) ** 0.6 for rank in range(len(_LETTERS))]
    known = [_word(draw, weights) for _ in range(max(50, words // 5))]
    frequency = [1 / (rank + 3) for rank in range(len(known))]
    documents = []
    chosen = draw.choices(known, frequency, k=words)
    place = 0
    while place < words:
        sentences = []
        for _ in range(draw.randint(1, 6)):
            length = draw.randint(3, 14)
            sentence = " ".join(chosen[place : place + length])
            place += length
            if sentence:
                sentences.append(sentence[0].upper() + sentence[1:] + draw.choice(_ENDS))
        documents.append(draw.choice((" ", " ", "\n")).join(sentences))
    return [document for document in documents if document]


def _word(draw: random.Random, weights: Sequence[float]) -> str:
    if draw.random() < 0.08:
        return "".join(draw.choices(draw.choice(_OTHERS), k=draw.randint(1, 4)))
    return "".join(draw.choices(_LETTERS, weights, k=draw.randint(1, 9)))


def drawn(seed: int, count: int) -> dict[str, str]:
    """Texts of characters from all over Unicode, and of few characters in many orders."""
    draw = random.Random(f"texts {seed}")
    texts = {}
    few = "aAbB é中\u0301\u200d👍 \n'.#▁Ġ<s>[]"
    for number in range(count):
        if number % 2:
            text = "".join(draw.choices(few, k=draw.randint(1, 40)))
        else:
            text = "".join(_character(draw) for _ in range(draw.randint(1, 40)))
        texts[f"drawn text {number}"] = text
    return texts


def _character(draw: random.Random) -> str:
    """Any that is not half of a surrogate pair, the lower planes more often."""
    while True:
        code = draw.randrange(1 << draw.choice((7, 9, 12, 16, 20)))
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def pieces(text: str, draw: random.Random, most: int = 6) -> list[str]:
    """The text in consecutive pieces, cut anywhere; some may be empty."""
    cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, most - 1)))
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
