"""The contract of kernels: implementations of the operations that a model computes with.

A provider is asked once, when a run is built, about each operation that the model has; what it answers holds for the
whole run. So nothing is decided while training, and the report of a run can say what computed it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "rms_norm": ("rms_norm", "add_rms_norm"),
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "activation": ("gated", "bias_activation"),
    "rope": ("rope",),
    "softmax": ("masked_softmax",),
    "dropout": ("dropout", "dropout_add"),
    "cross_entropy": ("statistics", "gradient_"),
    "multi_tensor": ("sums_of_squares",),
}
"""Operations that ``[kernels]`` chooses for, and the functions of each. Signatures are those of the references, in the
module of ``megalm.ops`` of that name or ``megalm.ops.norm``. A provider may leave out what follows from the others
(``add_``: the sum, then the norm)."""


@dataclass(frozen=True)
class KernelRequest:
    """What a run needs of an operation."""

    operation: str
    """A key of :data:`OPERATIONS`."""
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    """Of activations and weights."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes that the model has, such as ``width`` of a norm."""


class KernelProvider(ABC):
    """Offers implementations under the name of its component, which ``[kernels]`` may choose for any operation."""

    @abstractmethod
    def supports(self, request: KernelRequest) -> str | None:
        """None where it can serve, else why not, as a clause: ``apex is not installed``."""

    @abstractmethod
    def functions(self, request: KernelRequest) -> Mapping[str, Callable[..., Any]]:
        """The operation's functions by name. Called after :meth:`supports` returned None."""
