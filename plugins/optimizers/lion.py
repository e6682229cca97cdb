"""Lion: the sign of a momentum, whose size is the learning rate alone. (Chen et al., Symbolic Discovery of Optimization
Algorithms, 2023, program 1.) It wants about a tenth of AdamW's rate and ten times its decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megalm.api import OptimizerPlugin, Settings
from megalm_plugins.optimizers.adamw import decay_groups

if TYPE_CHECKING:
    import torch


class LionConfig(Settings):
    """Settings of ``[optimizer.lion]``."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the momentum, beside the gradient, in the direction whose sign is taken."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the momentum."""
    weight_decay: float = Field(default=1.0, ge=0)
    """Decoupled weight decay of matrices."""


class Lion(OptimizerPlugin):
    """Element-wise."""

    Config = LionConfig

    @classmethod
    def build(cls, params: Mapping[str, torch.Tensor], lr: float, cfg: LionConfig) -> torch.optim.Optimizer:
        import torch

        class Signs(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                for group in self.param_groups:
                    own = [p for p in group["params"] if p.grad is not None]
                    if not own:
                        continue
                    for p in own:
                        if not self.state[p]:
                            self.state[p]["exp_avg"] = torch.zeros_like(p)
                    momenta = [self.state[p]["exp_avg"] for p in own]
                    gradients = [p.grad for p in own if p.grad is not None]
                    directions = torch._foreach_lerp(momenta, gradients, 1 - cfg.beta1)
                    torch._foreach_sign_(directions)
                    torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(own, directions, alpha=-group["lr"])
                    torch._foreach_lerp_(momenta, gradients, 1 - cfg.beta2)

        return Signs(decay_groups(params, cfg.weight_decay), {"lr": lr})
