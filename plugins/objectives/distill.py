"""Learning from another model. (Hinton et al., "Distilling the knowledge in a neural network", 2015; Sanh et al.,
"DistilBERT", 2019; Jiao et al., "TinyBERT", 2020.)

At every position that ``mlm`` or ``causal_lm`` scores, the model's distribution over the vocabulary is brought near to
that of the teacher, a checkpoint of any size with the same tokenizer. Both see the same rows, which another objective
builds. The last hidden vectors at these positions may be brought near to the teacher's as well, through a linear map
that is trained with the model. Inner layers are not compared: in a pipeline the teacher's may lie on another rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megalm.api import (
    IGNORE,
    Batch,
    BuildContext,
    ConfigError,
    Corpus,
    Example,
    LossContext,
    Needs,
    Objective,
    ObjectiveEnv,
    Settings,
    Teacher,
    TensorSpec,
    Term,
)

if TYPE_CHECKING:
    import torch


_PROJECTION = "distill_projection"


class DistillConfig(Settings):
    """Settings of ``[objective.distill]``."""

    teacher: str | None = None
    """A checkpoint, or the folder of a run, of which the newest is taken."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    temperature: float = Field(default=2.0, gt=0)
    """Both models' logits are divided by it."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error of projected hidden vectors; 0: there is no such term."""
    teacher_hidden_size: int | None = Field(default=None, ge=1)
    """The teacher's model.hidden_size, for the projection of hidden vectors; given with hidden_weight."""


class Distill(Objective):
    """Scores what another objective labels."""

    Config = DistillConfig
    cfg: DistillConfig
    packs = True  # as those do whose rows it scores
    joins = ("mlm", "causal_lm")
    checkpoints = ("teacher",)

    def __init__(self, cfg: DistillConfig, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        if cfg.teacher is None:
            raise ConfigError(["objective.distill.teacher: missing; name a checkpoint or the folder of a run"])
        if cfg.hidden_weight and cfg.teacher_hidden_size is None:
            raise ConfigError(
                ["objective.distill.teacher_hidden_size: missing; with hidden_weight, give the teacher's hidden_size"]
            )

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(to="last")}
        assert self.cfg.teacher is not None  # as __init__ has found
        modules = {_PROJECTION: self._build} if self.cfg.hidden_weight else {}
        return Needs(None, tensors, modules=modules, teacher=Teacher(self.cfg.teacher, self.cfg.teacher_hidden_size))

    def _build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        assert self.cfg.teacher_hidden_size is not None
        return ctx.linear(hidden_size, self.cfg.teacher_hidden_size, bias=False)

    def weights(self) -> Mapping[str, float]:
        hidden = {"distill_hidden": self.cfg.hidden_weight} if self.cfg.hidden_weight else {}
        return {"distill": self.cfg.weight, **hidden}

    def num_samples(self, corpus: Corpus) -> int:
        raise NotImplementedError("distill scores rows that another objective builds")

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        raise NotImplementedError("distill scores rows that another objective builds")

    def extend_example(self, example: Example, rng: np.random.Generator) -> Example:
        return example

    def collate(self, examples: list[Example]) -> Batch:
        return {}

    def counts(self, batch: Batch) -> dict[str, int]:
        return dict.fromkeys(self.weights(), int((batch["labels"] != IGNORE).sum()))

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        scored = batch["labels"] != IGNORE
        terms = {"distill": Term(ctx.distill_loss(hidden, scored, self.cfg.temperature).sum())}
        if self.cfg.hidden_weight:
            import torch
            import torch.nn.functional as F

            own, its = ctx.module(_PROJECTION)(ctx.select(hidden, scored)), ctx.teacher_hidden(scored)
            wide = torch.promote_types(own.dtype, torch.float32)
            errors = F.mse_loss(own.to(wide), its.to(wide), reduction="none")
            terms["distill_hidden"] = Term(errors.mean(1).sum())
        return terms
