"""Vectors of texts, such that texts that mean the same are near each other. (Reimers and Gurevych, 2019; Gao et al.,
2021.)

It is trained on pairs: towards a number that says how alike two texts are, or so that each text finds its counterpart
among those of the whole cell. Both texts of a pair go through the backbone as rows of their own, the two views of an
example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from megalm.api import (
    Batch,
    BuildContext,
    ConfigError,
    Example,
    FieldSpec,
    HeadEnv,
    HuggingFaceHead,
    LossContext,
    Needs,
    Record,
    Settings,
    TensorSpec,
    Term,
)
from megalm_plugins.heads.pooled import FIRST, SECOND, PooledHead

if TYPE_CHECKING:
    import torch

_VIEWS = 2


class EmbeddingConfig(Settings):
    """Settings of the head."""

    pair: ClassVar[bool] = False
    token_types: ClassVar[bool] = False
    bias: ClassVar[bool] = True
    dropout: ClassVar[float] = 0.0

    loss: Literal["contrastive", "cosine"] = "contrastive"
    """``contrastive``: each text is to find its counterpart among those of its cell; ``cosine``: the cosine of two
    texts is to be the number ``value``."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """The vector of a row: the mean over its tokens, the first token's, or the last one's, for causal backbones."""
    size: int | None = Field(default=None, ge=1)
    """Numbers of a vector, through a linear layer; default: the backbone's, as they are."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the contrastive loss: cosines are divided by it."""
    low: float = 0.0
    """The ``value`` of texts that have nothing in common: cosine 0."""
    high: float = 1.0
    """The ``value`` of texts that mean the same: cosine 1."""
    metrics: tuple[str, ...] | None = None
    """Measures, the first of which chooses a checkpoint: ``recall@1``, ``recall@5``, ``recall@10``, ``recall@100``,
    ``mrr`` where the loss is contrastive, ``spearman``, ``pearson``, ``mse`` where it is cosine."""


class Embedding(PooledHead):
    """A row's vector, of length 1. Predictions: ``{"embedding": [...], "pair_embedding": [...], "similarity": x}``, x
    the cosine.

    ``contrastive``: -log softmax of the cosines with all counterparts of the cell, at the own one. ``cosine``: the
    squared error of the cosine. Retrieval is measured over all records: a text is to find its counterpart among
    all of them.
    """

    Config = EmbeddingConfig
    cfg: Any
    kind = "embedding"

    def __init__(self, cfg: EmbeddingConfig, env: HeadEnv) -> None:
        self._paired = cfg.loss == "contrastive"
        self.measured = "retrieval" if self._paired else "number"
        super().__init__(cfg, env)
        if cfg.low >= cfg.high:
            raise ConfigError([f"{self.kind}: low = {cfg.low}: expected less than high = {cfg.high}"])

    @property
    def outputs(self) -> int:
        return int(self.cfg.size or 0)

    def fields(self) -> Mapping[str, FieldSpec]:
        texts = {FIRST: FieldSpec("text", "a text"), SECOND: FieldSpec("text", "its counterpart")}
        if self._paired:
            return texts
        return {**texts, "value": FieldSpec("number", "how alike they are", label=True)}

    def text_fields(self) -> dict[str, FieldSpec]:
        """Of one row."""
        return {FIRST: FieldSpec("text", "a text")}

    def needs(self) -> Needs:
        needs = self.text_needs("value", TensorSpec(("batch",), dtype="float64", to="last"))
        return Needs(
            needs.attention,
            {**needs.tensors, "scored": TensorSpec(("batch",), dtype="bool", to="last")},
            lm_head=False,
            coupling="cell" if self._paired else "example",
        )

    def weights(self) -> Mapping[str, float]:
        return {self.kind: 1.0}

    def build_example(self, record: Record) -> Example:
        first, second = self.encode(record, [FIRST]), self.encode(record, [SECOND])
        return {
            **first,
            **{f"pair_{name}": value for name, value in second.items()},
            "value": record.get("value", 0.0),
            "scored": self._paired or "value" in record,
            "truncated": first["truncated"] or second["truncated"],
        }

    def collate(self, examples: Sequence[Example], length: int) -> Batch:
        rows: list[Example] = []
        for example in examples:
            pair = {name.removeprefix("pair_"): each for name, each in example.items() if name.startswith("pair_")}
            rows += [example, {**example, **pair}]
        return super().collate(rows, length)

    def length(self, example: Example) -> int:
        return max(len(each) for name, each in example.items() if name in ("tokens", "pair_tokens"))

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.kind: int(batch["scored"][::_VIEWS].sum())}

    def build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        from torch import nn

        return nn.ModuleDict({} if self.cfg.size is None else {"out": ctx.linear(hidden_size, self.cfg.size)})

    def _pairs(
        self, module: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """(examples, 2, size): vectors of length 1."""
        import torch.nn.functional as F

        x = self.vectors(module, hidden, batch, ctx)
        x = F.normalize(ctx.widen(x if self.cfg.size is None else module["out"](x)), dim=-1)
        return x.view(-1, _VIEWS, x.shape[-1])

    def hugging_face(self) -> HuggingFaceHead:
        return replace(
            super().hugging_face(),
            task="sentence_embedding",
            scores=lambda *given: self._pairs(*given).flatten(0, 1),
            rows=lambda record: [(record[FIRST],), (record[SECOND],)],
            output=None if self.cfg.size is None else "out",
        )

    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        import torch
        import torch.nn.functional as F

        pairs = self._pairs(module, hidden, batch, ctx)
        if self._paired:
            whole, offset = ctx.gather(pairs)
            scores = pairs[:, 0] @ whole[:, 1].T / self.cfg.temperature
            own = torch.arange(offset, offset + len(pairs), device=scores.device)
            return {self.kind: Term(F.cross_entropy(scores, own, reduction="sum"), scope="example")}
        wanted = (batch["value"][::_VIEWS] - self.cfg.low) / (self.cfg.high - self.cfg.low)
        error = (pairs.prod(dim=1).sum(dim=-1) - wanted.to(pairs.dtype)) * batch["scored"][::_VIEWS]
        return {self.kind: Term(error.square().sum(), scope="example")}

    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        pairs = self._pairs(module, hidden, batch, ctx)
        return [
            {"embedding": first, "pair_embedding": second, "similarity": cosine}
            for (first, second), cosine in zip(pairs.tolist(), pairs.prod(dim=1).sum(dim=-1).tolist(), strict=True)
        ]

    def truth(self, record: Record) -> Any:
        if not self._paired:
            return {"similarity": (float(record["value"]) - self.cfg.low) / (self.cfg.high - self.cfg.low)}
        # Some vector of the counterpart, the same for both and another for every other counterpart.
        seed = int.from_bytes(hashlib.sha256(record[SECOND].encode("utf-8", "surrogatepass")).digest())
        vector = np.random.default_rng(seed).normal(size=16)
        own = (vector / np.linalg.norm(vector)).tolist()
        return {"embedding": own, "pair_embedding": own}

    def default_measures(self) -> tuple[str, ...]:
        return ("recall@1", "recall@10", "mrr") if self._paired else ("spearman", "pearson")

    def value(self, prediction: Any) -> Any:
        if self._paired:
            return prediction["embedding"], prediction["pair_embedding"]
        return self.cfg.low + float(prediction["similarity"]) * (self.cfg.high - self.cfg.low)

    def right(self, record: Record) -> Any:
        return record[SECOND] if self._paired else float(record["value"])
