"""Keeps documents of some languages, as py3langid (BSD licence, NumPy only) sees them.

It was chosen among the well-kept libraries because its model comes in the package, needs no pickle and no download, and
gives the same answer everywhere. Short texts and mixed ones are guesses with any library: set ``min_characters`` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megalm.data.extras import load_extra
from megalm.errors import DataError

_LOOK_AT = 4000
"""Characters of a document that are looked at."""


class LanguageFilter:
    """Says which documents are in one of some languages."""

    def __init__(self, languages: Sequence[str]) -> None:
        library = load_extra(("py3langid.langid",), "a language filter")
        self._identifier: Any = library.LanguageIdentifier.from_model_file(library.MODEL_FILE)
        known = {str(label) for label in self._identifier.labels}
        if unknown := [language for language in languages if language not in known]:
            raise DataError(f"unknown language {', '.join(unknown)}; expected codes among {', '.join(sorted(known))}")
        self._languages = frozenset(languages)

    def keeps(self, text: str) -> bool:
        """Whether the likeliest language is one of those asked for."""
        return str(self._identifier.classify(text[:_LOOK_AT])[0]) in self._languages
