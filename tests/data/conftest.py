from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.errors import PluginError
from megalm_plugins.tokenizers.byte import ByteTokenizer
from megalm_plugins.tokenizers.hf import HFTokenizer
from megalm_plugins.tokenizers.sentencepiece import SentencePieceTokenizer

WORDS = [
    *(
        [
            "the",
            "a",
            "king",
            "queen",
            "of",
            "to",
            "Rome",
            "sword",
            "Where",
            "Come",
            "wörld",
            "中文",
            "night;",
            "day,",
            "O!",
            "Help.",
            "Mr.",
            "said:",
        ]
    ),
    *(
        [
            '"Yes."',
            "3.14",
            "再见。",
            "😀",
            "banished",
            "mercutio",
            "hereafter",
            "tomorrow",
            "creeps",
            "petty",
            "pace",
            "syllable",
            "recorded",
        ]
    ),
]


@pytest.fixture
def resolve() -> Callable[[str], type]:
    known = {"byte": ByteTokenizer, "sentencepiece": SentencePieceTokenizer, "hf": HFTokenizer}

    def find(name: str) -> type:
        if name not in known:
            raise PluginError(f"no tokenizer {name}")
        return known[name]

    return find


@pytest.fixture
def random_documents() -> Callable[[int, int], list[str]]:
    """Distinct documents of one or more lines, without empty lines, without space at their ends."""

    def make(seed: int, count: int) -> list[str]:
        rng = random.Random(seed)
        found: dict[str, None] = {}
        while len(found) < count:
            lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 5))]
            found["\n".join(lines)] = None
        return list(found)

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "input.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write
