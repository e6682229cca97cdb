"""The functions that a model computes with, one set for a run.

Modules are given a set when they are built and call its functions; which implementation is behind one was decided
before (:mod:`megalm.ops.choose`). The defaults are torch's own operations where they serve, else the references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalm.ops import activation, multi_tensor, norm
from megalm.ops import cross_entropy as cross_entropies
from megalm.ops import dropout as dropouts
from megalm.ops import rope as ropes
from megalm.ops import softmax as softmaxes

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """Functions by name; signatures as in the modules of :mod:`megalm.ops`."""

    rms_norm: Function = norm.rms_norm
    add_rms_norm: Function = norm.add_rms_norm
    layer_norm: Function = norm.torch_layer_norm
    add_layer_norm: Function = norm.torch_add_layer_norm
    gated: Function = activation.torch_gated
    bias_activation: Function = activation.torch_bias_activation
    rope: Function = ropes.rope
    masked_softmax: Function = softmaxes.masked_softmax
    dropout: Function = dropouts.dropout
    dropout_add: Function = dropouts.dropout_add
    statistics: Function = cross_entropies.statistics
    gradient_: Function = cross_entropies.gradient_
    sums_of_squares: Function = multi_tensor.sums_of_squares

    @property
    def cross_entropy(self) -> cross_entropies.CrossEntropyKernels:
        """Those of the cross-entropy together."""
        return cross_entropies.CrossEntropyKernels(self.statistics, self.gradient_)


PLAIN = Kernels()
"""What needs nothing but torch."""
