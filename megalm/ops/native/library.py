"""Loads the compiled operations into torch, once a process.

Libraries built at installation are taken where they fit; otherwise they are built now and kept for the next program.
MEGALM_NATIVE=off leaves them out, ``require`` refuses to go on without.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megalm.errors import UsageError
from megalm.native import build
from megalm.native.errors import BuildError
from megalm.native.toolchain import find_toolkit
from megalm.ops.native import dropout, norm

NAMESPACE = "megalm"
MODULES = (norm, dropout)
"""Modules that register operations."""


@dataclass(frozen=True)
class Library:
    """What was loaded."""

    folder: Path
    origin: Literal["installation", "cache"]
    cuda: bool
    """CUDA's implementations are there too."""
    record: dict[str, Any]


@dataclass(frozen=True)
class Absent:
    """Why nothing was loaded."""

    reason: str


@functools.cache
def library() -> Library | Absent:
    """Load the operations of the namespace ``megalm``, building them if need be; what came of it.

    Raises UsageError under MEGALM_NATIVE=require.
    """
    wanted = os.environ.get("MEGALM_NATIVE", "auto")
    if wanted not in ("auto", "off", "require"):
        raise UsageError(f"MEGALM_NATIVE is auto, off or require; found {wanted!r}")
    if wanted == "off":
        return Absent("MEGALM_NATIVE=off")
    try:
        return _load()
    except (BuildError, OSError) as error:
        if wanted == "require":
            raise UsageError(f"MEGALM_NATIVE=require: {error}") from error
        return Absent(str(error))


def _load() -> Library:
    folder = build.installed()
    origin: Literal["installation", "cache"] = "installation"
    # A library without CUDA's part, or of another processor, does not serve here.
    if folder is None or not _serves(folder):
        folder, origin = build.cached(), "cache"
    record = build.read_record(folder) or {}
    check_processor(record.get("march", ""))
    torch.ops.load_library(str(folder / "_cpu.so"))
    cuda = torch.version.cuda is not None and (folder / "_cuda.so").exists()
    if cuda:
        torch.ops.load_library(str(folder / "_cuda.so"))
    register(NAMESPACE)
    return Library(folder, origin, cuda, record)


def _serves(folder: Path) -> bool:
    has_cuda = (folder / "_cuda.so").exists()
    return has_cuda or torch.version.cuda is None or find_toolkit() is None


def check_processor(march: str) -> None:
    """BuildError where this processor lacks what the library was compiled for, instead of an illegal instruction."""
    if platform.machine() == "x86_64" and "x86-64-v3" in march:
        capability = torch.backends.cpu.get_cpu_capability()
        if capability not in ("AVX2", "AVX512", "AVX512_BF16", "AMX"):
            raise BuildError(
                f"the library was compiled for processors with AVX2, and this one has {capability}; "
                "set MEGALM_MARCH=x86-64 to build another"
            )


def register(namespace: str) -> None:
    """Tell torch the shapes and gradients of a namespace's operations."""
    for module in MODULES:
        module.register(namespace)
