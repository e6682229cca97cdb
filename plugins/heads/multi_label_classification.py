"""Classification of texts and of pairs of texts where any number of labels may hold: a yes or no for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megalm.api import Batch, ConfigError, Example, FieldSpec, HeadEnv, LossContext, Needs, Record, TensorSpec, Term
from megalm_plugins.heads.measured import labels_config
from megalm_plugins.heads.pooled import PooledConfig, PooledHead

if TYPE_CHECKING:
    import torch

_UNKNOWN = -1


class MultiLabelConfig(PooledConfig):
    """Settings of the head."""

    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Labels at least as probable as this are predicted."""


class MultiLabelClassification(PooledHead):
    """The cross-entropy of each label's yes or no, its mean over the labels. Predictions: ``{"labels": [NAME, ...],
    "probabilities": {NAME: p}}``, labels in the order of their numbers.
    """

    Config = MultiLabelConfig
    cfg: MultiLabelConfig
    kind = "multi_label_classification"
    measured = "classes"

    def __init__(self, cfg: MultiLabelConfig, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        if not env.labels:
            raise ConfigError([f"{self.kind} needs labels"])

    @property
    def outputs(self) -> int:
        return len(self.env.labels)

    def fields(self) -> Mapping[str, FieldSpec]:
        return {**self.text_fields(), "labels": FieldSpec("classes", "the labels of the text", label=True)}

    def needs(self) -> Needs:
        return self.text_needs("chosen", TensorSpec(("batch", "label"), to="last"))

    def hugging_face_config(self) -> Mapping[str, Any]:
        return {"problem_type": "multi_label_classification", **labels_config(self.env.labels)}

    def weights(self) -> Mapping[str, float]:
        return {self.kind: 1.0}

    def build_example(self, record: Record) -> Example:
        chosen = np.full(len(self.env.labels), _UNKNOWN, dtype=np.int64)
        if "labels" in record:
            chosen = np.array([label in record["labels"] for label in self.env.labels], dtype=np.int64)
        return {**self.encode(record), "chosen": chosen}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.kind: int((batch["chosen"][:, 0] != _UNKNOWN).sum())}

    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        import torch.nn.functional as F

        logits, chosen = self.scores(module, hidden, batch, ctx), batch["chosen"]
        each = F.binary_cross_entropy_with_logits(logits, chosen.clamp(min=0).to(logits.dtype), reduction="none")
        return {self.kind: Term((each.mean(dim=1) * (chosen[:, 0] != _UNKNOWN)).sum(), scope="example")}

    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        labels = self.env.labels
        return [
            {
                "labels": [label for label, p in zip(labels, row, strict=True) if p >= self.cfg.threshold],
                "probabilities": dict(zip(labels, row, strict=True)),
            }
            for row in self.scores(module, hidden, batch, ctx).sigmoid().tolist()
        ]

    def truth(self, record: Record) -> Any:
        return {"labels": list(record["labels"])}

    def default_measures(self) -> tuple[str, ...]:
        return ("f1_micro", "f1_macro", "accuracy")

    def value(self, prediction: Any) -> Any:
        return prediction["labels"]

    def right(self, record: Record) -> Any:
        return record["labels"]
