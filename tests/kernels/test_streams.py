"""CUDA's kernels wait for what is queued before them on the stream that is current, which need not be the default one.

Each test makes inputs late, on a stream of its own: a kernel launched elsewhere would read what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.ops.native.library import Absent, library
from megalm.ops.native.multi_tensor import MultiTensor
from megalm.ops.native.norm import Norms

from .calls import NAMES, called, calls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def loaded() -> None:
    found = library()
    assert not isinstance(found, Absent), found.reason
    assert found.cuda, found.without_cuda


@contextmanager
def _elsewhere() -> Iterator[None]:
    """On a new stream, busy for some hundredths of a second; has waited for it at its end, and for no other."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles
        yield
        stream.synchronize()


def _both_ways(run: Callable[..., list[Tensor]], given: list[Any]) -> None:
    """``run`` gives on another stream what it gives on this one; it may write to its arguments."""
    expected = run(*(a.clone() if isinstance(a, Tensor) else a for a in given))
    late = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in given]
    with _elsewhere():
        for place, value in zip(late, given, strict=True):
            if isinstance(value, Tensor):
                place.copy_(value)
        found = [t.clone() for t in run(*late)]
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_operation(name: str, dtype: torch.dtype) -> None:
    _both_ways(lambda *arguments: called("megalm", name, arguments), list(calls(CUDA, dtype)[name]))


def test_a_gradient() -> None:
    def run(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = Norms("megalm").rms_norm(x, weight, 1e-5)
        return [y.detach(), *torch.autograd.grad(y, [x, weight], dy)]

    _both_ways(run, [torch.randn(*shape, device=CUDA) for shape in ((300, 256), (256,), (300, 256))])


STEP = {"betas": (0.9, 0.97), "eps": 1e-6, "weight_decay": 0.05}
SIZES = (70001, 5, 4096)


def _lists(run: Callable[..., list[Tensor]], lists: int) -> None:
    """``run`` takes so many lists of tensors, positive ones, and the number 2 as a tensor."""

    def flat(step: Tensor, *tensors: Tensor) -> list[Tensor]:
        return [*run(*(list(tensors[i :: lists]) for i in range(lists)), step), *tensors]

    drawn = [torch.rand(size, device=CUDA) + 0.1 for size in SIZES for _ in range(lists)]
    _both_ways(flat, [torch.full((), 2, device=CUDA), *drawn])


def test_lists_of_tensors() -> None:
    many = MultiTensor("megalm")

    def scaled(tensors: list[Tensor], step: Tensor) -> list[Tensor]:
        many.scale_(tensors, step.float(), found := torch.zeros((), device=CUDA))
        return [found]

    def adamw(w: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], step: Tensor) -> list[Tensor]:
        many.adamw_(w, g, m, v, [], step=step, lr=0.01, **STEP)
        return []

    def lamb(
        w: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], u: list[Tensor], step: Tensor
    ) -> list[Tensor]:
        sums = many.lamb_update_(w, g, m, v, u, step=step, **STEP)
        many.lamb_apply_(w, u, [], sums, lr=0.01)
        return [sums]

    _lists(lambda tensors, step: [many.sums_of_squares(tensors)], 1)
    _lists(scaled, 1)
    _lists(adamw, 4)
    _lists(lamb, 5)
