"""First-party heads."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 1)


@hookimpl
def megalm_heads() -> Iterable[Component]:
    package = "megalm_plugins.heads"
    yield Component(
        "sequence_classification",
        f"{package}.sequence_classification:SequenceClassification",
        "one label for a text or a pair of texts",
    )
    yield Component(
        "token_classification", f"{package}.token_classification:TokenClassification", "a label for each word of a text"
    )
    yield Component("regression", f"{package}.regression:Regression", "a number for a text or a pair of texts")
