"""A call of every operation on single tensors, so that what holds of all can be asked of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]


def calls(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Arguments]:
    """Arguments of each operation, drawn: four rows of 64, which are read 16 bytes at once where all start there."""
    draw = torch.Generator().manual_seed(3)

    def drawn(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(like).to(device)

    x, y, z, half, row, bias = drawn(4, 64), drawn(4, 64), drawn(4, 64), drawn(4, 32), drawn(64), drawn(64)
    mean, rstd = drawn(4, like=torch.float32), drawn(4, like=torch.float32).abs() + 1
    labels = torch.tensor([3, 0, 63, 17], device=device)
    heads, cos, sin = x.view(1, 4, 1, 64), drawn(4, 32, like=torch.float32), drawn(4, 32, like=torch.float32)
    scores, probabilities = x.view(1, 1, 4, 64), y.softmax(dim=-1).view(1, 1, 4, 64)
    mask = (torch.arange(64, device=device) % 5 != 0).view(1, 64)
    spans = torch.tensor([[0, 2, 1, 5, 9]], device=device)
    return {
        "rms_norm": (x, row, y, 1e-5, 0.0),
        "rms_norm_backward": (x, y, z, row, rstd, 0.0),
        "layer_norm": (x, row, bias, y, 1e-5, 0.0),
        "layer_norm_backward": (x, y, z, row, mean, rstd, 0.0, True),
        "gated_activation": (x, 0),
        "gated_activation_backward": (half, x, 0),
        "bias_activation": (x, row, 0),
        "bias_activation_backward": (x, y, row, 0),
        "rope": (heads, cos, sin, torch.tensor([3, 1, 2, 0], device=device), False, False),
        "masked_softmax": (scores, mask, 0.5, False, 0),
        "masked_softmax_backward": (scores, probabilities, 0.5),
        "dropout_add": (x, y, row, spans, 1, 2, 30000, False),
        "dropout_add_backward": (x, None, spans, 1, 2, 30000, True),
        "cross_entropy_statistics": (x, labels, 0, True),
        "cross_entropy_gradient_": (x, labels, 0, mean + 3, rstd, rstd, 0.1, 0.9),
    }


NAMES = tuple(calls(torch.device("cpu")))


def called(namespace: str, name: str, arguments: Arguments) -> list[Tensor]:
    """What the operation gives, then its arguments as it leaves them."""
    found = getattr(getattr(torch.ops, namespace), name).default(*arguments)
    outputs = [found] if isinstance(found, Tensor) else list(found or ())
    return [*outputs, *(argument for argument in arguments if isinstance(argument, Tensor))]
