"""csrc/cpu/vmath.h against float64, compiled as the kernels are."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalm.native.targets import cpu_target, sources
from megalm.native.toolchain import find_compiler, find_toolchain

TRUTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
}
SOURCE = '#include "cpu/vmath.h"\n' + "".join(
    f'extern "C" __attribute__((visibility("default"))) void v{name}(const float* x, float* y, int64_t n) {{\n'
    f"#pragma omp simd\nfor (int64_t i = 0; i < n; ++i) y[i] = megalm::cpu::{name}(x[i]); }}\n"
    for name in TRUTHS
)
SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 88.7, 89.5, -87]

UNITS = {"exp": 1.25, "log": 1.0, "sigmoid": 2.25, "tanh": 1.5, "erf": 1.25}
"""Largest error that is promised, in units in the last place of the true value."""

Function = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Function], str]:
    """The functions over arrays, and what the compiler said of their loops."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    folder: Path = tmp_path_factory.mktemp("vmath")
    source, library = folder / "vmath.cpp", folder / "vmath.so"
    source.write_text(SOURCE, encoding="utf-8")
    command = [*cpu_target(find_toolchain(), sources()).steps[0].command, "-shared", str(source), "-o", str(library)]
    said = subprocess.run([*command, "-fopt-info-vec-optimized"], capture_output=True, text=True, check=False)
    if said.returncode != 0:  # a compiler without this report
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = ctypes.CDLL(str(library))

    def function(name: str) -> Function:
        def call(x: Tensor) -> Tensor:
            x = x.contiguous()
            y = torch.empty_like(x)
            pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
            getattr(loaded, f"v{name}")(*pointers, ctypes.c_int64(x.numel()))
            return y

        return call

    return {name: function(name) for name in TRUTHS}, said.stderr


def _inputs() -> Tensor:
    """Floats of every exponent and sign, and many near where the functions bend; no multiple of a vector."""
    draw = torch.Generator().manual_seed(1)
    every = torch.arange(-(2**31), 2**31, 9973, dtype=torch.int64).to(torch.int32).view(torch.float32)
    near = torch.randn(200_000, generator=draw)
    grid = torch.linspace(-110, 95, 200_001)
    return torch.cat((every, near, near.exp(), grid, torch.tensor(SPECIAL)))


@pytest.mark.parametrize("name", TRUTHS)
def test_within_the_promised_units(compiled: tuple[dict[str, Function], str], name: str) -> None:
    x = _inputs()
    found, truth = compiled[0][name](x), TRUTHS[name](x.double())
    rounded = truth.float()
    assert torch.equal(found.isnan(), rounded.isnan())
    infinite = rounded.isinf()
    assert torch.equal(found[infinite], rounded[infinite])
    # frexp has its mantissa in [0.5, 1); denormal results have the smallest unit.
    _, exponent = torch.frexp(truth)
    unit = torch.ldexp(torch.ones_like(truth), (exponent - 24).clamp(min=-149))
    finite = rounded.isfinite()
    errors = ((found.double() - truth) / unit).abs()[finite]
    assert errors.max() <= UNITS[name], f"{errors.max().item():.2f} units at {x[finite][errors.argmax()].item()!r}"


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_signs_of_zeros_and_denormals(compiled: tuple[dict[str, Function], str], name: str) -> None:
    zeros = torch.tensor([0.0, -0.0] * 8)
    assert torch.equal(compiled[0][name](zeros).signbit(), zeros.signbit())


@pytest.mark.parametrize("name", TRUTHS)
def test_an_element_does_not_depend_on_its_place(compiled: tuple[dict[str, Function], str], name: str) -> None:
    """In the vectors and in the rest of the loop it has the same bits."""
    x = torch.randn(37, generator=torch.Generator().manual_seed(2))
    whole = compiled[0][name](x.abs())
    assert torch.equal(torch.cat([compiled[0][name](v) for v in x.abs().split(1)]), whole)


def test_loops_become_vectors(compiled: tuple[dict[str, Function], str]) -> None:
    said = compiled[1]
    if "vectorized" not in said:
        pytest.skip("this compiler reports no vectors")
    lines = {int(line) for line in re.findall(r"vmath\.cpp:(\d+):\d+: optimized: +loop vectorized", said)}
    loops = [number for number, text in enumerate(SOURCE.splitlines(), 1) if text.startswith("for ")]
    assert set(loops) <= lines, said
