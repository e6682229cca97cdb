"""What is done to a document before it is tokenised, and which documents are left out.

The steps run in one fixed order: normalise, control characters, personal data, then the filters, so that a filter
judges the text that would be trained on. Everything is off unless asked for. A document's fate depends on its own text
alone; duplicates, which do not, are decided when all pieces are there (:mod:`megalm.data.cleaning.duplicates`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from megalm.config.settings import Settings
from megalm.data.cleaning.language import LanguageFilter
from megalm.data.cleaning.pii import Scrubber, check_kinds
from megalm.data.cleaning.repetition import repetition

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
"""Control characters but tab and line feed, and invisible ones that order or break text. Joiners stay: scripts and
emoji need them."""


class Cleaning(Settings, use_attribute_docstrings=False):
    """What ``megalm data prepare`` does to documents. The defaults do nothing."""

    normalize: Literal["none", "NFC", "NFKC"] = "none"
    """Unicode normalisation form."""
    strip_control: bool = False
    """Remove control characters (tabs and line feeds stay), bidirectional controls and zero-width spaces."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages to keep; empty keeps all."""
    min_characters: int = Field(default=0, ge=0)
    """Shorter documents are left out."""
    max_characters: int = Field(default=0, ge=0)
    """Longer documents are left out; 0 for no limit."""
    max_repetition: float = Field(default=1.0, ge=0, le=1)
    """Documents in which a larger share of the lines, by characters, or of the runs of five words repeats an earlier
    one are left out."""
    scrub: tuple[str, ...] = ()
    """Kinds of personal data to replace: email, ip, phone, card, iban."""
    dedup: Literal["none", "exact", "near"] = "none"
    """Leave out documents that repeat an earlier one: to the character, or also nearly (MinHash)."""
    similarity: float = Field(default=0.8, gt=0, le=1)
    """Share of five-word runs (Jaccard) from which two documents are near duplicates."""

    def options(self) -> dict[str, str | float]:
        """Everything that is not at its default, for a manifest."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return {
            key: ",".join(value) if isinstance(value, list) else value if isinstance(value, str) else float(value)
            for key, value in changed.items()
        }


class Cleaner:
    """Applies a :class:`Cleaning` to documents and counts what it did."""

    def __init__(self, cleaning: Cleaning) -> None:
        self._cleaning = cleaning
        self._scrubber = Scrubber(cleaning.scrub)
        self._language = LanguageFilter(cleaning.languages) if cleaning.languages else None
        self.removed: Counter[str] = Counter()

    @property
    def scrubbed(self) -> Counter[str]:
        """Replaced pieces of personal data by kind."""
        return self._scrubber.counts

    def apply(self, texts: Sequence[str]) -> list[str]:
        """The documents that stay, as they are to be tokenised."""
        if self._cleaning == Cleaning(dedup=self._cleaning.dedup, similarity=self._cleaning.similarity):
            return list(texts)
        texts = [self._mend(text) for text in texts]
        kept = [text for text in texts if self._keep(text)]
        if self._cleaning.max_repetition < 1:
            shares = repetition(kept)
            held, kept = kept, []
            for text, share in zip(held, shares, strict=True):
                if share <= self._cleaning.max_repetition:
                    kept.append(text)
                else:
                    self.removed["repetition"] += 1
        return kept

    def _mend(self, text: str) -> str:
        cleaning = self._cleaning
        if cleaning.normalize != "none" and not text.isascii():
            text = unicodedata.normalize(cleaning.normalize, text)
        if cleaning.strip_control:
            text = _CONTROL.sub("", text)
        return self._scrubber.apply(text)

    def _keep(self, text: str) -> bool:
        cleaning = self._cleaning
        if not text or text.isspace():
            reason = "nothing left"
        elif len(text) < cleaning.min_characters:
            reason = "too short"
        elif cleaning.max_characters and len(text) > cleaning.max_characters:
            reason = "too long"
        elif self._language is not None and not self._language.keeps(text):
            reason = "language"
        else:
            return True
        self.removed[reason] += 1
        return False


def check_cleaning(cleaning: Cleaning) -> None:
    """Raise DataError where a kind of personal data or a language is unknown, or a library is missing."""
    check_kinds(cleaning.scrub)
    if cleaning.languages:
        LanguageFilter(cleaning.languages)
