"""What to build here, under which key, and where it is kept.

Two places hold libraries: the package itself, filled at installation, and a cache for what is built at first use. Both
carry the hash of what they were built from, so that a changed source is never served by an old library.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalm.files import write_text
from megalm.native import processor, targets
from megalm.native.compile import RECORD, compile_targets
from megalm.native.errors import BuildError
from megalm.native.targets import Target, cpu_target, cuda_target
from megalm.native.toolchain import Toolchain, find_toolchain

INSTALLED = Path(__file__).resolve().parent / "lib"
"""Libraries built at installation."""


def default_targets(tools: Toolchain, csrc: Path) -> list[Target]:
    """What a program loads here: the processor's library, and CUDA's unless :func:`without_cuda`."""
    cuda = [] if without_cuda(tools) is not None else [cuda_target(tools, csrc)]
    return [cpu_target(tools, csrc), *cuda]


def without_cuda(tools: Toolchain) -> str | None:
    """Why CUDA's library is not built here; none where it is: if torch and a toolkit have one major version of CUDA.

    MEGALM_CUDA=on builds it for any torch, since it may run elsewhere, off for none. Raises BuildError.
    """
    wanted = os.environ.get("MEGALM_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise BuildError(f"MEGALM_CUDA is auto, on or off; found {wanted!r}")
    if wanted == "on" and tools.cuda is None:
        raise BuildError("MEGALM_CUDA=on, but no CUDA toolkit was found: set CUDA_HOME to its folder")
    if wanted == "on":
        return None
    if wanted == "off":
        return "MEGALM_CUDA=off"
    if tools.torch.cuda is None:
        return f"torch {tools.torch.version} is built without CUDA"
    if tools.cuda is None:
        return "no CUDA toolkit was found: install one, or set CUDA_HOME to its folder"
    if major(tools.cuda.version) != major(tools.torch.cuda):
        return f"torch is built for CUDA {tools.torch.cuda}, and {tools.cuda.home} has CUDA {tools.cuda.version}"
    return None


def major(version: str) -> str:
    """The part of a version before the first dot."""
    return version.split(".")[0]


def source_hash(csrc: Path) -> str:
    """Hex SHA-256 of all sources, and of how they are compiled."""
    total = hashlib.sha256(Path(targets.__file__).read_bytes())
    for path in sorted(csrc.rglob("*")):
        if path.is_file() and path.suffix in (".h", ".hpp", ".cuh", ".cpp", ".cu"):
            total.update(path.relative_to(csrc).as_posix().encode() + b"\0")
            total.update(path.read_bytes())
    return total.hexdigest()


def build_key(chosen: Sequence[Target], tools: Toolchain, csrc: Path) -> str:
    """Of everything that a library depends on: sources, commands, compilers, torch, and a processor that is native."""
    toolkit = tools.cuda.version if tools.cuda is not None else None
    commands = [[target.name, [step.command for step in target.steps], target.link] for target in chosen]
    machine = platform.machine() + (processor.fingerprint() if "-march=native" in targets.march() else "")
    facts = [source_hash(csrc), commands, tools.cxx_version, toolkit, tools.torch.version, machine]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def build_into(out: Path) -> dict[str, Any]:
    """Compile :func:`default_targets`, and the helpers if that is possible, into a folder and return the record that is
    left there. Raises BuildError.
    """
    tools, csrc = find_toolchain(), targets.sources()
    chosen = default_targets(tools, csrc)
    with contextlib.suppress(BuildError):  # Python's headers are not everywhere, and operations need them not
        chosen.append(targets.helpers_target(tools, csrc))
    return _build(chosen, out, tools, csrc)


def cached(choose: Callable[[Toolchain, Path], list[Target]] = default_targets) -> Path:
    """The folder of the libraries for this machine, built if no earlier program did. Of many processes one builds and
    says so on standard error; the others wait for it. Raises BuildError, of which they do not try the same again.
    """
    tools, csrc = find_toolchain(), targets.sources()
    chosen = choose(tools, csrc)
    out = cache_folder() / build_key(chosen, tools, csrc)
    if not (out / RECORD).exists():
        asked = time.time()
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = (out / "lock").open("w")
        except OSError as error:
            raise BuildError(f"cannot write {out} ({error.strerror}): set MEGALM_CACHE to a folder of yours") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / RECORD).exists():
                _build_first(chosen, out, tools, csrc, asked)
    return out


def _build_first(chosen: list[Target], out: Path, tools: Toolchain, csrc: Path, asked: float) -> None:
    """With the lock held. A failure is told to all who were waiting for it, not to those who ask later."""
    failure = out / "failure.txt"
    with contextlib.suppress(FileNotFoundError):
        if failure.stat().st_mtime >= asked:
            raise BuildError(failure.read_text(encoding="utf-8"))
    for left in out.glob(".build-*"):  # by a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    names = ", ".join(f"{target.name}.so" for target in chosen)
    sys.stderr.write(f"megalm: compiling {names} with {tools.cxx}, once, into {out}\n")
    sys.stderr.flush()
    began = time.monotonic()
    try:
        _build(chosen, out, tools, csrc)
    except BuildError as error:
        write_text(failure, str(error))
        raise
    sys.stderr.write(f"megalm: compiled in {time.monotonic() - began:.0f} s\n")


def cache_folder() -> Path:
    """Where libraries built at first use are kept: MEGALM_CACHE, else megalm/native in the user's cache folder."""
    given = os.environ.get("MEGALM_CACHE")
    if given:
        return Path(given) / "native"
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "megalm" / "native"
    except RuntimeError as error:
        raise BuildError("this user has no home folder: set MEGALM_CACHE to a folder for libraries") from error


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a build; none where there is no finished one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def installed() -> dict[str, Any] | str:
    """The record of what the installation put into :data:`INSTALLED`, or why that does not serve: there is none, the
    sources are others by now, or another processor or GPU was asked for.
    """
    record = read_record(INSTALLED)
    if record is None:
        return "the installation built nothing"
    with contextlib.suppress(BuildError):  # an installation without sources has nothing to be stale against
        if record.get("sources") != source_hash(targets.sources()):
            return "csrc/ has changed since the installation"
    march = str(record.get("march", ""))
    if lacking := processor.lacking(march):
        return f"the installation was built for {march}, and this processor lacks {', '.join(lacking)}"
    wanted = os.environ.get("MEGALM_MARCH")
    if wanted is not None and wanted != march:
        return f"the installation was built for {march or 'another processor'}, and MEGALM_MARCH={wanted}"
    built, asked = record.get("architectures"), os.environ.get("MEGALM_CUDA_ARCH")
    if built and asked and set(built) != set(_architectures()):
        return f"the installation was built for {', '.join(built)}, and MEGALM_CUDA_ARCH={asked}"
    return record


def _architectures() -> list[str]:
    return [f"sm_{arch}" for arch in targets.architectures()]


def _build(chosen: list[Target], out: Path, tools: Toolchain, csrc: Path) -> dict[str, Any]:
    names = [target.name for target in chosen]
    cuda = "_cuda" in names and tools.cuda is not None
    record: dict[str, Any] = {
        "libraries": names,
        "sources": source_hash(csrc),
        "compiler": tools.cxx_version,
        "march": "".join(targets.march()).removeprefix("-march="),
        "torch": tools.torch.version,
        "cuda": tools.cuda.version if cuda and tools.cuda is not None else None,
        "architectures": _architectures() if cuda else [],
        "without_cuda": None if cuda else without_cuda(tools),
    }
    compile_targets(chosen, out, tools, record)
    return record
