"""Compiles kernels with warnings, spills and local memory as errors; reads their machine code.

What was compiled is kept beside the libraries of the cache, by a hash of the kernel and of what it may include, so that
a changed kernel is compiled anew and the others are not.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from megalm.native import build
from megalm.native.targets import ARCHITECTURES
from megalm.native.toolchain import Toolkit

STRICT = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage")


CHECKED = ARCHITECTURES if os.environ.get("MEGALM_PROOF") == "full" else ("90",)
"""Architectures that the gates compile for: all of them take minutes."""


class RefusedError(Exception):
    """What the compiler said."""


def compiled(kernel: Path, csrc: Path, toolkit: Toolkit, architecture: str) -> Path:
    """The machine code of a file of csrc/cuda for one architecture. Raises RefusedError."""
    command = [str(toolkit.nvcc), *STRICT, f"-arch=sm_{architecture}", f"-I{csrc}", "-cubin"]
    key = hashlib.sha256("\0".join([toolkit.version, *STRICT, architecture]).encode())
    headers = [path for kind in ("*.h", "*.cuh", "*.hpp") for path in csrc.rglob(kind)]
    for path in [kernel, *sorted(headers)]:
        key.update(path.read_bytes())
    out = build.cache_folder() / "strict" / f"{kernel.stem}-{architecture}-{key.hexdigest()[:20]}.cubin"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        made = out.with_suffix(f".{os.getpid()}")
        ended = subprocess.run([*command, str(kernel), "-o", str(made)], capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise RefusedError(ended.stdout + ended.stderr)
        made.replace(out)
    return out


def all_compiled(csrc: Path, toolkit: Toolkit) -> dict[tuple[str, str], Path | RefusedError]:
    """Of every kernel file for every architecture of CHECKED."""
    from concurrent.futures import ThreadPoolExecutor

    def one(pair: tuple[Path, str]) -> Path | RefusedError:
        try:
            return compiled(pair[0], csrc, toolkit, pair[1])
        except RefusedError as error:
            return error

    pairs = [(kernel, arch) for kernel in sorted((csrc / "cuda").glob("*.cu")) for arch in CHECKED]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {(pair[0].stem, pair[1]): made for pair, made in zip(pairs, pool.map(one, pairs), strict=True)}


@dataclass
class Function:
    """What a kernel's machine code has of each kind of access."""

    wide_loads: int = 0
    wide_stores: int = 0
    local: list[str] = field(default_factory=list)


def functions(cubin: Path, cuobjdump: Path) -> dict[str, Function]:
    """By mangled name."""
    env = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    shown = subprocess.run([cuobjdump, "-sass", cubin], env=env, capture_output=True, text=True, check=True).stdout
    found: dict[str, Function] = {}
    for line in shown.splitlines():
        if named := re.match(r"\s*Function : (\S+)", line):
            current = found.setdefault(named.group(1), Function())
        elif operation := re.search(r"\*/\s+(?:@!?U?P\w+ )?((?:LDG|STG|LDL|STL)\S*)", line):
            word = operation.group(1)
            wide = bool(re.search(r"\.(128|256)\b", word))
            current.wide_loads += word.startswith("LDG") and wide
            current.wide_stores += word.startswith("STG") and wide
            if word.startswith(("LDL", "STL")):
                current.local.append(line.strip())
    return found


def find_cuobjdump(toolkit: Toolkit | None) -> Path | None:
    """Of the toolkit, of PATH, or of the package nvidia-cuda-cuobjdump, with the nvdisasm that it needs beside it."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [toolkit.home / "bin"] if toolkit is not None else []
    places += [Path(found).parent for found in [shutil.which("cuobjdump")] if found]
    places += sorted(packages.glob("*/bin"))
    return next(
        (place / "cuobjdump" for place in places if all((place / n).exists() for n in ("cuobjdump", "nvdisasm"))), None
    )
