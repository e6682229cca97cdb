"""Hashes of plugins' source files, so that ranks on several hosts can tell that they run the same code.

A version is not enough: an editable installation changes without one. Files are found through the import system's
finders and never executed, so that the hash covers components that this run does not import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path


def module_spec(name: str) -> ModuleSpec | None:
    """Where a module would be imported from. Unlike ``find_spec`` it does not import the parent packages."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    except (ImportError, ValueError):
        return None
    return spec


def source_files(module: str) -> dict[str, Path]:
    """Name to path of the files of a module: of its package where it is or lies in one, else its own file.

    Names are relative to the package's folder and do not depend on where it is installed.
    """
    spec = module_spec(module)
    if spec is None:
        return {}
    if spec.submodule_search_locations is not None:
        package, folders = module, [Path(f) for f in spec.submodule_search_locations]
    elif "." in module and spec.origin is not None:
        package, folders = module.rpartition(".")[0], [Path(spec.origin).parent]
    else:
        return {module: Path(spec.origin)} if spec.origin is not None and Path(spec.origin).is_file() else {}
    return {
        f"{package}/{path.relative_to(folder).as_posix()}": path for folder in folders for path in folder.rglob("*.py")
    }


def source_hash(modules: Iterable[str]) -> str:
    """Hex SHA-256 over the names and contents of the source files of modules, in order of name."""
    files: dict[str, Path] = {}
    for module in modules:
        files.update(source_files(module))
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def module_of(target: str) -> str:
    """The module part of ``package.module:attribute``."""
    return target.partition(":")[0].strip()
