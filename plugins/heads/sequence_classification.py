"""Classification of texts and of pairs of texts, one label each. (Devlin et al., BERT, 2019.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from megalm.api import (
    IGNORE,
    Batch,
    ConfigError,
    Example,
    FieldSpec,
    HeadEnv,
    LossContext,
    Needs,
    Record,
    TensorSpec,
    Term,
)
from megalm_plugins.heads.pooled import PooledConfig, PooledHead
from megalm_plugins.heads.scores import accuracy, macro_f1

if TYPE_CHECKING:
    import torch


class SequenceClassification(PooledHead):
    """The cross-entropy of the right label. Predictions: ``{"label": NAME, "probabilities": {NAME: p}}``."""

    kind = "sequence_classification"

    def __init__(self, cfg: PooledConfig, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        if len(env.labels) < 2:
            raise ConfigError([f"{self.kind} needs at least two labels; found {list(env.labels)}"])

    @property
    def outputs(self) -> int:
        return len(self.env.labels)

    def fields(self) -> Mapping[str, FieldSpec]:
        return {**self.text_fields(), "label": FieldSpec("class", "the label of the text", label=True)}

    def needs(self) -> Needs:
        return self.text_needs("label", TensorSpec(("batch",), to="last"))

    def weights(self) -> Mapping[str, float]:
        return {self.kind: 1.0}

    def build_example(self, record: Record) -> Example:
        label = self.env.labels.index(record["label"]) if "label" in record else IGNORE
        return {**self.encode(record), "label": label}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.kind: int((batch["label"] != IGNORE).sum())}

    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        import torch.nn.functional as F

        logits = self.scores(module, hidden, batch, ctx)
        total = F.cross_entropy(logits, batch["label"], reduction="sum", ignore_index=IGNORE)
        return {self.kind: Term(total, scope="example")}

    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        rows = self.scores(module, hidden, batch, ctx).softmax(dim=-1).tolist()
        labels = self.env.labels
        return [
            {
                "label": labels[max(range(len(row)), key=row.__getitem__)],
                "probabilities": dict(zip(labels, row, strict=True)),
            }
            for row in rows
        ]

    def truth(self, record: Record) -> Any:
        return {"label": record["label"]}

    def goals(self) -> Mapping[str, Literal["max", "min"]]:
        return {"accuracy": "max", "f1_macro": "max"}

    def metrics(self, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
        predicted = [prediction["label"] for prediction in predictions]
        true = [record["label"] for record in records]
        return {"accuracy": accuracy(predicted, true), "f1_macro": macro_f1(predicted, true, self.env.labels)}
