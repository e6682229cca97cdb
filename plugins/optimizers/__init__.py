"""First-party optimizers."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 9)


@hookimpl
def megalm_optimizers() -> Iterable[Component]:
    yield Component("adamw", "megalm_plugins.optimizers.adamw:AdamW", "Adam with decoupled weight decay (torch, fused)")
    yield Component("apex_adamw", "megalm_plugins.optimizers.apex_adamw:ApexAdamW", "the same by NVIDIA apex (CUDA)")
    yield Component("lamb", "megalm_plugins.optimizers.lamb:Lamb", "Adam, each matrix's step as long as its norm says")
    yield Component("lion", "megalm_plugins.optimizers.lion:Lion", "the sign of a momentum")
    yield Component("sgd", "megalm_plugins.optimizers.sgd:SGD", "gradient descent with momentum (torch)")
