"""UTF-8 bytes as tokens: 256 values and six special tokens. Nothing to train, nothing to load, no text it cannot
hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalm.api import Settings, SpecialTokens, Tokenizer

_NAMES = ("pad", "eos", "bos", "cls", "sep", "mask")


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; pad, eos, bos, cls, sep and mask follow in this order."""

    Config = Settings

    @classmethod
    def train(cls, texts: Iterable[str], cfg: Any) -> ByteTokenizer:
        """There is nothing to learn; the texts are not read."""
        return cls()

    @classmethod
    def load(cls, path: Path) -> ByteTokenizer:
        """There is nothing to load; ``path`` is not read."""
        return cls()

    def save(self, folder: Path) -> None:
        """There is nothing to save."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        if type(self).encode_batch is not ByteTokenizer.encode_batch:  # a subclass that encodes otherwise
            return super().encode_documents(documents)
        segments = [segment for document in documents for segment in document]
        ids = np.frombuffer("".join(segments).encode("utf-8"), dtype=np.uint8)
        lengths = [len(s) if s.isascii() else len(s.encode("utf-8")) for s in segments]
        return ids, np.array(lengths, dtype=np.int64)

    def word_starts(self) -> np.ndarray:
        """A word begins at what is no letter or digit of ASCII; other characters are words, which their bytes go on."""
        starts = np.ones(self.vocab_size, dtype=bool)
        starts[[i for i in range(0x80) if chr(i).isalnum()]] = False
        starts[0x80:0xC0] = False
        return starts

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not valid UTF-8, such as a character cut in half, become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        return 256 + len(_NAMES)

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens(**{name: 256 + i for i, name in enumerate(_NAMES)})

    @property
    def identity(self) -> str:
        return hashlib.sha256(f"byte 1 {' '.join(_NAMES)}".encode()).hexdigest()

    @property
    def lossless(self) -> bool:
        return True

    def hf_json(self) -> str | None:
        import tokenizers

        # Byte-level BPE without merges: every byte is a token of its own.
        characters = _byte_characters()
        special = [f"<{name}>" for name in _NAMES]
        vocabulary = {token: index for index, token in enumerate([*characters, *special])}
        built = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        built.decoder = tokenizers.decoders.ByteLevel()
        built.add_special_tokens(special)
        return str(built.to_str())

    def token(self, index: int) -> str:
        if index >= 256:
            return f"<{_NAMES[index - 256]}>"
        return chr(index) if 32 <= index < 127 else f"<0x{index:02X}>"


def _byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it can be seen, else one from U+0100
    on, in order."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]
