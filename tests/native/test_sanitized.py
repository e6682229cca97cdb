"""Every kernel of csrc/cuda, run on the host under AddressSanitizer and UndefinedBehaviorSanitizer, and in several
orders of its threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.native import build
from megalm.native.errors import BuildError
from megalm.native.targets import Target, emulator_target
from megalm.native.toolchain import Toolchain, find_toolchain

from .sanitizers import preloaded
from .small import ROOT

KERNELS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
SEEDS = (2, 3) if os.environ.get("MEGALM_PROOF") == "full" else (2,)
UNDER_SANITIZERS = "3"
"""An order of its own there too: tests/kernels has the first one."""


def _library(*, sanitize: bool) -> tuple[Path, Toolchain]:
    def targets(tools: Toolchain, csrc: Path) -> list[Target]:
        return [emulator_target(tools, csrc, sanitize=sanitize)]

    try:
        tools = find_toolchain()
    except BuildError as error:
        pytest.skip(str(error))
    if sanitize and not preloaded(tools.cxx):
        pytest.skip(f"{tools.cxx} has no sanitizers that can be preloaded")
    return build.cached(targets) / "_emu.so", tools


def _run(library: Path, env: dict[str, str], *kernels: str) -> None:
    """The tests of these names on the emulator, without those of torch's tracing, which run no other code of ours."""
    tests = [ROOT / "tests" / "kernels" / f"test_{kernel}.py" for kernel in kernels]
    missing = [str(path) for path in tests if not path.exists()]
    assert not missing, f"kernels without tests: {missing}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, tests)]
    command += ["-k", "emulator and not opcheck and not compile"]
    given = {**os.environ, "MEGALM_EMU_LIBRARY": str(library), "PYTHONPATH": str(ROOT), **env}
    ended = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-6000:]
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 5 * len(kernels)


@pytest.mark.parametrize("kernel", [*KERNELS, "alignment"])
def test_sanitizers_find_nothing(kernel: str) -> None:
    library, tools = _library(sanitize=True)
    _run(library, {**preloaded(tools.cxx), "MEGALM_EMU_SEED": UNDER_SANITIZERS}, kernel)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_order_of_threads_matters(seed: int) -> None:
    library, _ = _library(sanitize=False)
    _run(library, {"MEGALM_EMU_SEED": str(seed)}, *KERNELS)
