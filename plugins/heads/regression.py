"""A number for each text or pair of texts, such as how alike the two are. (Devlin et al., BERT, 2019, on STS-B.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalm.api import Batch, Example, FieldSpec, LossContext, Needs, Record, TensorSpec, Term
from megalm_plugins.heads.measured import labels_config
from megalm_plugins.heads.pooled import PooledHead

if TYPE_CHECKING:
    import torch


class Regression(PooledHead):
    """The squared error, in the square of the numbers' unit. Predictions: ``{"value": x}``."""

    kind = "regression"
    measured = "number"
    outputs = 1

    def fields(self) -> Mapping[str, FieldSpec]:
        return {**self.text_fields(), "value": FieldSpec("number", "the number to predict", label=True)}

    def needs(self) -> Needs:
        needs = self.text_needs("value", TensorSpec(("batch",), dtype="float64", to="last"))
        return Needs(
            needs.attention,
            {**needs.tensors, "scored": TensorSpec(("batch",), dtype="bool", to="last")},
            lm_head=False,
            token_types=needs.token_types,
            coupling="example",
        )

    def hugging_face_config(self) -> Mapping[str, Any]:
        return {"problem_type": "regression", **labels_config([self.kind])}

    def weights(self) -> Mapping[str, float]:
        return {self.kind: 1.0}

    def build_example(self, record: Record) -> Example:
        return {**self.encode(record), "value": record.get("value", 0.0), "scored": "value" in record}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.kind: int(batch["scored"].sum())}

    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        found = self.scores(module, hidden, batch, ctx)[:, 0]
        error = (found - batch["value"].to(found.dtype)) * batch["scored"]
        return {self.kind: Term(error.square().sum(), scope="example")}

    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        return [{"value": value} for value in self.scores(module, hidden, batch, ctx)[:, 0].tolist()]

    def truth(self, record: Record) -> Any:
        return {"value": float(record["value"])}

    def default_measures(self) -> tuple[str, ...]:
        return ("pearson", "spearman", "mse")

    def value(self, prediction: Any) -> Any:
        return float(prediction["value"])

    def right(self, record: Record) -> Any:
        return float(record["value"])
