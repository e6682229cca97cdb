"""Replaced token detection. (Clark et al., "ELECTRA", 2020.)

A smaller model, the generator, fills masked places with tokens of its own; the backbone is to say of every token
whether it is the one that stood there. The generator learns masked language modelling: what it draws has no gradient.
Both have one embedding. A token that the generator guesses right is no replacement.

After training the generator has done its part: what is kept is the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megalm.api import (
    IGNORE,
    AuxModel,
    Batch,
    BuildContext,
    Example,
    LossContext,
    Needs,
    PrepareContext,
    PreparedBatch,
    Prepares,
    TensorSpec,
    Term,
)

from .mlm import MaskedLM, MaskedLMConfig

if TYPE_CHECKING:
    import torch

GENERATOR = "generator"


class ReplacedTokensConfig(MaskedLMConfig):
    """Settings of ``[objective.rtd]``."""

    weight: float = Field(default=50.0, gt=0)
    """Weight of telling replaced tokens in the total."""
    generator_weight: float = Field(default=1.0, gt=0)
    """Weight of the generator's masked language modelling."""
    generator_width: float = Field(default=0.25, gt=0, le=1)
    """Share of the model's hidden size, heads and inner size that the generator has."""
    generator_layers: int | None = Field(default=None, ge=1)
    """Layers of the generator; as many as the model's where it is left out."""
    generator_heads: int | None = Field(default=None, ge=1)
    """Heads of the generator; the share that generator_width says where it is left out."""
    temperature: float = Field(default=1.0, gt=0)
    """The generator's logits are divided by it before a token is drawn."""
    mask_share: float = Field(default=0.85, ge=0, le=1)
    """Of the chosen tokens, the share that the generator sees as the mask token."""
    random_share: float = Field(default=0.0, ge=0, le=1)
    """Of the chosen tokens, the share that it sees as a random one; it sees the rest as they are."""


class ReplacedTokens(MaskedLM):
    """Rows are those of ``mlm``; what is chosen there, the generator draws here."""

    Config = ReplacedTokensConfig
    cfg: ReplacedTokensConfig
    version = 1
    name = "rtd"

    def needs(self) -> Needs:
        tensors = {**super().needs().tensors, "labels": TensorSpec(), "replaced": TensorSpec(to="last")}
        generator = AuxModel(self.cfg.generator_width, self.cfg.generator_layers, self.cfg.generator_heads)
        return Needs(
            "bidirectional",
            tensors,
            lm_head=False,
            modules={"rtd": detector},
            aux_models={GENERATOR: generator},
            prepares=Prepares(("tokens", "replaced"), ("rtd_generator",)),
        )

    perplexities = ("rtd_generator",)

    def weights(self) -> Mapping[str, float]:
        return {"rtd": self.cfg.weight, "rtd_generator": self.cfg.generator_weight}

    def extend_example(self, example: Example, rng: np.random.Generator) -> Example:
        example = super().extend_example(example, rng)
        present = example.get("attention_mask", np.ones(len(example["tokens"]), dtype=bool))
        return {**example, "replaced": np.where(present, 0, IGNORE)}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {
            "rtd": int((batch["replaced"] != IGNORE).sum()),
            "rtd_generator": int((batch["labels"] != IGNORE).sum()),
        }

    def prepare(self, batch: Mapping[str, torch.Tensor], ctx: PrepareContext) -> PreparedBatch:
        import torch

        labels, replaced = batch["labels"], batch["replaced"]
        chosen = labels != IGNORE
        hidden = ctx.hidden(GENERATOR)
        losses = ctx.lm_loss(GENERATOR, hidden, labels, where=chosen)
        drawn = ctx.sample(
            GENERATOR,
            hidden,
            chosen,
            temperature=self.cfg.temperature,
            size=self.env.tokenizer.vocab_size,
        )
        original = torch.where(chosen, labels, batch["tokens"])
        tokens = original.masked_scatter(chosen, drawn)
        told = torch.where(replaced == IGNORE, replaced, (tokens != original).to(replaced.dtype))
        return PreparedBatch({"tokens": tokens, "replaced": told}, {"rtd_generator": Term(losses.sum())})

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        import torch.nn.functional as F

        scored = batch["replaced"] != IGNORE
        logits = ctx.widen(ctx.module("rtd")(ctx.select(hidden, scored)))
        told = batch["replaced"][scored].to(logits.dtype)
        return {"rtd": Term(F.binary_cross_entropy_with_logits(logits, told, reduction="sum"))}


def detector(width: int, ctx: BuildContext) -> torch.nn.Module:
    """A dense layer with GELU, and one logit."""
    from torch import nn

    return nn.Sequential(ctx.linear(width, width), nn.GELU(), ctx.linear(width, 1), nn.Flatten(0))
