"""From RUN.toml to a resolved configuration, or to one report of everything that is wrong with it.

Each table is validated by whoever owns it: megalm's sections by the schema, ``[objective.NAME]`` and its like by the
model of the plugin that offers NAME. Problems are collected to the end, so that a wrong run is mended in one round
and not in ten, and every rank reports the same text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalm.config import toml
from megalm.config.argument import split_argument
from megalm.config.keys import diff_configs, dotted, flatten
from megalm.config.positions import Path as KeyPath
from megalm.config.schema import Config, ModelConfig
from megalm.config.settings import Settings
from megalm.config.source import Source, read_source
from megalm.config.validate import Problem, validate
from megalm.config.words import fields_by_key
from megalm.errors import ConfigError, PluginError
from megalm.plugin.component import Component
from megalm.plugin.manager import PluginManager

__all__ = ["SECTIONS", "Resolved", "SectionKind", "diff_configs", "load_config"]


def _has_pipeline(data: Mapping[str, Any]) -> bool:
    """A run of one stage has no use for a schedule, and the plugin of the default one need not be there."""
    layout = data.get("parallel")
    sizes = [layout.get(key) for key in ("pp", "pp_virtual")] if isinstance(layout, dict) else []
    return any(isinstance(size, int) and size > 1 for size in sizes)


@dataclass(frozen=True)
class SectionKind:
    """Sections that plugins own: ``[objective.NAME]`` for the components of a kind that a key of megalm's chooses."""

    kind: str
    key: tuple[str, str]
    used: Callable[[Mapping[str, Any]], bool] = lambda data: True
    """Whether the run, as it is written, uses what the key chooses."""
    argument: bool = False
    """The key may give the component an argument (``csv:FILE``)."""


SECTIONS = {
    "objective": SectionKind("objectives", ("train", "objective")),
    "head": SectionKind("heads", ("train", "head")),
    "optimizer": SectionKind("optimizers", ("train", "optimizer")),
    "data_source": SectionKind("data_sources", ("data", "source")),
    "lr_schedule": SectionKind("lr_schedules", ("train", "lr_schedule")),
    "pipeline_schedule": SectionKind(
        "pipeline_schedules", ("parallel", "pp_schedule"), used=_has_pipeline, argument=True
    ),
    "callback": SectionKind("callbacks", ("log", "callbacks")),
}


@dataclass(frozen=True)
class Resolved:
    """A valid configuration with every default filled in."""

    config: Config
    """megalm's own sections; ``[model]`` holds the architecture's defaults. The plugins' tables are as written."""
    sections: Mapping[tuple[str, str], Settings]
    """Validated settings of every component that the run uses: ``("objective", "mlm")``, ``("optimizer", "adamw")``."""
    components: Mapping[tuple[str, str], Component]
    """Those components, under the same keys."""
    origin: Mapping[str, str]
    """Of each value, by dotted key: ``run.toml:12``, ``--set``, ``architecture llama`` or ``default``."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; tables of components that the run does not use are left out."""
        tree = self.config.model_dump(mode="json")
        for section in SECTIONS:
            tree[section] = {}
        for (section, name), settings in self.sections.items():
            tree[section][name] = settings.model_dump(mode="json", by_alias=True)
        return tree

    def to_toml(self) -> str:
        """TOML that loads as the same configuration."""
        return toml.dumps(self.as_dict())


def load_config(path: Path, overrides: Sequence[str], manager: PluginManager) -> Resolved:
    """Read RUN.toml, apply ``key=value`` overrides, and validate everything with the plugins of ``manager``.

    Raises:
        ConfigError: with all problems, each ``FILE:LINE: key: ...`` or ``--set key=value: key: ...``, in order.
    """
    return _Resolver(read_source(path, overrides), manager).resolve()


class _Resolver:
    def __init__(self, source: Source, manager: PluginManager) -> None:
        self.source = source
        self.data = copy.deepcopy(source.data)
        self.manager = manager
        self.problems: list[Problem] = []
        self.sections: dict[tuple[str, str], Settings] = {}
        self.components: dict[tuple[str, str], Component] = {}
        self.written: dict[tuple[str, str], str] = {}
        """The name that a table was written under, where it is not the component's name in the choosing key."""

    def resolve(self) -> Resolved:
        for name, field in Config.model_fields.items():
            if field.is_required():
                self.data.setdefault(name, {})
        defaults, known = self.architecture()
        config, problems = validate(Config, self.data, hint=_elsewhere)
        if not known:  # what else [model] needs, an architecture may supply
            supplied = {("model", name) for name in ModelConfig.model_fields} - {("model", "architecture")}
            problems = [p for p in problems if not (p.missing and p.path in supplied)]
        self.problems += [self.attribute(p, defaults) for p in problems]
        for section, kind in SECTIONS.items():
            self.section(section, kind)
        if self.problems or config is None:
            ordered = sorted(self.problems, key=lambda p: (self.source.order(p.at or p.path), dotted(p.path)))
            raise ConfigError([p.line(self.source.place(p.at or p.path)) for p in ordered])
        resolved = Resolved(config, self.sections, self.components, {})
        origin = {dotted(path): self.origin(path, defaults) for path, _ in flatten(resolved.as_dict())}
        return Resolved(config, self.sections, self.components, origin)

    def architecture(self) -> tuple[dict[str, Any], bool]:
        """Put the architecture's defaults under the given keys of [model]: them, and whether they are known."""
        model = self.data["model"]
        name = model.get("architecture") if isinstance(model, dict) else None
        if not isinstance(name, str):
            return {}, False
        try:
            defaults = dict(self.manager.load_class("architectures", name).defaults)
        except PluginError as error:
            self.problems.append(Problem(("model", "architecture"), str(error)))
            return {}, False
        defaults = {key: value for key, value in defaults.items() if key not in model and value is not None}
        model.update(defaults)
        return defaults, True

    def attribute(self, problem: Problem, defaults: Mapping[str, Any]) -> Problem:
        """Lay what an architecture's default does at its plugin's door, and say what a lone section name is for."""
        head = problem.path[0]
        if len(problem.path) > 1 and head == "model" and problem.path[1] in defaults:
            component = self.manager.get("architectures", self.data["model"]["architecture"])
            text = f'default of architecture "{component.name}": {problem.text}'
            return Problem(problem.path, text, f"plugin {component.plugin}")
        if len(problem.path) == 1 and head in SECTIONS:
            key = dotted(SECTIONS[str(head)].key)
            return Problem(problem.path, f"{problem.text}; {key} chooses, and settings go under [{head}.NAME]")
        return problem

    def section(self, section: str, kind: SectionKind) -> None:
        """Validate the tables of one kind: of the components that are used, and of any other that has one."""
        given = self.data.get(section)
        tables = {n: t for n, t in given.items() if isinstance(t, dict)} if isinstance(given, dict) else {}
        used, failed = self.chosen(kind)
        for name in tables:
            if name in used or name in failed:
                continue
            belongs = [part for part, (component, _) in used.items() if name in _names(component)]
            if not belongs:
                component = self.find(kind.kind, name, (section, name))
                if component is not None:
                    self.settings(kind.kind, (section, name), component, tables[name], None)
            elif belongs[0] in tables:
                self.problems.append(
                    Problem((section, name), f"repeats [{dotted((section, belongs[0]))}]; keep one of them")
                )
            else:
                self.written[section, belongs[0]] = name
        for part, (component, chosen_at) in used.items():
            name = self.written.get((section, part), part)
            settings = self.settings(kind.kind, (section, name), component, tables.get(name), chosen_at)
            if settings is not None:
                self.sections[section, part] = settings
                self.components[section, part] = component

    def chosen(self, kind: SectionKind) -> tuple[dict[str, tuple[Component, KeyPath]], set[str]]:
        """Components that the choosing key names, each with where it does, and the names that are none.

        Where the run does not use what is named, a name of the user's own has to be one all the same.
        """
        names: list[tuple[KeyPath, str]] = []
        value, default = self.chosen_value(kind.key)
        in_use = kind.used(self.data)
        if not in_use and value == default:
            return {}, set()
        if isinstance(value, str) and kind.argument:
            names = [(kind.key, split_argument(value, kind.kind, self.manager)[0])]
        elif isinstance(value, str):
            names = [(kind.key, part.strip()) for part in (value.split("+") if kind.kind == "objectives" else [value])]
        elif isinstance(value, list):
            names = [((*kind.key, i), name) for i, name in enumerate(value) if isinstance(name, str)]
            for i, entry in enumerate(value):  # objectives that are mixed
                joint = entry.get("name") if isinstance(entry, dict) else None
                if isinstance(joint, str):
                    names += [((*kind.key, i, "name"), part.strip()) for part in joint.split("+")]
        used: dict[str, tuple[Component, KeyPath]] = {}
        failed: set[str] = set()
        for path, name in names:
            if name in used:
                self.problems.append(Problem(path, f'names "{name}" twice'))
                continue
            component = self.find(kind.kind, name, path)
            same = next((other for other, (c, _) in used.items() if c == component), None)
            if component is None:
                failed.add(name)
            elif same is not None:
                self.problems.append(Problem(path, f'"{name}" and "{same}" are the same'))
            elif in_use:
                used[name] = (component, path)
        return used, failed

    def chosen_value(self, key: tuple[str, str]) -> tuple[Any, Any]:
        """What a choosing key says, and its default."""
        section = Config.model_fields[key[0]].annotation
        assert isinstance(section, type)
        assert issubclass(section, Settings)
        default = section.model_fields[key[1]].get_default(call_default_factory=True)
        table = self.data.get(key[0], {})
        return (table.get(key[1], default) if isinstance(table, dict) else None), default

    def find(self, kind: str, name: str, path: KeyPath) -> Component | None:
        try:
            return self.manager.get(kind, name)
        except PluginError as error:
            self.problems.append(Problem(path, str(error)))
            return None

    def settings(
        self,
        kind: str,
        where: tuple[str, str],
        component: Component,
        table: Mapping[str, Any] | None,
        chosen_at: KeyPath | None,
    ) -> Settings | None:
        """A component's table (None: it has none), validated by its own model. ``where``: the path of the table;
        ``chosen_at``: the key that chose the component, None where the run does not use it."""
        owner = f"plugin {component.plugin}"
        try:
            value = self.manager.check_class(kind, component, self.manager.load_component(component))
        except PluginError as error:
            self.problems.append(Problem(chosen_at or where, str(error), owner))
            return None
        model = value.Config
        if not (isinstance(model, type) and issubclass(model, Settings)):
            text = f"{component.target}.Config must be a subclass of megalm.api.Settings; found {model!r}"
            self.problems.append(Problem(chosen_at or where, text, owner))
            return None
        settings, problems = validate(model, table or {}, where, owner)
        self.problems += [replace(p, at=chosen_at) if table is None else p for p in problems]
        return settings

    def origin(self, path: tuple[str, ...], defaults: Mapping[str, Any]) -> str:
        where = path
        if path[0] in SECTIONS and len(path) > 1:
            where = (path[0], self.written.get((path[0], path[1]), path[1]), *path[2:])
        given = self.source.origin(where)
        if given is not None:
            return given
        if path[0] == "model" and path[1] in defaults:
            return f"architecture {self.data['model']['architecture']}"
        return "default"


def _names(component: Component) -> tuple[str, ...]:
    """The names that a component's table may have."""
    return (
        component.name,
        f"{component.plugin.name}:{component.name}" if component.plugin is not None else component.name,
    )


def _elsewhere(path: KeyPath) -> str:
    """The section in which an unknown key would be known."""
    for section, field in Config.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings) and path[-1] in fields_by_key(inner):
            return f'; did you mean "{section}.{path[-1]}"?'
    return ""
