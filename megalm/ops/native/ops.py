"""Short words for torch's registry of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Operations:
    """``Operations("megalm").rms_norm(...)`` calls ``torch.ops.megalm.rms_norm``'s only overload."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def __reduce__(self) -> tuple[type[Operations], tuple[str]]:
        return Operations, (self.namespace,)  # a model's copy calls the same operations

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation: Callable[..., Any] = getattr(getattr(torch.ops, self.namespace), name).default
        setattr(self, name, operation)
        return operation


def registrar(namespace: str) -> tuple[Callable[[str], Callable[..., Any]], Callable[..., None]]:
    """``fake(name)``, a decorator for the shapes of an operation, and ``gradient(name, backward, keep)``.

    A gradient's own gradient is refused, unless ``twice`` says that ``backward`` is made of what has one: torch would
    give zeros for it.
    """

    def fake(name: str) -> Callable[..., Any]:
        decorate: Callable[..., Any] = torch.library.register_fake(f"{namespace}::{name}")
        return decorate

    def gradient(
        name: str, backward: Callable[..., Any], keep: Callable[..., None], *, twice: bool = False
    ) -> None:
        once = backward if twice else once_differentiable(backward)
        torch.library.register_autograd(f"{namespace}::{name}", once, setup_context=keep)

    return fake, gradient
