"""First-party optimizers."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 0)


@hookimpl
def megalm_optimizers() -> Iterable[Component]:
    yield Component("adamw", "megalm_plugins.optimizers.adamw:AdamW", "Adam with decoupled weight decay (torch, fused)")
    yield Component("apex_adamw", "megalm_plugins.optimizers.apex_adamw:ApexAdamW", "the same by NVIDIA apex (CUDA)")
