"""What this machine has to compile with: a C++ compiler, ninja, CUDA's compiler, torch's headers.

torch is looked for, not imported: an isolated build environment hides it, though it lies in the same prefix.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megalm.native.errors import BuildError


@dataclass(frozen=True)
class Torch:
    """An installed torch."""

    root: Path
    """Its package folder, with ``include`` and ``lib``."""
    version: str
    cuda: str | None
    """The CUDA version that it was built for; none for a CPU build."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit."""

    home: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


@dataclass(frozen=True)
class Toolchain:
    """Everything that a build needs. ``cuda`` is none where no toolkit was found."""

    cxx: str
    cxx_version: str
    ninja: str
    torch: Torch
    cuda: Toolkit | None


def find_toolchain() -> Toolchain:
    """What is there. Raises BuildError with what is missing and how to get it; a missing CUDA toolkit is no error."""
    cxx = find_compiler()
    if cxx is None:
        raise BuildError("no C++ compiler: install g++ (Debian, Ubuntu: apt-get install g++) or name one in CXX")
    ninja = find_ninja()
    if ninja is None:
        raise BuildError("ninja is missing: pip install ninja")
    torch = find_torch()
    if torch is None:
        raise BuildError("torch's headers were not found: install torch into this environment")
    return Toolchain(cxx, version_of(cxx), ninja, torch, find_toolkit())


def find_compiler() -> str | None:
    """Path of ``CXX``, else of g++, clang++ or c++."""
    named = os.environ.get("CXX")
    names = [named] if named else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def find_ninja() -> str | None:
    """Path of ninja: of this environment, whose scripts need not be on PATH, or the system's."""
    return shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")


def version_of(tool: str) -> str:
    """First line of ``TOOL --version``; raises BuildError where it does not run."""
    try:
        out = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{tool} does not run: {error}") from error
    return out.splitlines()[0].strip() if out else ""


def find_torch() -> Torch | None:
    """The torch of this environment, imported by nobody."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    # An isolated build has the prefix of the environment that it builds for.
    folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    for root in folders:
        if (root / "version.py").is_file() and (root / "include" / "torch" / "csrc" / "stable").is_dir():
            text = (root / "version.py").read_text(encoding="utf-8")
            version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
            cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, re.MULTILINE)
            return Torch(root, version.group(1) if version else "unknown", cuda.group(1) if cuda else None)
    return None


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit of ``CUDA_HOME`` or ``CUDA_PATH``, of the nvcc on PATH, or in /usr/local/cuda."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _home_of_nvcc(), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists() and (version := _toolkit_version(Path(home))):
            return Toolkit(Path(home), version)
    return None


def _home_of_nvcc() -> str | None:
    """Where the nvcc on PATH keeps its things; asked for, since a wrapper script may stand in another folder."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.+)$", shown.stderr, re.MULTILINE)
    return os.path.normpath(found.group(1).strip()) if found else None


def _toolkit_version(home: Path) -> str | None:
    try:
        out = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", out)
    return found.group(1) if found else None
