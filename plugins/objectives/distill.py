"""Learning from another model's predictions. (Hinton et al., "Distilling the knowledge in a neural network", 2015; Sanh
et al., "DistilBERT", 2019.)

At every position that ``mlm`` or ``causal_lm`` scores, the model's distribution over the vocabulary is brought near to
that of the teacher, a checkpoint of any size with the same tokenizer. Both see the same rows, which another objective
builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megalm.api import (
    IGNORE,
    Batch,
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


class DistillConfig(Settings):
    """Settings of ``[objective.distill]``."""

    teacher: str | None = None
    """A checkpoint, or the folder of a run, of which the newest is taken."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    temperature: float = Field(default=2.0, gt=0)
    """Both models' logits are divided by it."""


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

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(to="last")}
        assert self.cfg.teacher is not None  # as __init__ has found
        return Needs(None, tensors, teacher=Teacher(self.cfg.teacher))

    def weights(self) -> Mapping[str, float]:
        return {"distill": self.cfg.weight}

    def num_samples(self, corpus: Corpus) -> int:
        raise NotImplementedError("distill scores rows that another objective builds")

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        raise NotImplementedError("distill scores rows that another objective builds")

    def extend_example(self, example: Example, rng: np.random.Generator) -> Example:
        return example

    def collate(self, examples: list[Example]) -> Batch:
        return {}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"distill": int((batch["labels"] != IGNORE).sum())}

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        scored = batch["labels"] != IGNORE
        return {"distill": Term(ctx.distill_loss(hidden, scored, self.cfg.temperature).sum())}
