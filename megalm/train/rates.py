"""The run's optimizer over what trains, with a learning rate for each depth.

Optimizers of plugins group parameters as they like. A group whose parameters move at different rates is split, with
everything else that it says; the schedule's rate is then multiplied by each group's own number. Where all depths move
alike the groups stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megalm.optim.logical import HeldTensors
from megalm.optim.weights import Weights
from megalm.train.prepare import Prepared

SCALE = "lr_scale"


def make_optimizer(prepared: Prepared, weights: Weights) -> torch.optim.Optimizer:
    """The optimizer of this rank; one without work where all of its weights are frozen."""
    lr = prepared.resolved.config.train.lr
    if not weights.trained:
        return torch.optim.SGD([torch.zeros(0)], lr=lr)
    plugin, more = prepared.optimizer, {}
    if plugin.scope == "tensor_norm":
        more["tensors"] = HeldTensors(weights, prepared.spec.kernels.sums_of_squares)
    optimizer = plugin.build(weights.trained, lr, prepared.optimizer_settings, **more)
    tuning, layers = prepared.spec.tuning, prepared.spec.cfg.layers
    if tuning.layer_decay != 1.0:
        scales = {id(master): tuning.rate_scale(name, layers) for name, master in weights.trained.items()}
        split_groups(optimizer, scales)
    return optimizer


def split_groups(optimizer: torch.optim.Optimizer, scales: Mapping[int, float]) -> None:
    """Split an optimizer's groups so that each has parameters of one scale. ``scales``: by the parameter's id."""
    groups = []
    for group in optimizer.param_groups:
        by_scale: dict[float, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scales[id(parameter)], []).append(parameter)
        rest = {key: value for key, value in group.items() if key != "params"}
        groups += [{"params": parameters, **rest, SCALE: scale} for scale, parameters in by_scale.items()]
    optimizer.param_groups[:] = groups


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set what the schedule says for this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(SCALE, 1.0)
