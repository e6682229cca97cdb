"""What ``megalm check-plugin NAME`` means: one component, the parts of a joint objective, or all that a plugin has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megalm.errors import PluginError
from megalm.plugin.component import Component
from megalm.plugin.manager import PluginManager
from megalm.plugin.registry import singular
from megalm.plugin.suggest import did_you_mean, listing

KINDS = ("objectives", "tokenizers", "heads")
"""Kinds of component that have checks."""


@dataclass(frozen=True)
class Target:
    """One thing to check."""

    kind: str
    name: str
    """As a configuration names it."""
    components: tuple[Component, ...]
    """Several for a joint objective."""

    def __str__(self) -> str:
        plugins = dict.fromkeys(str(component.plugin) for component in self.components)
        return f"{singular(self.kind)} {self.name} of plugin {' and '.join(plugins)}"


def kind_of(text: str | None) -> tuple[str, ...]:
    """The kinds that ``--kind`` leaves. PluginError for one that has no checks."""
    if text is None:
        return KINDS
    found = tuple(kind for kind in KINDS if text in (kind, singular(kind)))
    if not found:
        hint = did_you_mean(text, map(singular, KINDS))
        raise PluginError(f"--kind {text}: expected {_either(KINDS)}{hint}")
    return found


def targets(name: str, kinds: tuple[str, ...], manager: PluginManager) -> list[Target]:
    """What a name stands for: every component so called, and all those of the plugin or distribution so called.

    PluginError where it is unknown, or where plugins share it.
    """
    if "+" in name:
        return [_joint(name, kinds, manager)]
    found = [*_components(name, kinds, manager), *_of_plugin(name, kinds, manager)]
    if found:
        return list({(target.kind, target.components): target for target in found}.values())
    raise PluginError(_unknown(name, kinds, manager))


def _joint(name: str, kinds: tuple[str, ...], manager: PluginManager) -> Target:
    if "objectives" not in kinds:
        raise PluginError(f'"{name}": only objectives are joined with +')
    parts = [part.strip() for part in name.split("+")]
    return Target("objectives", "+".join(parts), tuple(manager.get("objectives", part) for part in parts))


def _components(name: str, kinds: tuple[str, ...], manager: PluginManager) -> Iterator[Target]:
    bare = name.rpartition(":")[2]
    for kind in kinds:
        if bare in manager.registry(kind) and (":" not in name or _offered(manager, kind, name)):
            yield Target(kind, name, (manager.get(kind, name),))


def _offered(manager: PluginManager, kind: str, name: str) -> bool:
    owner, _, bare = name.rpartition(":")
    plugins = [component.plugin for component in manager.registry(kind)[bare]]
    return any(plugin is not None and plugin.name == owner for plugin in plugins)


def _of_plugin(name: str, kinds: tuple[str, ...], manager: PluginManager) -> Iterator[Target]:
    for kind in kinds:
        for bare, components in manager.registry(kind).items():
            for component in components:
                plugin = component.plugin
                assert plugin is not None  # the manager fills it in
                if name == plugin.name or _normal(name) == _normal(plugin.dist):
                    shown = bare if len(components) == 1 else f"{plugin.name}:{bare}"
                    yield Target(kind, shown, (component,))


def _normal(dist: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", dist).lower()


def _unknown(name: str, kinds: tuple[str, ...], manager: PluginManager) -> str:
    plugins = manager.plugins
    known = {info.name for info in plugins.values()} | {info.dist for info in plugins.values()}
    if _normal(name) in map(_normal, known):
        return f'plugin "{name}" has no {_either(kinds)} to check'
    components = {component for kind in kinds for component in manager.registry(kind)}
    bare = name.rpartition(":")[2]
    hint = did_you_mean(bare, components | known)
    if ":" in name:
        offers = [component for kind in kinds for component in manager.registry(kind).get(bare, ())]
        hint = f"; it is offered by {' and '.join(str(component.plugin) for component in offers)}" if offers else hint
    end = "" if hint.endswith("?") else ";"
    return (
        f'no {_either(kinds)} and no plugin is called "{name}"{hint}{end} components: {listing(components)}; '
        f"plugins: {listing(plugins)}"
    )


def _either(kinds: tuple[str, ...]) -> str:
    names = [singular(kind) for kind in kinds]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
