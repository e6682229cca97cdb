"""Which operations a model has, as requests for kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megalm.config.schema import Precision
from megalm.model.spec import ModelSpec
from megalm.plugin.contract.kernels import KernelRequest


def kernel_requests(spec: ModelSpec, device: Literal["cpu", "cuda"], precision: Precision) -> Iterator[KernelRequest]:
    """One request for each operation that ``[kernels]`` may choose and this model computes."""
    width = {"width": spec.cfg.hidden_size}
    yield KernelRequest(spec.cfg.norm, device, precision, width)
    if spec.cfg.dropout:
        yield KernelRequest("dropout", device, precision, width)
