"""AdamW through torch's fused implementation. (Loshchilov and Hutter, 2019.)

Matrices decay; vectors (norm weights and biases) do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megalm.api import OptimizerPlugin, Settings

if TYPE_CHECKING:
    import torch


class AdamWConfig(Settings):
    """Settings of ``[optimizer.adamw]``."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices."""


class AdamW(OptimizerPlugin):
    """Element-wise, so that shards need nothing of each other."""

    Config = AdamWConfig

    @classmethod
    def build(cls, params: Mapping[str, torch.Tensor], lr: float, cfg: AdamWConfig) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            decay_groups(params, cfg.weight_decay),
            lr=lr,
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.eps,
            fused=True,
        )


def decay_groups(params: Mapping[str, torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: those that decay, and those that do not; empty ones are left out."""
    groups = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
