"""Loads the compiled operations into torch, once a process.

Libraries built at installation are taken where they fit; otherwise they are built now and kept for the next program.
MEGALM_NATIVE=off leaves them out, ``require`` refuses to go on without.
"""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megalm.errors import UsageError
from megalm.native import build, processor
from megalm.native.errors import BuildError
from megalm.native.targets import serves
from megalm.native.toolchain import find_toolkit
from megalm.ops.native import activation, cross_entropy, dropout, multi_tensor, norm, rope, softmax

NAMESPACE = "megalm"
MODULES = (norm, dropout, activation, rope, cross_entropy, softmax, multi_tensor)
"""Modules that register operations."""


@dataclass(frozen=True)
class Library:
    """What was loaded."""

    folder: Path
    origin: Literal["installation", "cache"]
    without_cuda: str | None
    """Why CUDA's implementations are not there; none where they are."""
    record: dict[str, Any]
    """Of the build: see megalm.native.build."""

    @property
    def cuda(self) -> bool:
        """CUDA's implementations are there too."""
        return self.without_cuda is None

    def unserved(self) -> str | None:
        """Which GPU of this machine CUDA's implementations are not for, and what builds others; none where all are
        served. It wakes CUDA, which a run on the processor should not.
        """
        built = [name.removeprefix("sm_") for name in self.record["architectures"]]
        indices = range(torch.cuda.device_count())
        have = ["".join(map(str, torch.cuda.get_device_capability(index))) for index in indices]
        for index, capability in enumerate(have):
            if not serves(capability, built):
                wanted = ";".join(sorted(set(have), key=int))
                return (
                    f"they are built for {', '.join(self.record['architectures'])}, and "
                    f"{torch.cuda.get_device_name(index)} is sm_{capability}: "
                    f'MEGALM_CUDA_ARCH="{wanted}" builds others, CUDA_VISIBLE_DEVICES hides a GPU that is not used'
                )
        return None


@dataclass(frozen=True)
class Absent:
    """Why nothing was loaded."""

    reason: str


_LOADING = threading.Lock()
"""Pipelines compute again in autograd's threads; loading twice would register operations twice, which torch refuses."""


def library() -> Library | Absent:
    """Load the operations of the namespace ``megalm``, building them if need be; what came of it.

    Raises UsageError under MEGALM_NATIVE=require.
    """
    with _LOADING:
        return _library()


@functools.cache
def _library() -> Library | Absent:
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
    folder, origin, record = _find()
    march = str(record.get("march", ""))
    if lacking := processor.lacking(march):
        raise BuildError(f"{folder} was built for {march}, and this processor lacks {', '.join(lacking)}")
    torch.ops.load_library(str(folder / "_cpu.so"))
    without_cuda = _load_cuda(folder, record)
    register(NAMESPACE)
    return Library(folder, origin, without_cuda, record)


def _find() -> tuple[Path, Literal["installation", "cache"], dict[str, Any]]:
    """The installation's libraries, or those of the cache where these do not serve or have less than could be built."""
    kept = build.installed()
    if not isinstance(kept, str) and (_without_cuda(kept) is None or not _toolkit_fits()):
        return build.INSTALLED, "installation", kept
    try:
        folder = build.cached()
    except BuildError as error:
        if isinstance(kept, str):
            raise BuildError(f"{kept}, and nothing can be built now: {error}") from error
        return build.INSTALLED, "installation", {**kept, "without_cuda": str(error)}
    return folder, "cache", build.read_record(folder) or {}


def _without_cuda(record: dict[str, Any]) -> str | None:
    """Why a build has no CUDA library for this torch; none where it has, or where torch has no use for one."""
    if torch.version.cuda is None:
        return None
    if "_cuda" not in record.get("libraries", ()):
        return str(record.get("without_cuda"))
    if build.major(record["cuda"]) != build.major(torch.version.cuda):
        return f"it was built with CUDA {record['cuda']}, and torch with {torch.version.cuda}"
    return None


def _toolkit_fits() -> bool:
    toolkit = find_toolkit()
    return toolkit is not None and build.major(toolkit.version) == build.major(str(torch.version.cuda))


def _load_cuda(folder: Path, record: dict[str, Any]) -> str | None:
    """Load CUDA's implementations, or say why not."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if (reason := _without_cuda(record)) is not None:
        return reason
    try:
        torch.ops.load_library(str(folder / "_cuda.so"))
    except OSError as error:  # the processor's part is not worse for it
        return str(error)
    return None


def register(namespace: str) -> None:
    """Tell torch the shapes and gradients of a namespace's operations."""
    for module in MODULES:
        module.register(namespace)
