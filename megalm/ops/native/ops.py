"""Short words for torch's registry of operations, and a short way to them.

What torch makes of a gradient that is registered in Python costs a call 30 microseconds, as much as a few rows of
work: the dispatcher calls Python, which calls the dispatcher. Plain tensors outside of all tracing take the same
gradient by a function of autograd's own instead; everything else goes through the registered operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter})
_Call = Callable[..., Any]


class Operations:
    """``Operations("megalm").rms_norm(...)`` calls ``torch.ops.megalm.rms_norm``'s only overload."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def __reduce__(self) -> tuple[type[Operations], tuple[str]]:
        return Operations, (self.namespace,)  # a model's copy calls the same operations

    def __getattr__(self, name: str) -> Callable[..., Any]:
        whole = _registered(self.namespace, name)
        operation = _SHORTENED.get((self.namespace, name), whole)
        setattr(self, name, operation)
        return operation


def _registered(namespace: str, name: str) -> _Call:
    operation: _Call = getattr(getattr(torch.ops, namespace), name).default
    return operation


_SHORTENED: dict[tuple[str, str], _Call] = {}
"""Operations of namespaces that have gradients. Made at registration: torch.compile cannot follow the making."""


def _shortened(operation: _Call, keep: _Call, backward: _Call) -> _Call:
    """The operation, on plain tensors by the short way."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operation(*arguments)
        keep(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type("Shortened", (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _watched():
            return operation(*arguments)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if any(type(tensor) not in _PLAIN for tensor in tensors):
            return operation(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*arguments)

    return call


def _watched() -> bool:
    """Something traces, or wants to see operations as they are called."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    )


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
        _SHORTENED[namespace, name] = _shortened(_registered(namespace, name), keep, once)

    return fake, gradient
