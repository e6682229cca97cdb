"""What heads share that give each row one of the labels: loss, predictions and measures of a score for each label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalm.api import IGNORE, Batch, ConfigError, HeadEnv, LossContext, Record, Term
from megalm_plugins.heads.measured import MeasuredHead, labels_config

if TYPE_CHECKING:
    import torch


class OneLabelHead(MeasuredHead):
    """The cross-entropy of the right label. Predictions: ``{"label": NAME, "probabilities": {NAME: p}}``."""

    measured = "class"

    def __init__(self, cfg: Any, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        if len(env.labels) < 2:
            raise ConfigError([f"{self.kind} needs at least two labels; found {list(env.labels)}"])

    @abstractmethod
    def scores(
        self, module: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """(batch, labels), in the type that losses are computed in."""

    def number(self, record: Record) -> int:
        """The number of a record's label."""
        return self.env.labels.index(record["label"]) if "label" in record else IGNORE

    def hugging_face_config(self) -> Mapping[str, Any]:
        return {"problem_type": "single_label_classification", **labels_config(self.env.labels)}

    def weights(self) -> Mapping[str, float]:
        return {self.kind: 1.0}

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

    def default_measures(self) -> tuple[str, ...]:
        return ("accuracy", "f1_macro")

    def value(self, prediction: Any) -> Any:
        return prediction["label"]

    def right(self, record: Record) -> Any:
        return record["label"]
