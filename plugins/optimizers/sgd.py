"""Stochastic gradient descent with momentum, torch's. (Sutskever et al., 2013, as torch writes it.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from megalm.api import OptimizerPlugin, Settings
from megalm_plugins.optimizers.adamw import decay_groups

if TYPE_CHECKING:
    import torch


class SGDConfig(Settings):
    """Settings of ``[optimizer.sgd]``."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the sum of gradients that is followed; 0 follows each gradient alone, and keeps no state."""
    nesterov: bool = False
    """Look ahead: follow the gradient and the momentum after it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Added to the gradients of matrices, times the weights."""

    @model_validator(mode="after")
    def _looks_ahead_of_something(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true looks ahead by the momentum, which is 0; set momentum")
        return self


class SGD(OptimizerPlugin):
    """Element-wise."""

    Config = SGDConfig

    @classmethod
    def build(cls, params: Mapping[str, torch.Tensor], lr: float, cfg: SGDConfig) -> torch.optim.Optimizer:
        import torch

        groups = decay_groups(params, cfg.weight_decay)
        return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.nesterov, foreach=True)
