"""First-party callbacks: records of a run for other programs to show."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 0)


@hookimpl
def megalm_callbacks() -> Iterable[Component]:
    yield Component("tensorboard", "megalm_plugins.callbacks.tensorboard:TensorBoard", "event files for TensorBoard")
    yield Component("wandb", "megalm_plugins.callbacks.wandb:WandB", "Weights & Biases, online or offline")
