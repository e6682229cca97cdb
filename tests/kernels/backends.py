"""What tests of kernels share: backends, tolerances, drawn tensors, and the comparison with float64."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Largest |error| in 2-norm, relative, of what is computed in float32 and stored as the dtype."""


@dataclass(frozen=True)
class Backend:
    """Where operations run."""

    name: str
    namespace: str
    device: torch.device

    def draw(self, *shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Normal values, rounded to ``dtype``; a leaf that wants a gradient."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (values * scale + shift).to(dtype).to(self.device).requires_grad_()


def error(found: Tensor, truth: Tensor) -> float:
    """Relative error in 2-norm; of values that are all much below 1, where others of the test are about 1, absolute."""
    wide, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    assert wide.shape == truth.shape, f"shape {tuple(wide.shape)}, expected {tuple(truth.shape)}"
    return ((wide - truth).norm() / truth.norm().clamp(min=0.1 * truth.numel() ** 0.5)).item() if truth.numel() else 0.0


def check_against_float64(
    call: Callable[..., Sequence[Tensor]],
    truth: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    tolerance: float,
    seed: int = 5,
) -> None:
    """Outputs and gradients of ``call(*inputs)`` are those of ``truth`` on the same values in float64."""
    wide = [x.detach().double().cpu().requires_grad_(x.requires_grad) for x in inputs]
    found, expected = call(*inputs), truth(*wide)
    seeds = [
        torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64).to(y.dtype)
        for i, y in enumerate(found)
    ]
    gradients = torch.autograd.grad(
        found, [x for x in inputs if x.requires_grad], [s.to(y.device) for s, y in zip(seeds, found, strict=True)]
    )
    true_gradients = torch.autograd.grad(expected, [x for x in wide if x.requires_grad], [s.double() for s in seeds])
    errors = {f"output {i}": error(y, t) for i, (y, t) in enumerate(zip(found, expected, strict=True))}
    errors |= {f"gradient {i}": error(y, t) for i, (y, t) in enumerate(zip(gradients, true_gradients, strict=True))}
    assert max(errors.values()) <= tolerance, errors


def check_registration(operation: Any, arguments: Sequence[Any]) -> None:
    """torch's own check of schema, shapes, gradients and tracing, whose own warnings are not ours.

    Tracing, which takes most of its time, meets neither the dtype nor the code of a kernel: only float32 of megalm's
    own namespace is traced, everything with MEGALM_PROOF=full. The tests of torch.compile trace the emulator's.
    """
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    wide = all(x.dtype not in DTYPES[1:] for x in arguments if isinstance(x, Tensor))
    if os.environ.get("MEGALM_PROOF") == "full" or (wide and operation._qualified_op_name.startswith("megalm::")):
        tests.append("test_aot_dispatch_dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(operation, tuple(arguments), test_utils=tests)


def check_compiled(run: Callable[..., Tensor], inputs: Sequence[Tensor], *, rtol: float = 1e-5) -> None:
    """``torch.compile(run, fullgraph=True)`` gives the same value and gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, fullgraph=True)
        found = compiled(*inputs)
        gradients = torch.autograd.grad(found, inputs)
    expected = run(*inputs)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    for one, other in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


def on_threads(number: int, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``run()`` with so many threads of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return run()
    finally:
        torch.set_num_threads(before)
