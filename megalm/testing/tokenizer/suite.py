"""A pytest class for tokenizers: a third party names the component, and gets every check as a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from megalm.testing.check import Suite
from megalm.testing.tokenizer.checks import CHECKS
from megalm.testing.tokenizer.subject import TokenizerSubject


class TokenizerSuite(Suite):
    """Subclass it in a test file and name an installed tokenizer::

        class TestMine(TokenizerSuite):
            tokenizer = "mine"

    The environment variable ``MEGALM_PROOF=full`` asks for the long form, ``MEGALM_SEED`` for other texts.
    """

    checks = CHECKS
    tokenizer: ClassVar[str]
    """The component, or ``plugin:component``."""
    settings: ClassVar[Sequence[str]] = ()
    """``key=value`` pairs for training, such as ``vocab_size=300``."""
    texts: ClassVar[Sequence[str] | None] = None
    """What to train on; default: a made-up text, as large as the settings ask for."""

    @classmethod
    def subject(cls) -> TokenizerSubject:
        return TokenizerSubject(
            cls.tokenizer,
            settings=cls.settings,
            texts=cls.texts,
            **cls.asked(),
        )
