"""LAMB: Adam's direction, each matrix's scaled so that its step is the learning rate times its own norm. (You et al.,
Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020, algorithm 2, with bias correction.)

Vectors (norm weights and biases) neither decay nor are scaled, as in the paper's experiments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megalm.api import LogicalTensors, OptimizerPlugin, Settings
from megalm_plugins.optimizers.adamw import decay_groups

if TYPE_CHECKING:
    import torch

_SCALED = "scaled"


class LambConfig(Settings):
    """Settings of ``[optimizer.lamb]``."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of matrices, a part of the direction that is scaled."""


class Lamb(OptimizerPlugin):
    """The scale is that of a logical tensor: of q, k and v each has its own, and ranks that share one agree."""

    Config = LambConfig
    scope = "tensor_norm"

    @classmethod
    def build(
        cls,
        params: Mapping[str, torch.Tensor],
        lr: float,
        cfg: LambConfig,
        *,
        tensors: LogicalTensors | None = None,
    ) -> torch.optim.Optimizer:
        import torch

        assert tensors is not None, "the engine gives them for this scope"
        held: LogicalTensors = tensors
        names = {id(p): name for name, p in params.items()}

        class Scaled(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                moves: list[tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor]]] = []
                weights: dict[str, torch.Tensor] = {}
                updates: dict[str, torch.Tensor] = {}
                for group in self.param_groups:
                    own = [p for p in group["params"] if p.grad is not None]
                    if own:
                        moves.append((group, own, self._directions(own, group["weight_decay"])))
                for group, own, directions in moves:
                    if group[_SCALED]:
                        weights |= {names[id(p)]: p for p in own}
                        updates |= {names[id(p)]: update for p, update in zip(own, directions, strict=True)}
                of_weights, of_updates = held.norms(weights, updates)
                for name, update in updates.items():
                    parts = zip(held.views(name, update), of_weights[name], of_updates[name], strict=True)
                    for view, weight, size in parts:
                        # A tensor of zeros, or an update of zeros, moves as Adam moves it.
                        ratio = torch.where((weight > 0) & (size > 0), weight / size, 1.0)
                        view.mul_(ratio.to(view.dtype))
                for group, own, directions in moves:
                    torch._foreach_add_(own, directions, alpha=-group["lr"])

            def _directions(self, own: list[torch.Tensor], decay: float) -> list[torch.Tensor]:
                for p in own:
                    if not self.state[p]:
                        self.state[p].update(
                            step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                        )
                means, squares = ([self.state[p][key] for p in own] for key in ("exp_avg", "exp_avg_sq"))
                gradients = [p.grad for p in own if p.grad is not None]
                for p in own:
                    self.state[p]["step"] += 1
                number = int(self.state[own[0]]["step"])
                torch._foreach_lerp_(means, gradients, 1 - cfg.beta1)
                torch._foreach_mul_(squares, cfg.beta2)
                torch._foreach_addcmul_(squares, gradients, gradients, 1 - cfg.beta2)
                roots = torch._foreach_div(squares, 1 - cfg.beta2**number)
                torch._foreach_sqrt_(roots)
                torch._foreach_add_(roots, cfg.eps)
                directions = torch._foreach_div(means, 1 - cfg.beta1**number)
                torch._foreach_div_(directions, roots)
                if decay:
                    torch._foreach_add_(directions, own, alpha=decay)
                return list(directions)

        groups = decay_groups(params, cfg.weight_decay)
        for group in groups:
            group[_SCALED] = group["params"][0].dim() > 1
        return Scaled(groups, {"lr": lr})
