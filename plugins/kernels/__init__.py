"""First-party kernels: other projects' implementations of the engine's operations."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 3)


@hookimpl
def megalm_kernels() -> Iterable[Component]:
    yield Component("apex", "megalm_plugins.kernels.apex:Apex", "NVIDIA apex's fused norms (CUDA; built from source)")
