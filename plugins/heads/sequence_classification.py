"""Classification of texts and of pairs of texts, one label each. (Devlin et al., BERT, 2019.)"""

from __future__ import annotations

from collections.abc import Mapping

from megalm.api import Example, FieldSpec, Needs, Record, TensorSpec
from megalm_plugins.heads.one_label import OneLabelHead
from megalm_plugins.heads.pooled import PooledHead


class SequenceClassification(PooledHead, OneLabelHead):
    """A linear layer on a row's vector."""

    kind = "sequence_classification"

    @property
    def outputs(self) -> int:
        return len(self.env.labels)

    def fields(self) -> Mapping[str, FieldSpec]:
        return {**self.text_fields(), "label": FieldSpec("class", "the label of the text", label=True)}

    def needs(self) -> Needs:
        return self.text_needs("label", TensorSpec(("batch",), to="last"))

    def build_example(self, record: Record) -> Example:
        return {**self.encode(record), "label": self.number(record)}
