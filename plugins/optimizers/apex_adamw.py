"""AdamW by NVIDIA apex's FusedAdam, which updates all tensors in few launches.

apex counts steps in the optimizer's groups, where a checkpoint does not look. Here the count lies with each tensor's
state, as in torch's AdamW, so that a resumed run corrects its means as one that was not interrupted.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalm.api import OptimizerPlugin, PluginError
from megalm_plugins.kernels import apex
from megalm_plugins.optimizers.adamw import AdamWConfig, decay_groups

if TYPE_CHECKING:
    import torch


class ApexAdamW(OptimizerPlugin):
    """Element-wise, so that shards need nothing of each other; on CUDA alone. Settings as ``adamw``'s."""

    Config = AdamWConfig

    @classmethod
    def build(cls, params: Mapping[str, torch.Tensor], lr: float, cfg: AdamWConfig) -> torch.optim.Optimizer:
        why = apex.problem("amp_C")
        if why is None and any(p.device.type != "cuda" for p in params.values()):
            why = "apex computes on CUDA alone"
        if why is not None:
            raise PluginError(f'optimizer "apex_adamw": {why}; "adamw" is torch\'s own')
        optimizer: torch.optim.Optimizer = counted(importlib.import_module("apex.optimizers").FusedAdam)(
            decay_groups(params, cfg.weight_decay), lr=lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, adam_w_mode=True
        )
        return optimizer


def counted(fused_adam: Any) -> Any:
    """A subclass whose steps are counted in ``state[parameter]["step"]``."""
    import torch

    class Counted(fused_adam):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                counts = (self.state[p]["step"] for p in group["params"] if "step" in self.state[p])
                group["step"] = int(next(counts, 0))
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if self.state[p]:  # apex takes an empty state for one that it has to make
                        self.state[p]["step"] = torch.tensor(float(group["step"]))
            return loss

    return Counted
