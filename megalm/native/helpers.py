"""The C++ helpers of csrc/helpers: tensor-free functions for what is slow in Python.

Each has a reference in Python, which is what it means and what runs where nothing can be compiled. They come from the
installation if it has them for this version of Python, else they are built at first use, apart from the operations: the
data layer needs neither those nor torch.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import threading
from pathlib import Path
from types import ModuleType

from megalm.errors import UsageError
from megalm.native import build
from megalm.native.errors import BuildError
from megalm.native.targets import Target, helpers_name, helpers_target
from megalm.native.toolchain import Toolchain

MODULE = "_megalm_helpers"
_LOADING = threading.Lock()


def helpers() -> ModuleType | str:
    """The module, or why there is none. UsageError under MEGALM_NATIVE=require."""
    # Threads that come together: one of them would find the module before its functions are in it.
    with _LOADING:
        return _helpers()


@functools.cache
def _helpers() -> ModuleType | str:
    wanted = os.environ.get("MEGALM_NATIVE", "auto")
    if wanted == "off":
        return "MEGALM_NATIVE=off"
    try:
        return _load(_find())
    except (BuildError, ImportError, OSError) as error:
        if wanted == "require":
            raise UsageError(f"MEGALM_NATIVE=require: {error}") from error
        return str(error)


def _find() -> Path:
    name = f"{helpers_name()}.so"
    if (build.INSTALLED / name).exists() and not isinstance(build.installed(), str):
        return build.INSTALLED / name
    return build.cached(_targets) / name


def _targets(tools: Toolchain, csrc: Path) -> list[Target]:
    return [helpers_target(tools, csrc)]


def _load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
