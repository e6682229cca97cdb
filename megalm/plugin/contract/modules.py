"""How an objective or a head owns parameters: it describes a module, the engine makes it.

The module is built on the meta device from what the context gives, so that each parameter has a declared layout and
initial values that are a function of the seed and its name. Gradients, the gradient's norm, checkpoints and parity
follow from that, as they do for the backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class BuildContext(Protocol):
    """Makes the parts of a module. It knows the model, and nothing of ranks.

    A parameter made here is whole on every rank, because what a plugin computes between calls of
    :class:`~megalm.plugin.contract.objective.LossContext` is computed alike on every tensor-parallel rank. Every
    parameter of the module has to be made here, and is used under one name; buffers are refused, since no checkpoint
    would hold them. Dropout is ``LossContext.dropout``, never a module of torch's, which draws from a stream.
    """

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> torch.nn.Module:
        """``x @ weight.T + bias`` with weight (outputs, inputs): normal with the model's ``init_std``, bias 0."""
        ...

    def norm(self, size: int) -> torch.nn.Module:
        """Normalisation over the last dimension, of the model's kind."""
        ...

    def parameter(self, shape: tuple[int, ...], *, std: float | None = None, value: float = 0.0) -> torch.nn.Parameter:
        """A parameter of any shape: normal with mean 0 where ``std`` is given, else filled with ``value``."""
        ...


ModuleBuilder = Callable[[int, BuildContext], "torch.nn.Module"]
"""``build(hidden_size, ctx)``; called on every rank, and must return the same each time."""
