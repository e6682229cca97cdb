"""First-party heads."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 5)


@hookimpl
def megalm_heads() -> Iterable[Component]:
    package = "megalm_plugins.heads"
    yield Component(
        "sequence_classification",
        f"{package}.sequence_classification:SequenceClassification",
        "one label for a text or a pair of texts",
    )
    yield Component(
        "multi_label_classification",
        f"{package}.multi_label_classification:MultiLabelClassification",
        "any number of labels for a text or a pair of texts",
    )
    yield Component(
        "token_classification", f"{package}.token_classification:TokenClassification", "a label for each word of a text"
    )
    yield Component(
        "extractive_qa", f"{package}.extractive_qa:ExtractiveQA", "the stretch of a text that answers a question"
    )
    yield Component(
        "relation_classification",
        f"{package}.relation_classification:RelationClassification",
        "the relation between two marked spans of a text",
    )
    yield Component("embedding", f"{package}.embedding:Embedding", "vectors of texts, by pairs that mean the same")
    yield Component("regression", f"{package}.regression:Regression", "a number for a text or a pair of texts")
