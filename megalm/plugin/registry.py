"""The components that loaded plugins offer, by kind and name, each with the plugin that offers it.

pluggy's results say nothing about who returned them, so implementations are called one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from megalm.errors import PluginError
from megalm.plugin.blame import describe
from megalm.plugin.component import Component, PluginInfo
from megalm.plugin.suggest import did_you_mean, listing

Registry = dict[str, list[Component]]
"""Components by name, in order of name; several where plugins share one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def singular(kind: str) -> str:
    """``objectives`` to ``objective``, for messages and section names."""
    return kind.removesuffix("s").replace("_", " ")


def collect(hook: str, offers: Iterable[tuple[PluginInfo, Callable[[], Iterable[Component]]]]) -> Registry:
    """Call each plugin's implementation of a component hook. PluginError names the plugin that fails."""
    found: Registry = {}
    for plugin, function in offers:
        try:
            components = list(function())
        except Exception as error:
            raise PluginError(f"plugin {plugin}: {hook} failed: {describe(error)}") from error
        names = set()
        for component in components:
            _check(component, plugin, hook)
            if component.name in names:
                raise PluginError(f'plugin {plugin}: {hook} yields "{component.name}" twice')
            names.add(component.name)
            found.setdefault(component.name, []).append(replace(component, plugin=plugin))
    return {name: found[name] for name in sorted(found)}


def _check(component: object, plugin: PluginInfo, hook: str) -> None:
    prefix = f"plugin {plugin}: {hook}"
    if not isinstance(component, Component):
        raise PluginError(f"{prefix} must yield Component records; found {component!r}")
    if not _NAME.fullmatch(str(component.name)):
        raise PluginError(
            f"{prefix} yields the name {component.name!r}; names are letters, digits, '_', '-' and '.', "
            "the first a letter or digit"
        )
    if not _TARGET.fullmatch(str(component.target)):
        raise PluginError(
            f'{prefix} yields "{component.name}" with target {component.target!r}; expected "package.module:attribute"'
        )


def pick(registry: Mapping[str, list[Component]], kind: str, name: str, unloaded: Iterable[str] = ()) -> Component:
    """The component called ``name`` or ``plugin:name``.

    PluginError where there is none (naming the nearest and those available) or more than one. ``unloaded``: plugins
    that are installed and were left out, which the message mentions.
    """
    owner, _, bare = name.rpartition(":")
    found = [c for c in registry.get(bare, ()) if not owner or (c.plugin is not None and c.plugin.name == owner)]
    if len(found) == 1:
        return found[0]
    what = singular(kind)
    if found:
        claims = " and ".join(str(c.plugin) for c in found)
        choices = " or ".join(f'"{c.plugin.name}:{bare}"' for c in found if c.plugin is not None)
        raise PluginError(f'{what} "{name}" is offered by {claims}; write {choices}')
    hint = did_you_mean(bare, registry)
    if owner and bare in registry:
        hint = "; it is offered by " + " and ".join(str(c.plugin) for c in registry[bare])
    left_out = sorted(unloaded)
    rest = f"; installed but not loaded: {', '.join(left_out)} (see --plugins)" if left_out else ""
    end = "" if hint.endswith("?") else ";"
    raise PluginError(f'unknown {what} "{name}"{hint}{end} available: {listing(registry)}{rest}')
