"""Contracts of optimizers, learning-rate schedules and architectures: small, because torch's own types do the work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megalm.config.settings import Settings

if TYPE_CHECKING:
    import torch


class OptimizerPlugin(ABC):
    """Builds a ``torch.optim.Optimizer``. ``Config`` validates ``[optimizer.NAME]``."""

    Config: ClassVar[type[Settings]] = Settings

    @classmethod
    @abstractmethod
    def build(cls, params: Mapping[str, torch.Tensor], lr: float, cfg: Any) -> torch.optim.Optimizer:
        """``params``: logical name to (local shard of) parameter. State must be per element or a 0-d ``step``."""


class LRSchedule(ABC):
    """The learning rate as a pure function of the step, so that resuming needs no state."""

    Config: ClassVar[type[Settings]] = Settings

    def __init__(self, cfg: Any, lr: float, steps: int) -> None:
        self.cfg = cfg
        self.lr = lr
        self.steps = steps

    @abstractmethod
    def at(self, step: int) -> float:
        """Learning rate of a step, the first being 0."""


class Architecture:
    """Defaults of ``[model]`` for a family of models."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Keys of ``[model]`` and their values."""
