"""The emulator finds what it is for: mistakes planted into a copy of the norms, each by the gate meant for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.native.compile import compile_targets
from megalm.native.errors import BuildError
from megalm.native.targets import emulator_target
from megalm.native.toolchain import Toolchain, find_compiler, find_toolchain

from .planted import patched
from .sanitizers import preloaded
from .small import ROOT

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
REDUCE = "cuda/portable.cuh"
NORM = "cuda/norm.cu"


@pytest.fixture(scope="session")
def tools() -> Toolchain:
    try:
        return find_toolchain()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def binding(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The norms' binding, which all the copies share: it takes longer to compile than they do."""
    csrc = ROOT / "csrc"
    (step,) = [step for step in emulator_target(tools, csrc).steps if step.source == csrc / "ops" / "norm.cpp"]
    made = tmp_path_factory.mktemp("binding") / "norm.o"
    subprocess.run([*step.command, "-O0", "-c", str(step.source), "-o", str(made)], check=True)
    return made


def run(
    folder: Path, csrc: Path, tools: Toolchain, binding: Path, *, sanitize: bool = False, seed: int = 1
) -> tuple[int, str]:
    """Exit status and output of comparing the norms of ``csrc`` with float64."""
    library = folder / "built" / "_emu.so"
    if not library.exists():
        target = emulator_target(tools, csrc, sanitize=sanitize)
        kernels = tuple(step for step in target.steps if step.source.suffix == ".cu")
        target = replace(target, steps=kernels, link=(*target.link, str(binding)))
        compile_targets([target], library.parent, tools, {})
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MEGALM_EMU_SEED": str(seed)}
    env |= preloaded(tools.cxx) if sanitize else {}
    command = [sys.executable, str(Path(__file__).with_name("planted_norm.py")), str(library)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without optimisation, which takes a third of the time."""
    monkeypatch.setenv("CXXFLAGS", "-O0")


PLANTED: dict[str, tuple[str, str, str, str]] = {
    "a missing barrier before reading": (
        REDUCE,
        "  __syncthreads();\n  v = lane < warps",
        "  v = lane < warps",
        "differs",
    ),
    "a missing barrier before writing again": (
        REDUCE,
        "  __syncthreads();  // an earlier call's values may still be read\n",
        "",
        "differs",
    ),
    "a wrong reduction width": (REDUCE, "v = lane < warps ?", "v = lane < warps / 2 ?", "differs"),
    "shared memory that is read before it is written": (
        REDUCE,
        "  if (lane == 0) row[warp] = v;\n",
        "",
        "differs.*nan",
    ),
    "a barrier that not all reach": (
        NORM,
        "  const Statistics s = statistics(each, a.mean != nullptr, static_cast<int>(a.cols), a.eps, shared);\n"
        "  if (!live) return;",
        "  if (!live) return;\n"
        "  const Statistics s = statistics(each, a.mean != nullptr, static_cast<int>(a.cols), a.eps, shared);",
        "a barrier that not all threads reach in block",
    ),
    "different barriers": (
        REDUCE,
        "  __syncthreads();\n  v = lane < warps",
        "  if (warp == 0) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }\n  v = lane < warps",
        "threads wait at different barriers in block",
    ),
    "more shared memory than there is": (
        NORM,
        "MEGALM_SHARED(float, shared, kMaxWarps);\n  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y",
        "MEGALM_SHARED(float, shared, 12289);\n  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y",
        "more shared memory than a block may have in block",
    ),
    "a shuffle without all lanes": (
        REDUCE,
        "  v = lane < warps ? row[lane] : Op::identity();\n  return warp_reduce(v, op);",
        "  v = lane < warps ? row[lane] : Op::identity();\n  return lane < 16 ? warp_reduce(v, op) : v;",
        "(a shuffle from a lane that takes no part in it|a barrier that not all threads reach) in block",
    ),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name: str, tmp_path: Path, tools: Toolchain, binding: Path) -> None:
    file, before, after, said = PLANTED[name]
    csrc = patched(tmp_path, file, before, after)
    for seed in range(1, 4):
        status, output = run(tmp_path, csrc, tools, binding, seed=seed)
        if status != 0:
            break
    assert status in (3, -6), output
    assert re.search(said, output, re.DOTALL), output


@pytest.mark.usefixtures("quick")
def test_a_refused_launch_is_named(tmp_path: Path, tools: Toolchain, binding: Path) -> None:
    launch = "forward_walked<T>, dim3(a.rows), dim3(kThreads)"
    csrc = patched(tmp_path, NORM, launch, launch.replace("kThreads", "4 * kThreads"))
    status, output = run(tmp_path, csrc, tools, binding)
    assert status == 1
    refused = "rms_norm: the kernel could not be launched: cudaErrorInvalidConfiguration (9): invalid configuration"
    assert refused in output, output


@pytest.mark.usefixtures("quick")
def test_a_block_that_counts_on_others_is_found(tmp_path: Path, tools: Toolchain, binding: Path) -> None:
    """The last block adds up what all have written, which no barrier makes it wait for."""
    end = "          }\n        }\n      }\n    }\n    __syncthreads();\n  }\n"
    last = """  if (blockIdx.x + 1 == gridDim.x)
    for (int64_t j = threadIdx.y * blockDim.x + threadIdx.x; j < a.cols; j += blockDim.x * blockDim.y) {
      float sum = 0.f;
      for (int64_t p = 0; p < gridDim.x; ++p) {
        float& written = a.partial[p * (BIAS ? 2 : 1) * a.cols + j];
        sum += written;
        written = NAN;  // or what an earlier launch left in this memory would do as well
      }
      static_cast<T*>(a.dweight)[j] = from_float<T>(sum);
    }
"""
    walked = "threads == 0 || !wide<T>(a.cols, a.x, a.dy, a.weight, a.dx, a.dsum)"
    nowhere = f"b.partials, a.cols, {walked} ? a.dweight : a.partial, stream"
    csrc = patched(tmp_path, NORM, end, end + last, ("b.partials, a.cols, a.dweight, stream", nowhere))
    found = [run(tmp_path, csrc, tools, binding, seed=seed)[1] for seed in range(1, 5)]
    assert any("differs" in output for output in found), found


OVERRUNS: dict[str, tuple[str, str, str, str]] = {
    "of a tensor": (
        NORM,
        "    y[i] = from_float<T>(a.bias != nullptr ? normed",
        "    y[i + 1] = from_float<T>(a.bias != nullptr ? normed",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "of shared memory": (
        NORM,
        "MEGALM_SHARED(float, shared, kMaxWarps);\n  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y",
        "MEGALM_SHARED(float, shared, 1);\n  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "of an integer": (
        NORM,
        "  const int64_t row = blockIdx.x, at = row * a.cols;\n  const T* x = static_cast<const T*>(a.x) + at;\n"
        "  if (a.residual",
        "  int huge = 0x7fffffff;\n  huge += static_cast<int>(a.cols);\n  if (huge == a.rows) return;\n"
        "  const int64_t row = blockIdx.x, at = row * a.cols;\n  const T* x = static_cast<const T*>(a.x) + at;\n"
        "  if (a.residual",
        "signed integer overflow",
    ),
}


@pytest.mark.parametrize("name", OVERRUNS)
def test_a_planted_overrun_is_found(name: str, tmp_path: Path, tools: Toolchain, binding: Path) -> None:
    if not preloaded(tools.cxx):
        pytest.skip(f"{tools.cxx} has no sanitizers that can be preloaded")
    file, before, after, said = OVERRUNS[name]
    status, output = run(tmp_path, patched(tmp_path, file, before, after), tools, binding, sanitize=True)
    assert status not in (0, 3), output
    assert said in output, output


@pytest.mark.usefixtures("quick")
def test_without_a_mistake_nothing_is_found(tmp_path: Path, tools: Toolchain, binding: Path) -> None:
    """The same, patched with what changes nothing: the plants are what was found."""
    csrc = patched(tmp_path, REDUCE, "v = lane < warps ?", "v = (lane < warps) ?")
    assert run(tmp_path, csrc, tools, binding) == (0, "")
