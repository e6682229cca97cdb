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

from megalm.ops.native.activation import Activations
from megalm.ops.native.norm import Norms
from megalm.ops.native.rope import Rope
from megalm.ops.native.softmax import Softmaxes

from .backends import Backend
from .calls import calls

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
