"""What every operation owes to torch beside its values: refusals of tensors that do not belong together, no silent
zeros for what it does not differentiate, functions that a model's copy can keep.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.ops.native.activation import Activations
from megalm.ops.native.norm import Norms
from megalm.ops.native.ops import Operations
from megalm.ops.native.rope import Rope
from megalm.ops.native.softmax import Softmaxes

from .backends import Backend
from .calls import NAMES, calls

SEVERAL = [
    name
    for name, arguments in calls(torch.device("cpu")).items()
    if sum(isinstance(argument, Tensor) for argument in arguments) > 1
]
"""Operations on more than one tensor."""


def _with(backend: Backend, name: str, arguments: tuple[Any, ...]) -> None:
    """Call the backend's own implementation, whatever torch would choose for these arguments."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, backend.device.type.upper()))
    getattr(getattr(torch.ops, backend.namespace), name).default.redispatch(key, *arguments)


@pytest.mark.parametrize("name", SEVERAL)
def test_all_tensors_are_on_one_device(backend: Backend, name: str) -> None:
    arguments = calls(backend.device)[name]
    _with(backend, name, arguments)
    elsewhere = "meta" if backend.device.type == "cpu" else "cpu"
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            mixed = (*arguments[:i], argument.to(elsewhere), *arguments[i + 1 :])
            with pytest.raises(RuntimeError, match="one device"):
                _with(backend, name, mixed)


@pytest.mark.parametrize(
    "wrong", [torch.ones(8, dtype=torch.bfloat16), torch.ones(2), torch.ones(2, 4)], ids=["dtype", "size", "shape"]
)
def test_a_bias_that_does_not_fit(backend: Backend, wrong: Tensor) -> None:
    x, weight = torch.ones(4, 8, device=backend.device), torch.ones(8, device=backend.device)
    with pytest.raises(RuntimeError, match="the bias must have the shape and dtype of the weight"):
        Norms(backend.namespace).layer_norm(x, weight, wrong.to(backend.device), 1e-5)


def test_backwards_check_what_they_are_given(backend: Backend) -> None:
    ops = getattr(torch.ops, backend.namespace)
    x, weight, one = (torch.ones(shape, device=backend.device) for shape in ((4, 8), (8,), (4,)))
    for dy in (x[:1], x.double()):
        with pytest.raises(RuntimeError, match="dy must have the shape and dtype of x"):
            ops.rms_norm_backward(dy, None, x, weight, one, 0.0)
    for mean, rstd in ((one, one[:2]), (one[:2], one), (one, one.double())):
        with pytest.raises(RuntimeError, match="one for each row"):
            ops.layer_norm_backward(x, None, x, weight, mean, rstd, 0.0, False)


class _Seen(TorchDispatchMode):
    """Names of the operations that torch's modes get to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


DIFFERENTIABLE = [name for name in NAMES if not name.endswith(("_backward", "_")) and "cross_entropy" not in name]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_short_way_is_the_operation(backend: Backend, name: str) -> None:
    """Outputs, gradients and which inputs get one, to the last bit; what watches gets to see the operation itself."""
    short = getattr(Operations(backend.namespace), name)
    whole = getattr(getattr(torch.ops, backend.namespace), name).default
    arguments = calls(backend.device)[name]

    def results(call: Callable[..., Any], wanted: int) -> tuple[list[Tensor], list[Tensor | None]]:
        given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        leaves = [a for a in given if isinstance(a, Tensor) and a.is_floating_point()]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(wanted in (i, len(leaves)))
        found = call(*given)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        total = sum(y.square().sum() for y in outputs if y.requires_grad)
        if isinstance(total, Tensor):
            total.backward()
        return outputs, [leaf.grad for leaf in leaves]

    count = sum(isinstance(a, Tensor) and a.is_floating_point() for a in arguments)
    for wanted in range(-1, count + 1):  # none, each alone, all
        for found, expected in zip(results(short, wanted), results(whole, wanted), strict=True):
            for one, other in zip(found, expected, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert torch.equal(one, other)
                    assert one.requires_grad == other.requires_grad
    leaf = arguments[0].clone().requires_grad_()
    made = short(leaf, *arguments[1:])
    made = made if isinstance(made, Tensor) else made[0]
    assert type(made.grad_fn).__name__ == "ShortenedBackward"
    with _Seen() as seen:
        short(leaf, *arguments[1:])
    assert f"{backend.namespace}::{name}" in seen.names


_TWICE: dict[str, Callable[[str], Callable[[Tensor], Tensor]]] = {
    "rms_norm": lambda n: lambda x: Norms(n).rms_norm(x, torch.ones_like(x[0]), 1e-5),
    "layer_norm": lambda n: lambda x: Norms(n).layer_norm(x, torch.ones_like(x[0]), None, 1e-5),
    "gated": lambda n: lambda x: Activations(n).gated(x, "silu"),
    "bias_activation": lambda n: lambda x: Activations(n).bias_activation(x, None, "gelu"),
    "masked_softmax": lambda n: lambda x: Softmaxes(n).masked_softmax(x.view(1, 1, *x.shape)),
}


@pytest.mark.parametrize("name", _TWICE)
def test_a_second_derivative_is_refused(backend: Backend, name: str) -> None:
    x = backend.draw(4, 8, dtype=torch.float32, seed=1)
    (gradient,) = torch.autograd.grad(_TWICE[name](backend.namespace)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_rope_is_differentiated_twice(backend: Backend) -> None:
    x, angles = (backend.draw(*shape, dtype=torch.float32, seed=1) for shape in ((1, 4, 2, 8), (4, 4)))

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        (a, b), c, s = x.chunk(2, dim=-1), cos[:, None], sin[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

    def second(turn: Callable[..., Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(turn(x, angles, angles + 1).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = second(turned)
    # Products of many float32 numbers, added up in another order.
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(second(Rope(backend.namespace).rope), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["copy", "pickle"])
def test_a_copy_computes_the_same(backend: Backend, copied: Callable[[Any], Any]) -> None:
    """Models are copied, for an average of their weights say, and their kernels with them."""
    x, weight = torch.randn(4, 8, device=backend.device), torch.ones(8, device=backend.device)
    function = Norms(backend.namespace).rms_norm
    for _ in range(2):  # before an operation has been looked up, and after
        assert torch.equal(copied(function)(x, weight, 1e-5), function(x, weight, 1e-5))
