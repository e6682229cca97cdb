"""Compiles targets into a folder with ninja, all at once; a library appears there whole or not at all."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megalm.native.errors import BuildError
from megalm.native.targets import Target
from megalm.native.toolchain import Toolchain

RECORD = "build.json"
"""What was built, of what, by what: written last."""


def compile_targets(targets: Sequence[Target], out: Path, tools: Toolchain, record: dict[str, object]) -> None:
    """Make the libraries in ``out``, then their record. Raises BuildError with what the compiler said."""
    out = out.resolve()  # ninja runs in another folder
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out) as name:
        folder = Path(name)
        _stub_of_torch_cuda(targets, tools, folder)
        (folder / "build.ninja").write_text(ninja_file(targets, folder), encoding="utf-8")
        command = [tools.ninja, "-C", str(folder)]
        jobs = os.environ.get("MAX_JOBS")
        ended = subprocess.run(
            [*command, f"-j{jobs}"] if jobs else command, capture_output=True, text=True, check=False
        )
        if ended.returncode != 0:
            said = f"{_failures(ended.stdout)}{ended.stderr}".rstrip()
            raise BuildError(f"the compiler or linker failed (status {ended.returncode}):\n{said}")
        for target in targets:
            os.replace(folder / f"{target.name}.so", out / f"{target.name}.so")
        kept = folder / RECORD
        kept.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(kept, out / RECORD)


def ninja_file(targets: Sequence[Target], folder: Path) -> str:
    """The build as ninja reads it. Commands are rules' variables, since each source may have its own."""
    lines = ["rule run", "  command = $cmd", "  description = $out", ""]
    for target in targets:
        objects = []
        for number, step in enumerate(target.steps):
            made = f"{target.name}.{number}.{step.source.stem}.o"
            objects.append(made)
            lines += _edge(made, [str(step.source)], [*step.command, "-c", str(step.source), "-o", made])
        library = f"{target.name}.so"
        command = [*target.link, *objects, "-o", library, f"-L{folder}", *target.libraries]
        lines += _edge(library, objects, command)
    return "\n".join(lines) + "\n"


def _edge(made: str, inputs: list[str], command: list[str]) -> list[str]:
    paths = " ".join(_escape_path(path) for path in inputs)
    return [f"build {made}: run {paths}", f"  cmd = {' '.join(_quote(word) for word in command)}", ""]


def _escape_path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quote(word: str) -> str:
    return shlex.quote(word).replace("$", "$$")


def _failures(output: str) -> str:
    """What ninja printed of commands that failed, without the progress of the others."""
    start = output.find("FAILED:")
    return output[start:] if start >= 0 else output


def _stub_of_torch_cuda(targets: Sequence[Target], tools: Toolchain, folder: Path) -> None:
    """Where torch has no CUDA, an empty library of its name: what is linked here loads where the real one is."""
    if any("-ltorch_cuda" in target.libraries for target in targets):
        if (tools.torch.root / "lib" / "libtorch_cuda.so").exists():
            return
        empty = folder / "empty.c"
        empty.write_text("", encoding="utf-8")
        compiler = shutil.which("cc") or tools.cxx
        stub = [compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(empty)]
        stub += ["-o", str(folder / "libtorch_cuda.so")]
        ended = subprocess.run(stub, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise BuildError(f"{compiler} cannot link a shared library:\n{ended.stderr}".rstrip())
