"""Every test of this folder runs for each backend that this machine has: the processor's kernels, CUDA's sources on the
host, and CUDA itself.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from megalm.native import build
from megalm.native.errors import BuildError
from megalm.native.targets import Target, emulator_target
from megalm.native.toolchain import Toolchain, find_compiler
from megalm.ops.native.library import Absent, library, register

from .backends import Backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@functools.cache
def emulated() -> None:
    """Build and load CUDA's kernels for the host, as ``torch.ops.megalm_emu``; or load those of the file that
    MEGALM_EMU_LIBRARY names: tests/native runs these tests with one that has sanitizers.
    """
    if given := os.environ.get("MEGALM_EMU_LIBRARY"):
        torch.ops.load_library(given)
        register("megalm_emu")
        return

    def targets(tools: Toolchain, csrc) -> list[Target]:  # type: ignore[no-untyped-def]
        return [emulator_target(tools, csrc)]

    torch.ops.load_library(str(build.cached(targets) / "_emu.so"))
    register("megalm_emu")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    if find_compiler() is None and isinstance(library(), Absent):
        pytest.skip("no C++ compiler: nothing is built here")
    if request.param == "emulator":
        try:
            emulated()
        except BuildError:
            if find_compiler() is None:
                pytest.skip("no C++ compiler: the emulator is not built here")
            raise
        return Backend("emulator", "megalm_emu", torch.device("cpu"))
    found = library()
    if isinstance(found, Absent):
        pytest.fail(f"the operations were not built: {found.reason}")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        assert found.cuda, "torch has CUDA and the library has not"
    return Backend(request.param, "megalm", torch.device(request.param))


@pytest.fixture
def processor() -> Backend:
    """What the processor's kernels alone do."""
    found = library()
    if isinstance(found, Absent):
        if find_compiler() is None:
            pytest.skip("no C++ compiler: nothing is built here")
        pytest.fail(f"the operations were not built: {found.reason}")
    return Backend("cpu", "megalm", torch.device("cpu"))
