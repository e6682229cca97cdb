"""Which libraries are made of which sources with which flags.

Operations are described once, in ``csrc/ops``, and compiled for each backend against its launchers: the processor's
(``csrc/cpu``), CUDA's (``csrc/cuda``), or CUDA's own sources compiled for the host (``csrc/emu``). Tensor operations
use torch's stable ABI, so one library serves every torch from :data:`TORCH_TARGET` on.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megalm.native import processor
from megalm.native.errors import BuildError
from megalm.native.toolchain import Toolchain

TORCH_TARGET = "0x020b000000000000"
"""The oldest torch that is served, 2.11, as torch's headers write it."""
ARCHITECTURES = ("80", "90", "100")
"""Compute capabilities that are compiled for: A100, H100 and H200, B200."""
_WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Branches on NaN and traps keep loops from becoming vectors; results stay those of IEEE arithmetic.
_FLOATS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


@dataclass(frozen=True)
class Step:
    """A source and the command that compiles it, without the source and the object's name."""

    source: Path
    command: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A shared library."""

    name: str
    """Of the file, without its suffix."""
    steps: tuple[Step, ...]
    link: tuple[str, ...]
    """The linking command's head; objects and the library's name come between it and ``libraries``."""
    libraries: tuple[str, ...]


def sources() -> Path:
    """The folder of C++ and CUDA sources: in the package, or beside it in a checkout. Raises BuildError."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "include" / "abi.h").is_file():
            return folder
    raise BuildError(f"csrc/ was found neither in {package} nor beside it: the installation is not complete")


def architectures() -> tuple[str, ...]:
    """Compute capabilities to compile for: :data:`ARCHITECTURES`, or those that MEGALM_CUDA_ARCH lists ("90;100")."""
    given = os.environ.get("MEGALM_CUDA_ARCH")
    if not given:
        return ARCHITECTURES
    names = tuple(name.strip() for name in given.replace(",", ";").split(";") if name.strip())
    if wrong := [name for name in names if not re.fullmatch(r"[1-9][0-9]+[af]?", name)]:
        raise BuildError(f"MEGALM_CUDA_ARCH is numbers such as 90 or 90a, parted by semicolons; found {wrong[0]!r}")
    return names


def serves(capability: str, archs: Iterable[str]) -> bool:
    """Whether a library for these architectures ("80", "90a") runs on a GPU of a capability ("86").

    Machine code runs on its own major architecture, from its minor one on; with an "a" on that very one. PTX, which
    :func:`nvcc_flags` adds of one architecture, is compiled by the driver for all that are not older.
    """
    have, names = int(capability), list(archs)
    code = [(int(name.rstrip("af")), name.endswith("a")) for name in names]
    newest = newest_plain(names)
    return any(have == one or (not alone and have // 10 == one // 10 and have > one) for one, alone in code) or (
        newest is not None and have >= int(newest)
    )


def newest_plain(archs: Iterable[str]) -> str | None:
    """The newest architecture without a letter: PTX of those with one serves no newer GPU. None where all have one."""
    return max((name for name in archs if name.isdigit()), key=int, default=None)


def march() -> list[str]:
    """The processor that is compiled for: what MEGALM_MARCH names, else x86-64-v3 (AVX2, servers since 2013) where this
    one is that, else the compiler's default.
    """
    given = os.environ.get("MEGALM_MARCH")
    if given:
        return [f"-march={given}"]
    if platform.machine() != "x86_64":
        return []
    return ["-march=x86-64" if processor.lacking("x86-64-v3") else "-march=x86-64-v3"]


def cpu_target(tools: Toolchain, csrc: Path) -> Target:
    """Schemas of all operations, and their implementations for the processor."""
    flags = [*_cxx(tools, csrc), "-DMEGALM_CPU", *march()]
    steps = _steps(flags, *_listed(csrc, "ops/*.cpp", "cpu/*.cpp"))
    return Target("_cpu", steps, (tools.cxx, "-shared"), _torch_libraries(tools, "torch_cpu"))


def cuda_target(tools: Toolchain, csrc: Path) -> Target:
    """The CUDA implementations."""
    assert tools.cuda is not None
    nvcc = str(tools.cuda.nvcc)
    bindings = _steps([*_cxx(tools, csrc), "-DMEGALM_CUDA"], *_listed(csrc, "ops/*.cpp"))
    kernels = _steps(nvcc_flags(nvcc, csrc), *_listed(csrc, "cuda/*.cu"))
    link = (nvcc, "-shared", "-cudart=shared", "-ccbin", tools.cxx)
    libraries = ("-Xlinker", "--no-as-needed", *_torch_libraries(tools, "torch_cpu", "torch_cuda"))
    return Target("_cuda", (*bindings, *kernels), link, libraries)


def nvcc_flags(nvcc: str, csrc: Path) -> list[str]:
    """How kernels are compiled: machine code for each of :func:`architectures`, and PTX for what comes after."""
    archs = architectures()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if newest := newest_plain(archs):
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return [nvcc, "-std=c++17", "-O3", *codes, "-Xcompiler", "-fPIC", f"-I{csrc}", "-Werror", "all-warnings"]


def emulator_target(tools: Toolchain, csrc: Path, *, sanitize: bool = False, defines: Iterable[str] = ()) -> Target:
    """The CUDA sources as host code, registered as operations of the namespace ``megalm_emu`` on CPU tensors.

    ``sanitize``: kernels with AddressSanitizer and UndefinedBehaviorSanitizer, whose runtimes must then be preloaded.
    """
    flags = [*_cxx(tools, csrc), "-DMEGALM_EMU", *(f"-D{name}" for name in defines)]
    link = [tools.cxx, "-shared"]
    bindings = _steps(flags, *_listed(csrc, "ops/*.cpp"))
    if sanitize:
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags += [*checks, "-O1", "-g", "-fno-omit-frame-pointer"]
        link += checks
    kernels = _steps([*flags, "-x", "c++"], *_listed(csrc, "cuda/*.cu"))
    return Target("_emu", (*bindings, *kernels), tuple(link), _torch_libraries(tools, "torch_cpu"))


def helpers_name() -> str:
    """Of the helpers' library: it serves one version of Python."""
    return f"_helpers.{sys.implementation.cache_tag}"


def helpers_target(tools: Toolchain, csrc: Path) -> Target:
    """The tensor-free helpers, a module of Python. Raises BuildError without pybind11 or Python's headers."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise BuildError(f"Python's headers are not in {python} (Debian, Ubuntu: apt-get install python3-dev)")
    spec = importlib.util.find_spec("pybind11")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("pybind11 is missing: pip install pybind11")
    includes = [python, Path(spec.submodule_search_locations[0]) / "include"]
    flags = [*_plain_cxx(tools, csrc), *march(), *(word for path in includes for word in ("-isystem", str(path)))]
    return Target(helpers_name(), _steps(flags, *_listed(csrc, "helpers/*.cpp")), (tools.cxx, "-shared"), ())


def _cxx(tools: Toolchain, csrc: Path) -> list[str]:
    """With torch's headers, which may warn."""
    torch = ["-isystem", str(tools.torch.root / "include")]
    return [*_plain_cxx(tools, csrc), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *torch]


def _plain_cxx(tools: Toolchain, csrc: Path) -> list[str]:
    return [
        *(tools.cxx, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"),
        *_FLOATS,
        *_WARNINGS,
        f"-ffile-prefix-map={csrc.parent}/=",  # libraries name no folder of the machine that built them
        f"-I{csrc}",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]


def _torch_libraries(tools: Toolchain, *names: str) -> tuple[str, ...]:
    return (f"-L{tools.torch.root / 'lib'}", *(f"-l{name}" for name in names))


def _listed(csrc: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(csrc.glob(pattern))]


def _steps(command: list[str], *paths: Path) -> tuple[Step, ...]:
    return tuple(Step(path, tuple(command)) for path in paths)
