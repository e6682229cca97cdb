"""What nvcc makes of the kernels, without a GPU: no warning, no spill, no local memory; 16 bytes at once as meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.native.toolchain import Toolkit, find_compiler, find_toolkit

from . import strict
from .planted import patched
from .small import ROOT

CSRC = ROOT / "csrc"
KERNELS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
WIDE: dict[str, dict[str, str]] = {
    "activation": {"gated_forward": "LS", "gated_backward": "LS", "biased_forward": "LS", "plain_backward": "LS"},
    "cross_entropy": {"statistics": "L", "gradient": "LS"},
    "dropout": {"forward_wide": "LS"},
    "multi_tensor": {},
    "norm": {"forward_held": "LS", "backward_held": "LS"},
    "rope": {"turn": "LS"},
    "softmax": {"forward_held": "LS", "backward_held": "LS"},
}
"""Kernels of each file that load (L) or store (S) 16 bytes at once, in at least one instance for each element type."""
ELEMENTS = {"float32": "If", "bfloat16": "I13__nv_bfloat16", "float16": "I6__half"}
"""How a mangled name begins a template's arguments."""


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    found = find_toolkit()
    if found is None:
        pytest.skip("no CUDA toolkit: nothing compiles kernels here")
    if find_compiler() is None:
        pytest.skip("no C++ compiler: nvcc, which needs one, compiles nothing here")
    return found


@pytest.fixture(scope="session")
def machine_code(toolkit: Toolkit) -> dict[tuple[str, str], Path | strict.RefusedError]:
    return strict.all_compiled(CSRC, toolkit)


def _of(machine_code: dict[tuple[str, str], Path | strict.RefusedError], kernel: str, architecture: str) -> Path:
    made = machine_code[kernel, architecture]
    if isinstance(made, strict.RefusedError):
        complaints = [line for line in str(made).splitlines() if "error" in line or "warning" in line]
        pytest.fail("\n".join(complaints or [str(made)]))
    return made


@pytest.mark.parametrize("architecture", strict.CHECKED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_warning_or_spill(machine_code, kernel: str, architecture: str) -> None:  # type: ignore[no-untyped-def]
    _of(machine_code, kernel, architecture)


@pytest.fixture(scope="session")
def cuobjdump(toolkit: Toolkit) -> Path:
    found = strict.find_cuobjdump(toolkit)
    if found is None:
        pytest.skip("no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


@pytest.mark.parametrize("architecture", strict.CHECKED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_accesses_are_wide_and_none_is_local(  # type: ignore[no-untyped-def]
    machine_code, cuobjdump: Path, kernel: str, architecture: str
) -> None:
    assert kernel in WIDE, f"say in WIDE which kernels of {kernel}.cu access 16 bytes at once"
    found = strict.functions(_of(machine_code, kernel, architecture), cuobjdump)
    assert found
    assert not {name: function.local for name, function in found.items() if function.local}
    for name, accesses in WIDE[kernel].items():
        for element, mark in ELEMENTS.items():
            instances = [function for full, function in found.items() if f"{len(name)}{name}{mark}" in full]
            assert instances, f"{kernel}.cu has no kernel {name} for {element}"
            assert "L" not in accesses or any(one.wide_loads for one in instances), f"{name} for {element} loads less"
            assert "S" not in accesses or any(one.wide_stores for one in instances), f"{name} for {element} stores less"


def test_a_planted_spill_is_refused(tmp_path: Path, toolkit: Toolkit) -> None:
    """Half the registers that the kernel needs."""
    bounds = "__launch_bounds__({}) backward_held"
    csrc = patched(tmp_path, "cuda/norm.cu", bounds.format("kThreads"), bounds.format("1024, 2"))
    with pytest.raises(strict.RefusedError, match=r"Registers are spilled to local memory.*backward_held"):
        strict.compiled(csrc / "cuda" / "norm.cu", csrc, toolkit, "90")


def test_planted_local_memory_is_refused(tmp_path: Path, toolkit: Toolkit) -> None:
    """An array with an index that only the run knows."""
    array = """  float odd[64];
  for (int k = 0; k < 64; ++k) odd[k * a.rows & 63] = a.rstd[k];
  a.rstd[row] = odd[a.cols & 63];
"""
    csrc = patched(tmp_path, "cuda/norm.cu", "  keep(a, row, s);\n  T* y", f"{array}  keep(a, row, s);\n  T* y")
    with pytest.raises(strict.RefusedError, match="Local memory used"):
        strict.compiled(csrc / "cuda" / "norm.cu", csrc, toolkit, "90")


def test_planted_narrow_accesses_are_seen(tmp_path: Path, toolkit: Toolkit, cuobjdump: Path) -> None:
    csrc = patched(tmp_path, "cuda/portable.cuh", "struct alignas(sizeof(T) * N) Vec", "struct alignas(4) Vec")
    found = strict.functions(strict.compiled(csrc / "cuda" / "norm.cu", csrc, toolkit, "90"), cuobjdump)
    assert not any(function.wide_loads or function.wide_stores for name, function in found.items() if "held" in name)
