"""Contracts of optimizers, learning-rate schedules and architectures: small, because torch's own types do the work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megalm.config.settings import Settings

if TYPE_CHECKING:
    import torch


class LogicalTensors(ABC):
    """What a rank's parameters hold of the model's tensors. A parameter may hold several (q, k and v lie in one), and
    of each all, or the rows or columns of this rank."""

    @abstractmethod
    def views(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The parts of ``tensor``, which is shaped like the parameter ``name``: a view for each logical tensor."""

    @abstractmethod
    def norms(self, *tensors: Mapping[str, torch.Tensor]) -> list[dict[str, list[torch.Tensor]]]:
        """For each mapping of parameters' names to tensors shaped like them, the 2-norms of the whole logical tensors,
        in the order of :meth:`views`: float64, 0-d, the same on every rank that has a part. All ranks must ask, for
        the same names.
        """


class OptimizerPlugin(ABC):
    """Builds a ``torch.optim.Optimizer``. ``Config`` validates ``[optimizer.NAME]``."""

    Config: ClassVar[type[Settings]] = Settings
    scope: ClassVar[Literal["elementwise", "tensor_norm"]] = "elementwise"
    """What an element's update depends on besides its own gradient and state: nothing, or norms of the whole tensor."""

    @classmethod
    @abstractmethod
    def build(cls, params: Mapping[str, torch.Tensor], lr: float, cfg: Any) -> torch.optim.Optimizer:
        """``params``: logical name to (local shard of) parameter. State must be per element or a 0-d ``step``.

        With the scope ``tensor_norm`` this is called with ``tensors`` (:class:`LogicalTensors`) as well, by keyword.
        """


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
