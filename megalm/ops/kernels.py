"""The functions that a model computes with, one set for a run.

Modules are given a set when they are built and call its functions; which implementation is behind one was decided
before (:mod:`megalm.ops.choose`). The defaults are torch's own operations where they serve, else the references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalm.ops import dropout as dropouts
from megalm.ops import norm

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """Functions by name; signatures as in the modules of :mod:`megalm.ops`."""

    rms_norm: Function = norm.rms_norm
    add_rms_norm: Function = norm.add_rms_norm
    layer_norm: Function = norm.torch_layer_norm
    add_layer_norm: Function = norm.torch_add_layer_norm
    dropout: Function = dropouts.dropout
    dropout_add: Function = dropouts.dropout_add


PLAIN = Kernels()
"""What needs nothing but torch."""
