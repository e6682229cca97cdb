"""SentencePiece (Kudo and Richardson 2018): trains unigram and BPE models, and loads those that others have trained.

What is trained here is lossless by default, but for one character: no normalisation, spaces kept, characters outside
the vocabulary as bytes. U+2581, which the library writes for a space, comes back as one; so no tokenizer here claims
``lossless``.
Training is repeatable: the library's result depends on its number of threads, so that is fixed, and nothing is sampled.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from pydantic import Field

from megalm.api import Settings, SpecialTokens, Tokenizer, TokenizerError, begins_word
from megalm_plugins.tokenizers.segments import cut_at_segments

_FILE = "tokenizer.model"
_THREADS = 4
_LINE_CHARACTERS = 4096
_ROLES = {
    "pad": ("<pad>", "[PAD]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}


class SentencePieceConfig(Settings):
    """How a model is trained."""

    vocab_size: int = Field(default=8000, ge=8, le=1 << 24)
    """Pieces, the special ones and 256 bytes (with byte_fallback) included."""
    model: Literal["unigram", "bpe"] = "unigram"
    """Kind of model."""
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    """Share of the text's characters that get pieces of their own; the rarest ones become bytes, or unknown."""
    byte_fallback: bool = True
    """Spell characters without a piece in bytes; without it they become the unknown token."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = "identity"
    """The library's normalisation rule; ``_cf`` folds case. All but identity lose information."""
    remove_extra_whitespaces: bool = False
    """Drop leading, trailing and repeated spaces."""
    add_dummy_prefix: bool = True
    """Put a space before the text, so that a word is the same piece there as elsewhere."""
    split_digits: bool = False
    """Give every digit a piece of its own."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Special tokens are those that the model has; a model trained here has <unk>, <s>, </s>,
    <pad>, <cls>, <sep> and <mask>."""

    Config = SentencePieceConfig
    libraries = ("sentencepiece",)

    def __init__(self, model: bytes, source: str) -> None:
        """``model`` is a serialised model; ``source`` names it in messages."""
        if not model:
            raise TokenizerError(f"{source}: is empty, expected a SentencePiece model")
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"{source}: not a SentencePiece model: {str(error).strip()}") from None
        self._model = model
        self._size = int(self._sp.get_piece_size())
        if self._size < 1:
            raise TokenizerError(f"{source}: a SentencePiece model without pieces")
        self._special = self._find_special()

    @classmethod
    def train(cls, texts: Iterable[str], cfg: Any) -> SentencePieceTokenizer:
        lines = _lines(texts)
        first = next(lines, None)
        if first is None:
            raise TokenizerError(
                "sentencepiece: no text to learn from; train it with: megalm data train-tokenizer sentencepiece "
                "INPUT..., or load a model with sentencepiece:FILE.model"
            )
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_chain(first, lines),
                model_writer=out,
                model_type=cfg.model,
                vocab_size=cfg.vocab_size,
                character_coverage=cfg.character_coverage,
                byte_fallback=cfg.byte_fallback,
                normalization_rule_name=cfg.normalization,
                remove_extra_whitespaces=cfg.remove_extra_whitespaces,
                add_dummy_prefix=cfg.add_dummy_prefix,
                split_digits=cfg.split_digits,
                max_sentence_length=16 * _LINE_CHARACTERS,
                shuffle_input_sentence=False,
                input_sentence_size=0,
                num_threads=_THREADS,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                control_symbols=[_ROLES[role][0] for role in ("cls", "sep", "mask")],
                minloglevel=2,
            )
        except (RuntimeError, OSError, ValueError) as error:
            message = str(error).rpartition("] ")[2].strip() or str(error).strip()
            raise TokenizerError(f"sentencepiece: cannot train with vocab_size {cfg.vocab_size}: {message}") from None
        return cls(out.getvalue(), "the trained model")

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        file = path / _FILE if path.is_dir() else path
        try:
            model = file.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{file}: cannot be read: {error.strerror}; expected a SentencePiece model") from None
        return cls(model, str(file))

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_bytes(self._model)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._sp.encode(list(texts), return_type=int)]

    def encode_segments(self, documents: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        found = self._sp.encode(["".join(segments) for segments in documents], return_type="offset_mapping")
        return [
            cut_at_segments(list(text["ids"]), [start for start, _ in text["offsets"]], segments)
            for text, segments in zip(found, documents, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        hidden = set(self._special.ids()) - {self._special.unk}
        return str(self._sp.decode([int(i) for i in ids if i not in hidden]))

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def special(self) -> SpecialTokens:
        return self._special

    @property
    def identity(self) -> str:
        return hashlib.sha256(b"sentencepiece 1\0" + self._model).hexdigest()

    def word_starts(self) -> np.ndarray:
        def begins(index: int) -> bool:
            piece = self.token(index)
            if self._sp.is_byte(index):  # <0x41>; those that go on with a character go on with the word
                byte = int(piece[3:5], 16)
                return begins_word(chr(byte)) if byte < 0x80 else byte >= 0xC0
            return piece.startswith("\N{LOWER ONE EIGHTH BLOCK}") or begins_word(piece)

        return np.array([begins(index) for index in range(self.vocab_size)])

    def token(self, index: int) -> str:
        return str(self._sp.id_to_piece(index))

    def _find_special(self) -> SpecialTokens:
        sp = self._sp
        found = {role: self._named(names) for role, names in _ROLES.items()}
        for role, index in (("pad", sp.pad_id()), ("eos", sp.eos_id()), ("bos", sp.bos_id()), ("unk", sp.unk_id())):
            if index >= 0:
                found[role] = int(index)
        return SpecialTokens(**found)

    def _named(self, names: Sequence[str]) -> int | None:
        """Id of the first of these pieces that exists."""
        for name in names:
            index = int(self._sp.piece_to_id(name))
            if self._sp.id_to_piece(index) == name:
                return index
        return None


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Visible lines, the long ones cut: the trainer works on sentences and skips what is too long."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LINE_CHARACTERS):
                piece = line[start : start + _LINE_CHARACTERS].replace("\0", "")
                if piece and not piece.isspace():
                    yield piece


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
