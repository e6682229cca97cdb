"""What to build here, under which key, and where it is kept.

Two places hold libraries: the package itself, filled at installation, and a cache for what is built at first use. Both
carry the hash of what they were built from, so that a changed source is never served by an old library.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalm.native.compile import RECORD, compile_targets
from megalm.native.errors import BuildError
from megalm.native.targets import Target, architectures, cpu_target, cuda_target, march, sources
from megalm.native.toolchain import Toolchain, find_toolchain

INSTALLED = Path(__file__).resolve().parent / "lib"
"""Libraries built at installation."""


def default_targets(tools: Toolchain, csrc: Path) -> list[Target]:
    """What a program loads here: the processor's library, and CUDA's where both torch and a toolkit have it.

    MEGALM_CUDA=on builds the latter for a torch without CUDA too (it runs elsewhere), off never.
    """
    wanted = os.environ.get("MEGALM_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise BuildError(f"MEGALM_CUDA is auto, on or off; found {wanted!r}")
    if wanted == "on" and tools.cuda is None:
        raise BuildError("MEGALM_CUDA=on, but no CUDA toolkit was found: set CUDA_HOME to its folder")
    cuda = wanted == "on" or (wanted == "auto" and tools.torch.cuda is not None)
    return [cpu_target(tools, csrc), *([cuda_target(tools, csrc)] if cuda and tools.cuda is not None else [])]


def source_hash(csrc: Path) -> str:
    """Hex SHA-256 of all sources."""
    total = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.is_file() and path.suffix in (".h", ".hpp", ".cuh", ".cpp", ".cu"):
            total.update(path.relative_to(csrc).as_posix().encode() + b"\0")
            total.update(path.read_bytes())
    return total.hexdigest()


def build_key(targets: Sequence[Target], tools: Toolchain, csrc: Path) -> str:
    """Of everything that a library depends on: sources, commands, compilers and torch."""
    toolkit = tools.cuda.version if tools.cuda is not None else None
    commands = [[target.name, [step.command for step in target.steps], target.link] for target in targets]
    facts = [source_hash(csrc), commands, tools.cxx_version, toolkit, tools.torch.version, platform.machine()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def build_into(out: Path) -> dict[str, Any]:
    """Compile :func:`default_targets` into a folder and return the record that is left there. Raises BuildError."""
    tools, csrc = find_toolchain(), sources()
    return _build(default_targets(tools, csrc), out, tools, csrc)


def cached(choose: Callable[[Toolchain, Path], list[Target]] = default_targets) -> Path:
    """The folder of the libraries for this machine, built if no earlier program did; one of many processes builds, the
    others wait for it. Raises BuildError.
    """
    tools, csrc = find_toolchain(), sources()
    targets = choose(tools, csrc)
    out = cache_folder() / build_key(targets, tools, csrc)
    if not (out / RECORD).exists():
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = (out / "lock").open("w")
        except OSError as error:
            raise BuildError(f"cannot write {out} ({error.strerror}): set MEGALM_CACHE to a folder of yours") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / RECORD).exists():
                _build(targets, out, tools, csrc)
    return out


def cache_folder() -> Path:
    """Where libraries built at first use are kept: MEGALM_CACHE, else megalm/native in the user's cache folder."""
    given = os.environ.get("MEGALM_CACHE")
    if given:
        return Path(given) / "native"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "megalm" / "native"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a build; none where there is no finished one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def installed() -> Path | None:
    """The folder that the installation filled, if it was built from the sources that are here now."""
    record = read_record(INSTALLED)
    if record is None:
        return None
    try:
        current = source_hash(sources())
    except BuildError:  # an installation without sources has nothing to be stale against
        return INSTALLED
    return INSTALLED if record.get("sources") == current else None


def _build(targets: list[Target], out: Path, tools: Toolchain, csrc: Path) -> dict[str, Any]:
    names = [target.name for target in targets]
    record: dict[str, Any] = {
        "libraries": names,
        "sources": source_hash(csrc),
        "compiler": tools.cxx_version,
        "march": " ".join(march()),
        "torch": tools.torch.version,
        "cuda": tools.cuda.version if tools.cuda is not None and "_cuda" in names else None,
        "architectures": [f"sm_{arch}" for arch in architectures()] if "_cuda" in names else [],
    }
    compile_targets(targets, out, tools, record)
    return record
