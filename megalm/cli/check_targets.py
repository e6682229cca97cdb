"""What ``megalm check-plugin NAME`` means: one component, the parts of a joint objective, or all that a plugin has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalm.errors import PluginError
from megalm.pipeline.choose import KIND as SCHEDULES
from megalm.pipeline.choose import split_argument
from megalm.plugin.component import Component
from megalm.plugin.manager import PluginManager
from megalm.plugin.registry import singular
from megalm.plugin.suggest import did_you_mean, listing

KINDS = ("objectives", "tokenizers", "heads", SCHEDULES)
"""Kinds of component that have checks."""


@dataclass(frozen=True)
class Target:
    """One thing to check."""

    kind: str
    name: str
    """As a configuration names it."""
    components: tuple[Component, ...]
    """Several for a joint objective."""
    argument: str | None = None
    """What follows the name of a component that takes an argument (``csv:FILE``)."""
    lacks: str | None = None
    """How the component is named with the argument that it needs and was not given, such as ``csv:FILE``."""

    @property
    def spec(self) -> str:
        """The name with its argument, as users write it."""
        return self.name if self.argument is None else f"{self.name}:{self.argument}"

    def __str__(self) -> str:
        plugins = dict.fromkeys(str(component.plugin) for component in self.components)
        return f"{singular(self.kind)} {self.spec} of plugin {' and '.join(plugins)}"


def kind_of(text: str | None, kinds: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    """Those of ``kinds`` that ``--kind`` leaves. PluginError for one that is not among them."""
    if text is None:
        return kinds
    found = tuple(kind for kind in kinds if text.replace(" ", "_") in (kind, one_of(kind)))
    if not found:
        hint = did_you_mean(text, map(one_of, kinds))
        raise PluginError(f"--kind {text}: expected {_either([one_of(kind) for kind in kinds])}{hint}")
    return found


def one_of(kind: str) -> str:
    """What ``--kind`` calls a kind: ``objective``, ``pipeline_schedule``."""
    return kind.removesuffix("s")


def targets(name: str, kinds: tuple[str, ...], manager: PluginManager) -> list[Target]:
    """What a name stands for: every component so called, and all those of the plugin or distribution so called.

    PluginError where it is unknown, where plugins share it, or where it lacks the argument that it needs.
    """
    if (target := _with_argument(name, kinds, manager)) is not None:
        return [target]
    if "+" in name:
        return [_joint(name, kinds, manager)]
    direct = list(_components(name, kinds, manager))
    if len(direct) == 1 and direct[0].lacks is not None:
        raise PluginError(f'{singular(direct[0].kind)} "{name}" needs an argument: write {direct[0].lacks}')
    found = [*direct, *_of_plugin(name, kinds, manager)]
    if found:
        return list({(target.kind, target.components): target for target in found}.values())
    raise PluginError(_unknown(name, kinds, manager))


def _with_argument(name: str, kinds: tuple[str, ...], manager: PluginManager) -> Target | None:
    """The schedule that ``NAME:ARGUMENT`` names; None where the text names no schedule, or has no argument."""
    if SCHEDULES not in kinds:
        return None
    bare, argument = split_argument(name, manager)
    if argument is None or bare.rpartition(":")[2] not in manager.registry(SCHEDULES):
        return None
    return Target(SCHEDULES, bare, (manager.get(SCHEDULES, bare),), argument)


def _lacks(kind: str, name: str, manager: PluginManager) -> str | None:
    """``NAME:FILE`` of a component that needs an argument. One that cannot be imported is left to its checks."""
    if kind != SCHEDULES:
        return None
    try:
        argument = manager.load_class(kind, name).argument_name
    except PluginError:
        return None
    return None if argument is None else f"{name}:{argument}"


def _joint(name: str, kinds: tuple[str, ...], manager: PluginManager) -> Target:
    if "objectives" not in kinds:
        raise PluginError(f'"{name}": only objectives are joined with +')
    parts = [part.strip() for part in name.split("+")]
    return Target("objectives", "+".join(parts), tuple(manager.get("objectives", part) for part in parts))


def _components(name: str, kinds: tuple[str, ...], manager: PluginManager) -> Iterator[Target]:
    bare = name.rpartition(":")[2]
    for kind in kinds:
        if bare in manager.registry(kind) and (":" not in name or _offered(manager, kind, name)):
            yield Target(kind, name, (manager.get(kind, name),), lacks=_lacks(kind, name, manager))


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
                    yield Target(kind, shown, (component,), lacks=_lacks(kind, shown, manager))


def _normal(dist: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", dist).lower()


def _unknown(name: str, kinds: tuple[str, ...], manager: PluginManager) -> str:
    plugins = manager.plugins
    wanted = _either([singular(kind) for kind in kinds])
    known = {info.name for info in plugins.values()} | {info.dist for info in plugins.values()}
    if _normal(name) in map(_normal, known):
        return f'plugin "{name}" has no {wanted} to check'
    components = {component for kind in kinds for component in manager.registry(kind)}
    bare = name.rpartition(":")[2]
    hint = did_you_mean(bare, components | known)
    if ":" in name:
        offers = [component for kind in kinds for component in manager.registry(kind).get(bare, ())]
        hint = f"; it is offered by {' and '.join(str(component.plugin) for component in offers)}" if offers else hint
    end = "" if hint.endswith("?") else ";"
    return (
        f'no {wanted} and no plugin is called "{name}"{hint}{end} components: {listing(components)}; '
        f"plugins: {listing(plugins)}"
    )


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
