"""All that a tokenizer is held to, in the order in which a reader wants to know."""

from __future__ import annotations

from megalm.testing.check import Check
from megalm.testing.component_checks import component_checks
from megalm.testing.tokenizer import decoding, encoding, files, training
from megalm.testing.tokenizer.subject import TokenizerSubject

CHECKS: tuple[Check[TokenizerSubject], ...] = (
    *component_checks("tokenizers"),
    *training.CHECKS,
    *files.CHECKS,
    *encoding.CHECKS,
    *decoding.CHECKS,
)
"""The checks that all kinds share come first."""
