"""``megalm doctor``: what native code is here, what it was built with, and what each operation computes with, and why.

It loads what a run would load, building it first if need be, so that what it says is what a run gets. Nothing that is
missing is an error here: it is what people come to read.
"""

from __future__ import annotations

import json as jsonlib
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import typer

from megalm.errors import MegalmError


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    build: Annotated[
        bool, typer.Option("--build", help="Build native code if it is not there, and say so in a line.")
    ] = False,
) -> None:
    """Show what native code was built, for what, and which implementation each operation uses, with the reasons."""
    if build:
        typer.echo(_in_a_line(_libraries()))
        return
    found = diagnosis()
    if json:
        typer.echo(jsonlib.dumps(found, indent=2, ensure_ascii=False))
        return
    for title, rows in found.items():
        typer.echo(f"{title}")
        for name, value in rows.items():
            lines = list(_lines(value))
            typer.echo(f"  {name:14} {lines[0] if lines else ''}".rstrip())
            for line in lines[1:]:
                typer.echo(f"  {'':14} {line}")


def diagnosis() -> dict[str, dict[str, Any]]:
    """Everything, by section. A value is text, a list of texts, a mapping, or none where there is nothing."""
    return {
        "environment": _environment(),
        "tools": _tools(),
        "libraries": _libraries(),
        "operations": _operations(),
        "kernel plugins": _plugins(),
    }


def _environment() -> dict[str, Any]:
    from megalm.native import processor

    level = next(name for name in reversed(processor.LEVELS) if not processor.lacking(name))
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": level if platform.machine() == "x86_64" else platform.machine(),
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        return found | {"torch": f"cannot be imported: {error}"}
    why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no device"
    return found | {"torch": torch.__version__, "torch's CUDA": torch.version.cuda, "GPUs": _gpus() or f"none: {why}"}


def _gpus() -> list[str]:
    import torch

    def described(index: int) -> str:
        major, minor = torch.cuda.get_device_capability(index)
        return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"

    return [described(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _tools() -> dict[str, Any]:
    """What could be built with here."""
    from megalm.native import toolchain
    from megalm.native.errors import BuildError

    found: dict[str, Any] = {}
    compiler = toolchain.find_compiler()
    try:
        found["compiler"] = "none" if compiler is None else f"{compiler}: {toolchain.version_of(compiler)}"
    except BuildError as error:
        found["compiler"] = str(error)
    found["ninja"] = toolchain.find_ninja() or "none"
    torch = toolchain.find_torch()
    found["torch headers"] = "none" if torch is None else str(torch.root / "include")
    toolkit = toolchain.find_toolkit()
    found["CUDA toolkit"] = "none" if toolkit is None else f"{toolkit.home}: CUDA {toolkit.version}"
    return found


def _libraries() -> dict[str, Any]:
    """What a run loads."""
    from megalm.native import build

    try:
        from megalm.ops.native.library import Absent, library

        loaded = library()
    except (MegalmError, ImportError, OSError) as error:
        return {"loaded": "none", "why": str(error).splitlines()}
    if isinstance(loaded, Absent):
        return {"loaded": "none", "why": loaded.reason.splitlines()}
    record = loaded.record
    from megalm.native.helpers import helpers

    module = helpers()
    found: dict[str, Any] = {
        "loaded": [f"{name}.so" for name in record["libraries"] if name != "_cuda" or loaded.cuda],
        "from": f"the {loaded.origin}, {loaded.folder}",
        "helpers": module if isinstance(module, str) else str(module.__file__),
        "sources": record["sources"][:12],
        "processor": record["march"] or "the compiler's default",
        "compiler": record["compiler"],
        "torch": f"{record['torch']}, for 2.11 and later",
    }
    if loaded.cuda:
        found |= {"CUDA": record["cuda"], "architectures": record["architectures"]}
        if (reason := loaded.unserved()) is not None:
            found["but not for"] = reason
    else:
        found["without CUDA"] = str(loaded.without_cuda).splitlines()
    kept = build.installed()
    if isinstance(kept, str) and loaded.origin == "cache":
        found["installation"] = kept
    return found


def _operations() -> dict[str, Any]:
    """The choice of a run that asks for none, for float32 on a CPU, bfloat16 on a GPU."""
    try:
        from megalm.ops.choose import choose_kernels

        chosen = {request.operation: choose_kernels([request], {}, None)[1][0] for request in _requests()}
        # Of a compiler's complaint the first line: the rest is said of the libraries.
        return {operation: str(decision).splitlines()[0] for operation, decision in chosen.items()}
    except (MegalmError, ImportError, OSError) as error:
        return {"unknown": str(error).splitlines()}


def _plugins() -> dict[str, Any]:
    """What each plugin of kernels serves, or why it does not. They are taken only by name."""
    found: dict[str, Any] = {}
    try:
        from megalm.ops.choose import provider_named
        from megalm.plugin.manager import PluginManager

        manager = PluginManager.for_launch(None)
        for name in manager.registry("kernels"):
            provider = provider_named(name, manager)
            answers = {request.operation: provider.supports(request) for request in _requests()}
            serves = [operation for operation, why in answers.items() if why is None]
            reasons = sorted({why for why in answers.values() if why is not None})
            found[name] = [*([f"serves {', '.join(serves)}"] if serves else []), *(f"not: {why}" for why in reasons)]
    except Exception as error:  # of a plugin: its fault is what is shown
        found["failed"] = f"{type(error).__name__}: {error}".splitlines()
    return found


def _requests() -> Iterator[Any]:
    import torch

    from megalm.plugin.contract.kernels import OPERATIONS, KernelRequest

    cuda = torch.cuda.is_available()
    device: Literal["cpu", "cuda"] = "cuda" if cuda else "cpu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if cuda else "float32"
    for operation in OPERATIONS:
        yield KernelRequest(operation, device, dtype, {"width": 1024})


def _in_a_line(libraries: Mapping[str, Any]) -> str:
    if libraries["loaded"] == "none":
        why = libraries["why"]
        sys.stderr.write("\n".join(["megalm: no native code, so torch and the references compute:", *why]) + "\n")
        return "native code: none"
    cuda = f", {' '.join(libraries['architectures'])}" if "architectures" in libraries else ""
    return f"native code: {', '.join(libraries['loaded'])} from {libraries['from']}, for {libraries['processor']}{cuda}"


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        yield from (str(item) for item in value)
    else:
        yield "none" if value is None else str(value)
