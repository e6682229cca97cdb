"""The architecture as a test: what may import what, who may talk to other ranks, and that nothing reads pickle.

The table in docs/architecture.md is the source of the layers. The rules read syntax trees, so they hold for code that
no test runs; each rule is also shown a planted violation, and so is known to bite.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

COMM = "megalm.parallel.comm"
SIMULATED = {"megalm.parallel.sim.store", "megalm.parallel.sim.torch_hooks"}
ADAPTERS = {"megalm.parallel.bootstrap", "megalm.parallel.board", "megalm.parallel.mesh", COMM, *SIMULATED}
"""Modules that may use torch.distributed's Store and rendezvous, or start and end process groups."""
COLLECTIVES = {
    *("all_reduce", "all_reduce_coalesced", "all_gather", "all_gather_single", "all_gather_into_tensor"),
    *("all_gather_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast", "gather", "monitored_barrier"),
    *("reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter"),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "P2POp", "_coalescing_manager"),
}
RENDEZVOUS = {
    *("TCPStore", "FileStore", "HashStore", "PrefixStore", "Store", "rendezvous"),
    *("init_process_group", "destroy_process_group", "new_group"),
}
PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_PREFIXES = ("multiprocessing.reduction", "torch.jit.load", "torch.package", "torch.distributed.checkpoint")
OBJECT_COLLECTIVES = re.compile(r"^(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?$")
TORCH = {"torch", "torchvision", "torchaudio"}
LAZY_MODULES = {"megalm", "megalm.api", "megalm.cli.app", "megalm.cli.data", "megalm.launch", "megalm.testing"}
"""Where users and plugins come in: importing these imports no torch, directly or through what they import."""


@dataclass(frozen=True)
class Module:
    """A module's name, path and syntax tree."""

    name: str
    tree: ast.Module
    is_package: bool = False

    @classmethod
    def parse(cls, name: str, source: str, is_package: bool = False) -> Module:
        return cls(name, ast.parse(source), is_package)


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is dotted and absolute."""

    target: str
    line: int
    at_import: bool
    """Runs when the module is imported: outside functions and outside ``if TYPE_CHECKING``."""
    types_only: bool


def _is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(module: Module) -> Iterator[Import]:
    """Every import statement's targets, wherever it stands."""

    def walk(node: ast.AST, at_import: bool, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import and not types_only, types_only)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                parts = parts[: len(parts) - node.level + module.is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import and not types_only, types_only)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for child in ast.iter_child_nodes(node):
                yield from walk(child, False, types_only)
        elif _is_type_checking(node):
            assert isinstance(node, ast.If)
            for child in node.body:
                yield from walk(child, at_import, True)
            for child in node.orelse:
                yield from walk(child, at_import, types_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_import, types_only)

    yield from walk(module.tree, True, False)


def names_used(module: Module) -> Iterator[tuple[str, int]]:
    """Dotted names that the module uses, with aliases resolved: ``import torch.distributed as d; d.send`` gives
    ``torch.distributed.send``."""
    alias: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                alias[item.asname or item.name.split(".")[0]] = item.name if item.asname else item.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                alias[item.asname or item.name] = f"{node.module}.{item.name}"
    for found in imports(module):
        yield found.target, found.line
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            parts: list[str] = []
            base: ast.AST = node
            while isinstance(base, ast.Attribute):
                parts.append(base.attr)
                base = base.value
            if isinstance(base, ast.Name):
                yield ".".join([alias.get(base.id, base.id), *reversed(parts)]), node.lineno


def layer_table(text: str) -> dict[str, tuple[int, int]]:
    """Layer and place in its row of each package, read from the table of docs/architecture.md."""
    layers: dict[str, tuple[int, int]] = {}
    for number, packages in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE):
        for place, package in enumerate(re.findall(r"`(\w+)`", packages)):
            layers[package] = (int(number), place)
    return layers


LAYERS = layer_table((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def package_of(name: str) -> str | None:
    """``megalm.config.load`` -> ``config``; None outside megalm and for megalm itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "megalm" and len(parts) > 1 else None


Rule = Callable[[Module], Iterator[str]]


def downwards(module: Module) -> Iterator[str]:
    """Imports among megalm's packages go to a lower layer, or within a layer to a package named before; the packages
    of layer 0 may import one another."""
    own = package_of(module.name)
    if own is None:
        return
    if own not in LAYERS:
        yield f"{module.name}: package {own!r} is not in the table of docs/architecture.md"
        return
    for found in imports(module):
        other = package_of(found.target)
        if other is None or other == own or other.startswith("__"):
            continue
        if other not in LAYERS:
            yield f"{module.name}:{found.line}: {found.target} is in no layer"
        elif LAYERS[other] > LAYERS[own] and LAYERS[other][0] > 0:
            yield f"{module.name}:{found.line}: imports {found.target}; {own} may not import {other}"


def torch_free(module: Module) -> Iterator[str]:
    """The configuration, plugin, data and metrics layers never import torch, not even in functions, nor a package of
    megalm that does. Types may name it."""
    never = {name for name, (layer, _) in LAYERS.items() if layer == 0} | {"data", "metrics"}
    if module.name != "megalm.parallel.rng" and package_of(module.name) not in never:
        return
    for found in imports(module):
        package = package_of(found.target)
        heavy = package in LAYERS and package not in never and not found.target.startswith("megalm.parallel.rng")
        if not found.types_only and (found.target.split(".")[0] in TORCH or heavy):
            yield f"{module.name}:{found.line}: imports {found.target}, and with it torch"


def ways_to_torch(entry: str, known: dict[str, Module]) -> Iterator[str]:
    """Chains of imports by which importing ``entry`` imports torch."""
    seen = set()
    todo = [(entry,)]
    while todo:
        chain = todo.pop()
        if chain[-1] in seen or chain[-1] not in known:
            continue
        seen.add(chain[-1])
        for found in imports(known[chain[-1]]):
            parts = found.target.split(".")
            if found.at_import and parts[0] in TORCH:
                yield " -> ".join([*chain, found.target])
            elif found.at_import:  # importing a.b.c runs a and a.b too, where c may be a module or a name
                todo += [(*chain, ".".join(parts[:n])) for n in range(1, len(parts) + 1)]


def plugins_use_the_api(module: Module) -> Iterator[str]:
    """First-party plugins import only ``megalm.api`` from megalm, as everybody else's plugins do."""
    if not module.name.startswith("megalm_plugins"):
        return
    for found in imports(module):
        if found.target.split(".")[0] == "megalm" and not re.match(r"megalm\.api(\.|$)", found.target):
            yield f"{module.name}:{found.line}: imports {found.target}; a plugin imports only megalm.api"


def one_doorway(module: Module) -> Iterator[str]:
    """Collectives and P2P are called in ``megalm.parallel.comm`` alone, Stores and process groups in named adapters."""
    for name, line in names_used(module):
        parts = name.split(".")
        if parts[:2] != ["torch", "distributed"]:
            continue
        if parts[2:3] in (["nn"], ["_functional_collectives"]) or COLLECTIVES.intersection(parts[2:]):
            if module.name != COMM:
                yield f"{module.name}:{line}: {name} belongs in {COMM}"
        elif RENDEZVOUS.intersection(parts[2:]) and module.name not in ADAPTERS:
            yield f"{module.name}:{line}: {name} belongs in one of {', '.join(sorted(ADAPTERS))}"


def no_pickle(module: Module) -> Iterator[str]:
    """Nothing reads or writes pickle: not by itself, not through torch, numpy or object collectives."""
    for name, line in names_used(module):
        parts = name.split(".")
        pickles = (
            parts[0] in PICKLING_MODULES
            or name in {"torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}
            or name.startswith(PICKLING_PREFIXES)
            or parts[-1] in {"read_pickle", "to_pickle"}
            or any(OBJECT_COLLECTIVES.match(part) for part in parts)
        )
        if pickles:
            yield f"{module.name}:{line}: {name} pickles"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{module.name}:{node.value.lineno}: allow_pickle may only be False"


def modules() -> list[Module]:
    found = []
    for folder, package in (("megalm", "megalm"), ("plugins", "megalm_plugins")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found.append(Module.parse(name, path.read_text(encoding="utf-8"), is_package))
    return found


RULES: tuple[Rule, ...] = (downwards, torch_free, plugins_use_the_api, one_doorway, no_pickle)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_obeys(rule: Rule) -> None:
    problems = [problem for module in modules() for problem in rule(module)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("entry", sorted(LAZY_MODULES))
def test_importing_an_entry_does_not_import_torch(entry: str) -> None:
    known = {module.name: module for module in modules()}
    assert entry in known
    assert list(ways_to_torch(entry, known)) == []


def test_a_planted_way_to_torch_is_found() -> None:
    sources = {
        "megalm.api": "from megalm.a.b import c\ndef f():\n    import torch",
        "megalm.a": "",
        "megalm.a.b": "from . import d",
        "megalm.a.d": "import numpy\nimport torch.nn",
    }
    known = {name: Module.parse(name, source, name == "megalm.a") for name, source in sources.items()}
    assert list(ways_to_torch("megalm.api", known)) == ["megalm.api -> megalm.a.b -> megalm.a.d -> torch.nn"]
    del known["megalm.a.d"]
    assert list(ways_to_torch("megalm.api", known)) == []


def test_the_walk_sees_the_source() -> None:
    names = {module.name for module in modules()}
    assert {"megalm", "megalm.errors", "megalm.config.schema", "megalm_plugins.callbacks"} <= names


def test_the_table_is_read() -> None:
    assert LAYERS["plugin"][0] == 0
    assert LAYERS["config"] < LAYERS["parallel"] < LAYERS["nn"] < LAYERS["model"] < LAYERS["train"] < LAYERS["launch"]


VIOLATIONS: list[tuple[Rule, str, str]] = [
    (downwards, "megalm.config.load", "from megalm.train import loop"),
    (downwards, "megalm.config.load", "def f():\n    import megalm.cli.app"),
    (downwards, "megalm.model.backbone", "import typing as t\nif t.TYPE_CHECKING:\n    from ..train import x"),
    (downwards, "megalm.nn.linear", "from megalm.data import store"),
    (downwards, "megalm.nn.linear", "from megalm import train"),
    (downwards, "megalm.nowhere.x", ""),
    (torch_free, "megalm.config.load", "import torch"),
    (torch_free, "megalm.data.store", "def f():\n    from torch import nn"),
    (torch_free, "megalm.metrics.jsonl", "from megalm.parallel import comm"),
    (torch_free, "megalm.plugin.contract.x", "class A:\n    import torch.nn as nn"),
    (torch_free, "megalm.data.store", "try:\n    import torch\nexcept ImportError:\n    pass"),
    (torch_free, "megalm.parallel.rng", "import torch"),
    (plugins_use_the_api, "megalm_plugins.objectives.x", "from megalm.plugin.component import Component"),
    (plugins_use_the_api, "megalm_plugins.objectives.x", "def f():\n    import megalm"),
    (plugins_use_the_api, "megalm_plugins.objectives.x", "from megalm import errors"),
    (one_doorway, "megalm.train.step", "import torch.distributed as dist\ndist.all_reduce(x)"),
    (one_doorway, "megalm.train.step", "from torch.distributed import barrier as b\nb()"),
    (one_doorway, "megalm.train.step", "import torch\ntorch.distributed.batch_isend_irecv([])"),
    (one_doorway, "megalm.train.step", "from torch import distributed as d\nd.all_gather_into_tensor(a, b)"),
    (one_doorway, "megalm.train.step", "import torch.distributed.nn.functional as f\nf.all_reduce(x)"),
    (one_doorway, "megalm_plugins.objectives.x", "import torch.distributed as dist\ndist.send(x, 1)"),
    (one_doorway, "megalm.train.step", "from torch.distributed import TCPStore"),
    (one_doorway, "megalm.model.backbone", "import torch.distributed as dist\ndist.init_process_group('gloo')"),
    (no_pickle, "megalm.checkpoint.load", "import pickle"),
    (no_pickle, "megalm.checkpoint.load", "import torch\ntorch.load('x')"),
    (no_pickle, "megalm.checkpoint.load", "from torch import load as l\nl('x', weights_only=True)"),
    (no_pickle, COMM, "import torch.distributed as dist\ndist.all_gather_object(a, b)"),
    (no_pickle, COMM, "from torch.distributed import broadcast_object_list"),
    (no_pickle, "megalm.checkpoint.load", "import torch\ntorch.jit.load('x')"),
    (no_pickle, "megalm.checkpoint.load", "import torch.distributed.checkpoint as dcp\ndcp.load({})"),
    (no_pickle, "megalm.checkpoint.load", "import shelve\nshelve.open('x')"),
    (no_pickle, "megalm.data.store", "import pandas as pd\npd.read_pickle('x')"),
    (no_pickle, "megalm.data.store", "import numpy as np\nnp.load('x', allow_pickle=True)"),
]


@pytest.mark.parametrize(("rule", "name", "source"), VIOLATIONS)
def test_a_planted_violation_is_caught(rule: Rule, name: str, source: str) -> None:
    assert list(rule(Module.parse(name, source)))


ALLOWED: list[tuple[Rule, str, str]] = [
    (downwards, "megalm.train.step", "from . import loop\nfrom megalm import __version__"),
    (downwards, "megalm.plugin.manager", "from megalm.config.settings import Settings"),
    (torch_free, "megalm.config.load", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    (torch_free, "megalm.data.order", "from megalm.parallel.rng import philox"),
    (torch_free, "megalm.nn.linear", "import torch"),
    (plugins_use_the_api, "megalm_plugins.objectives.x", "from megalm.api import Objective\nfrom . import masking"),
    (one_doorway, COMM, "import torch.distributed as dist\ndist.all_reduce(x)\ndist.init_process_group('gloo')"),
    (one_doorway, "megalm.train.step", "from megalm.parallel.comm import all_reduce\nall_reduce(x)\nq.send(1)"),
    (no_pickle, "megalm.data.store", "import numpy as np\nnp.load('x', allow_pickle=False)\njson.load(f)"),
]


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED)
def test_what_is_allowed_is_not_reported(rule: Rule, name: str, source: str) -> None:
    assert not list(rule(Module.parse(name, source)))
