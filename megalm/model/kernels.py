"""Which operations a model has, as requests for kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megalm.config.schema import Precision
from megalm.model.spec import ModelSpec
from megalm.plugin.contract.kernels import KernelRequest


def kernel_requests(spec: ModelSpec, device: Literal["cpu", "cuda"], precision: Precision) -> Iterator[KernelRequest]:
    """One request for each operation that ``[kernels]`` may choose and this model, or its training, computes."""
    c = spec.cfg
    owned = spec.heads or spec.modules  # an objective's heads, before which it may drop with a probability of its own
    sizes = {
        c.norm: {"width": c.hidden_size},
        "activation": {"width": spec.ffn_size},
        **({"rope": {"head_dim": spec.head_dim}} if c.position == "rope" else {}),
        **({"softmax": {}} if c.attention_dropout else {}),
        **({"dropout": {"width": c.hidden_size}} if c.dropout or c.attention_dropout or owned else {}),
        **({"cross_entropy": {"vocabulary": spec.vocab_size}} if spec.lm_head else {}),
        "multi_tensor": {},
    }
    for operation, found in sizes.items():
        yield KernelRequest(operation, device, precision, found)
