"""The tokenizer contract: text to ids and back, and an identity that data and checkpoints carry."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megalm.config.settings import Settings


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens that a tokenizer has; none where it lacks one."""

    pad: int | None = None
    eos: int | None = None
    """Ends a document."""
    bos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    unk: int | None = None

    def ids(self) -> tuple[int, ...]:
        """The ids that exist, ascending, without repeats."""
        found = (self.pad, self.eos, self.bos, self.cls, self.sep, self.mask, self.unk)
        return tuple(sorted({i for i in found if i is not None}))


def begins_word(text: str) -> bool:
    """Whether a word begins where this text does, whatever is before it: it begins with anything but a letter, a digit
    or a mark on one. Characters of scripts that write no spaces are words, as BERT has it."""
    if not text or unicodedata.category(text[0])[0] not in "LNM":
        return True
    return "\u3040" <= text[0] <= "\u30ff" or "\u3400" <= text[0] <= "\u9fff" or text[0] >= "\U00020000"


class Tokenizer(ABC):
    """A tokenizer. Subclass it and yield a ``Component`` from ``megalm_tokenizers``."""

    Config: ClassVar[type[Settings]] = Settings
    """Settings of :meth:`train`."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """Names of installed distributions that compute the ids: work that a preparation left unfinished is not gone on
    with by other versions of them."""

    @classmethod
    @abstractmethod
    def train(cls, texts: Iterable[str], cfg: Any) -> Tokenizer:
        """Learn a tokenizer from texts. Same texts and settings give the same identity."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load what :meth:`save` wrote, or a model file of the underlying library. TokenizerError where it cannot."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into an existing folder."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without added special tokens."""

    def encode_segments(self, documents: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Ids of documents that are given as consecutive segments (sentences): for each document, a list a segment.

        A document's lists, joined, should be the ids of its whole text, so that sentence boundaries do not change the
        tokens: override this where the library tells offsets. Here, every segment is encoded on its own.
        """
        flat = iter(self.encode_batch([segment for document in documents for segment in document]))
        return [[next(flat) for _ in document] for document in documents]

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`encode_segments` gives, as arrays: (ids, lengths).

        ``ids``: (tokens,) integers, all segments of all documents joined; ``lengths``: (segments,) int64, the ids of
        each segment. Preparation calls this with about a megabyte of text; override it where a library can fill
        arrays without a Python number for every token.
        """
        parts = [segment for document in self.encode_segments(documents) for segment in document]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.fromiter(chain.from_iterable(parts), np.int64, int(lengths.sum())), lengths

    def word_starts(self) -> np.ndarray:
        """Which ids begin a word: (vocabulary,) bool. Whole-word masking takes the others with the id before them.

        Here: those whose text begins with a space, a mark of punctuation or a character that is a word of its own
        (:func:`begins_word`). Override it where tokens are marked as beginnings or continuations.
        """
        return np.array([begins_word(self.decode([index])) for index in range(self.vocab_size)])

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    @abstractmethod
    def special(self) -> SpecialTokens:
        """Ids of the special tokens."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hex SHA-256 of everything that decides the ids. Stored with data and checkpoints; a mismatch is refused."""

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back every text that can be encoded, to the character. A claim, which
        ``megalm.testing.TokenizerSuite`` holds the tokenizer to; tokenizers that normalise make none."""
        return False

    def hf_json(self) -> str | None:
        """A ``tokenizer.json`` of the Hugging Face tokenizers library that gives the same ids and texts, if there is
        one. Exported models carry it; the special tokens in it are called what :meth:`token` calls them."""
        return None

    def token(self, index: int) -> str:
        """A printable form of one id, for ``megalm data inspect``."""
        return self.decode([index])
