"""What every component is held to, whatever its kind: its record and settings are complete, importing it is cheap, and
a bad configuration is refused by name.

The subject is anything that has a plugin manager and the component's name, so that the suites of all kinds share these.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from megalm.config.keys import dotted
from megalm.config.load import SECTIONS, load_config
from megalm.config.pairs import settings_from_pairs
from megalm.config.settings import Settings
from megalm.config.toml import dumps, write_value
from megalm.config.words import fields_by_key
from megalm.errors import ConfigError, PluginError
from megalm.plugin.component import Component, PluginInfo
from megalm.plugin.hookspecs import API_VERSION
from megalm.plugin.manager import PluginManager
from megalm.plugin.registry import singular
from megalm.plugin.sources import module_of
from megalm.testing.bad_settings import BadSetting, bad_settings
from megalm.testing.check import Check, CheckFailed, NotApplicable
from megalm.testing.fresh import FreshProcessError, run_fresh


class Subject(Protocol):
    """What these checks ask of a suite's subject."""

    @property
    def manager(self) -> PluginManager:
        """The plugins."""
        ...

    @property
    def name(self) -> str:
        """The component, as a configuration names it; a joint objective's parts with ``+`` between."""
        ...


def component_checks(kind: str) -> tuple[Check[Any], ...]:
    """The checks for components of ``kind`` (``objectives``, ``tokenizers``, ``heads``, ...)."""
    what = singular(kind)
    return (
        Check(
            "component",
            f"The {what} is declared as it must be: API version, summary, class, settings with docstrings",
            lambda subject: _each(subject, kind, _component),
        ),
        Check(
            "torch_free_import",
            "Importing the plugin's module and the component's leaves torch alone",
            lambda subject: _each(subject, kind, _torch_free),
        ),
        Check(
            "bad_configuration",
            "A bad setting is refused with its full key and the plugin named",
            lambda subject: _each(subject, kind, _bad_configuration),
        ),
    )


def _each(subject: Subject, kind: str, check: Callable[[PluginManager, str, str], str]) -> str:
    """Run a check on the component, or on each part of a joint one; all that is not applicable is, as a whole."""
    names = subject.name.split("+") if kind == "objectives" else [subject.name]
    done, reasons = [], []
    for name in (name.strip() for name in names):
        try:
            text = check(subject.manager, kind, name)
        except NotApplicable as reason:
            reasons.append(str(reason))
        else:
            done.append(f"{name}: {text}" if len(names) > 1 else text)
    if not done:
        raise NotApplicable("; ".join(reasons))
    return "; ".join(done)


def _component(manager: PluginManager, kind: str, name: str) -> str:
    component = manager.get(kind, name)
    plugin = _plugin_of(component)
    problems = []
    declared = getattr(_plugin_object(plugin), "MEGALM_API", None)
    if declared is None:
        problems.append(f"{plugin.target} declares no API version; add MEGALM_API = {API_VERSION}")
    if not component.summary.strip() or "\n" in component.summary:
        what = "a summary of several lines" if component.summary.strip() else "no summary"
        problems.append(f'Component("{component.name}", ...) has {what}; give it one line for megalm plugins to print')
    try:
        cls = manager.load_class(kind, name)
    except PluginError as error:
        raise CheckFailed("\n".join([*problems, str(error)])) from None
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        problems.append(f"{component.target} leaves out what its contract asks for: {', '.join(missing)}")
    model = cls.Config
    fields: dict[str, Any] = {}
    if not (inspect.isclass(model) and issubclass(model, Settings)):
        problems.append(f"{component.target}.Config must be a subclass of megalm.api.Settings; found {model!r}")
    else:
        fields = dict(fields_by_key(model))
        problems += [
            f"{model.__name__}.{key} has no docstring; put one line in quotes below it, which the JSON Schema of "
            "configurations shows"
            for key, field in fields.items()
            if not field.description
        ]
        try:
            model.model_json_schema()
        except Exception as error:  # pydantic's own types of error differ by version
            problems.append(f"{model.__name__} has no JSON Schema, so megalm config --schema lacks it: {error}")
    if problems:
        raise CheckFailed("\n".join(problems))
    return f"API {declared[0]}.{declared[1]}, {len(fields)} settings" if declared else f"{len(fields)} settings"


def _plugin_of(component: Component) -> PluginInfo:
    assert component.plugin is not None  # the manager fills it in
    return component.plugin


def _plugin_object(plugin: PluginInfo) -> Any:
    module, _, attribute = plugin.target.partition(":")
    value: Any = importlib.import_module(module.strip())
    for part in attribute.split(".") if attribute else ():
        value = getattr(value, part)
    return value


_IMPORT = """
import importlib, json, sys
chain = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not chain:
            frame = sys._getframe(1)
            while frame is not None:
                if frame.f_code.co_name == "<module>" and "__spec__" in frame.f_globals:
                    where = frame.f_globals.get("__name__")
                    if where != "__main__":
                        chain.append((where, frame.f_code.co_filename, frame.f_lineno))
                frame = frame.f_back
        return None
before = "torch" in sys.modules
sys.meta_path.insert(0, Watch())
result = {"before": before, "culprit": None, "chain": []}
for module in sys.argv[1:]:
    importlib.import_module(module)
    if "torch" in sys.modules:
        result.update(culprit=module, chain=chain)
        break
print("\\n" + json.dumps(result))
"""


def _torch_free(manager: PluginManager, kind: str, name: str) -> str:
    component = manager.get(kind, name)
    modules = list(dict.fromkeys((module_of(_plugin_of(component).target), module_of(component.target))))
    try:
        found = json.loads(run_fresh(_IMPORT, modules).strip().splitlines()[-1])
    except FreshProcessError as error:
        raise CheckFailed(f"importing {' and '.join(modules)} in a fresh interpreter failed: {error}") from None
    if found["before"]:
        raise NotApplicable("this Python imports torch at start-up, whatever is run")
    if found["culprit"] is not None:
        raise CheckFailed(_blame(found["culprit"], found["chain"]))
    return " and ".join(modules)


def _blame(module: str, chain: list[list[Any]]) -> str:
    """``chain``: the modules whose imports led to torch, the innermost first, each with file and line."""
    lines = [f"importing {module} imports torch, which takes seconds wherever plugins and configurations are listed"]
    if chain:
        culprit, file, line = chain[0]
        path = " -> ".join([entry[0] for entry in reversed(chain)] + ["torch"])
        lines += [f"  {path}", f"  {culprit} imports it at {file}:{line}"]
    lines.append("import torch inside the functions that use it, and under TYPE_CHECKING for annotations")
    return "\n".join(lines)


def _bad_configuration(manager: PluginManager, kind: str, name: str) -> str:
    component = manager.get(kind, name)
    model = manager.load_class(kind, name).Config
    if not (inspect.isclass(model) and issubclass(model, Settings)):
        raise NotApplicable("its Config is no model of settings")
    section = next((section for section, entry in SECTIONS.items() if entry.kind == kind), None)
    prefix = (section or singular(kind), name)
    owner = f"(owner: plugin {_plugin_of(component)})"
    problems, count = [], 0
    for bad in bad_settings(model):
        count += 1
        key = dotted((*prefix, *bad.path))
        said = _refusals(manager, component, model, prefix, section is not None, bad)
        about = [line for line in said if f"{key}: " in line]
        near = [line for line in said if f"{dotted(prefix)}: " in line]
        if not about and near:
            problems.append(f"{key} = {bad.shown} is refused without naming the key: {near[0]}")
        elif not about:
            problems.append(f"{key} = {bad.shown} is accepted, but {bad.why}")
        elif not any(owner in line for line in about):
            problems.append(f"{key} = {bad.shown} is refused without naming plugin {_plugin_of(component)}: {about[0]}")
        elif bad.meant is not None and not any(f'did you mean "{bad.meant}"' in line for line in about):
            problems.append(f'{key} is refused without asking whether "{bad.meant}" was meant: {about[0]}')
    if problems:
        raise CheckFailed("\n".join(problems))
    return f"{count} bad settings"


def _refusals(
    manager: PluginManager,
    component: Component,
    model: type[Settings],
    prefix: tuple[str, str],
    in_files: bool,
    bad: BadSetting,
) -> list[str]:
    """What is said of a configuration with one bad setting, by whoever validates settings of this kind. ``in_files``:
    run configurations have sections for it."""
    section, name = prefix
    try:
        if not in_files:
            settings_from_pairs(model, prefix, f"plugin {_plugin_of(component)}", [_pair(bad)])
        else:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "run.toml"
                file.write_text(dumps({section: {name: bad.table}}), encoding="utf-8")
                load_config(file, [], manager)
    except ConfigError as error:
        return error.problems
    return []


def _pair(bad: BadSetting) -> str:
    """The setting as ``--set`` of train-tokenizer takes it, where lists are whole values."""
    keys = [part for part in bad.path if isinstance(part, str)]
    value: Any = bad.table
    for key in keys:
        value = value[key]
        if isinstance(value, list):
            break
    return f"{dotted(tuple(keys))}={write_value(value)}"
