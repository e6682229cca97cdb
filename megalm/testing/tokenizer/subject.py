"""A tokenizer under examination: its class and settings, a text to train it on, and the trained tokenizer.

A text must be as large as the settings ask for, which only training tells: a vocabulary of 8000 pieces cannot be learnt
from a page. So where training refuses a text, a larger one is tried.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megalm.config.settings import Settings
from megalm.data.learn import training_settings
from megalm.errors import TokenizerError
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.testing.check import CheckFailed
from megalm.testing.tokenizer.texts import HARD, corpus, drawn

WORDS = (5_000, 20_000, 100_000, 500_000)
"""Sizes of text that are tried."""


class TokenizerSubject:
    """What the checks of a tokenizer work on.

    Args:
        name: the component, or ``plugin:component``.
        manager: default: one with all installed plugins.
        settings: ``key=value`` pairs for training, such as ``vocab_size=300``.
        full: more drawn texts, more settings and more kinds of damage.
        seed: of every text that is drawn.
        texts: what to train on; default: a made-up text, large enough for the settings.

    Use it as a context manager or :meth:`close` it: it keeps a temporary folder.
    """

    def __init__(
        self,
        name: str,
        *,
        manager: PluginManager | None = None,
        settings: Sequence[str] = (),
        full: bool = False,
        seed: int = 0,
        texts: Iterable[str] | None = None,
    ) -> None:
        self.name = name
        self.manager = manager or PluginManager.for_launch(None)
        self.component = self.manager.get("tokenizers", name)
        self.cls: type[Tokenizer] = self.manager.load_class("tokenizers", name)
        self.cfg: Settings = training_settings(self.cls.Config, name, f"plugin {self.component.plugin}", settings)
        self.full = full
        self.seed = seed
        self._given = None if texts is None else list(texts)
        self._trained: Tokenizer | None = None
        self._texts: list[str] = []
        self._why_not: Exception | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="megalm-check-")
        self._numbers = itertools.count()

    def __enter__(self) -> TokenizerSubject:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the temporary folder."""
        self._folder.cleanup()

    def folder(self, name: str) -> Path:
        """A new empty folder."""
        path = Path(self._folder.name) / f"{next(self._numbers)} {name}"
        path.mkdir()
        return path

    def train(self, texts: Iterable[str], cfg: Settings | None = None) -> Tokenizer:
        """Train on texts with the settings, or others. CheckFailed where something else than a tokenizer comes out."""
        found: Any = self.cls.train(texts, self.cfg if cfg is None else cfg)
        if not isinstance(found, Tokenizer):
            raise CheckFailed(f"{self.component.target}.train returned {found!r}; it must return the tokenizer")
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        """Trained on :attr:`texts`. CheckFailed where that cannot be done; the check of training says why in full."""
        self._train_once()
        if self._trained is None:
            raise CheckFailed(f"there is no tokenizer to examine: {self._cause()}")
        return self._trained

    @property
    def texts(self) -> list[str]:
        """The documents that :attr:`tokenizer` was trained on."""
        self._train_once()
        return self._texts

    def other_texts(self) -> list[str]:
        """As many documents again, which share no more with :attr:`texts` than the letters."""
        words = sum(len(text.split()) for text in self.texts)
        return corpus(self.seed + 1, max(WORDS[0], words))

    def _train_once(self) -> None:
        if self._trained is not None or self._why_not is not None:
            return
        candidates = (corpus(self.seed, words) for words in WORDS) if self._given is None else iter([self._given])
        for self._texts in candidates:
            try:
                self._trained = self.train(iter(self._texts))
                return
            except TokenizerError as error:
                self._why_not = error  # perhaps of too little text
            except Exception as error:
                self._why_not = error
                return

    def _cause(self) -> str:
        error = self._why_not
        advice = ""
        if isinstance(error, TokenizerError):
            advice = "; give it settings that fit the text, such as a smaller vocabulary, or other texts"
        name = "" if isinstance(error, (TokenizerError, CheckFailed)) else f"{type(error).__name__}: "
        return f"training on {sum(map(len, self._texts)):,} characters failed: {name}{error}{advice}"

    @cached_property
    def probes(self) -> dict[str, str]:
        """Texts to encode, by name: documents of the training text, of others, hard ones and drawn ones."""
        count = 200 if self.full else 40
        known = {f"document {number}": text for number, text in enumerate(self.texts[: count // 4])}
        unseen = {f"unseen document {n}": text for n, text in enumerate(corpus(self.seed + 2, 400)[: count // 4])}
        return {**known, **unseen, **HARD, **drawn(self.seed, count)}

    @cached_property
    def usable(self) -> list[str]:
        """The probes that can be encoded."""
        found = self.encodable(self.probes.values())
        if not found:
            raise CheckFailed("no text can be encoded; see any_text")
        return found

    def encodable(self, texts: Iterable[str]) -> list[str]:
        """Those that can be encoded. What becomes of the others is one check's concern, and not every check's."""
        found = []
        for text in texts:
            try:
                self.tokenizer.encode_batch([text])
            except Exception:
                continue
            found.append(text)
        return found

    @property
    def unknown(self) -> set[int]:
        """The id of the unknown token, where there is one."""
        unk = self.tokenizer.special.unk
        return set() if unk is None else {unk}
