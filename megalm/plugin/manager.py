"""Loading plugins, and finding what they offer.

pluggy does the calling. What it leaves to its users is here: an order that is the same on every rank, errors that name
the plugin, its distribution and the line, all of them in one report, and results that say where they came from.

A checkpoint or a configuration that names a plugin never causes one to be loaded: only what is installed is, or exactly
what ``--plugins`` names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

import pluggy

from megalm.errors import PluginError
from megalm.plugin.blame import describe
from megalm.plugin.check import check_api, check_hooks
from megalm.plugin.component import KINDS, Component, PluginInfo
from megalm.plugin.discovery import discover, select
from megalm.plugin.events import EventHooks
from megalm.plugin.hookspecs import PROJECT, SPECS, component_hook, hook_docs
from megalm.plugin.registry import Registry, collect, pick, singular
from megalm.plugin.sources import module_of, source_hash

CONTRACTS = {
    "objectives": "megalm.plugin.contract.objective:Objective",
    "tokenizers": "megalm.plugin.contract.tokenizer:Tokenizer",
    "heads": "megalm.plugin.contract.head:Head",
    "architectures": "megalm.plugin.contract.optim:Architecture",
    "optimizers": "megalm.plugin.contract.optim:OptimizerPlugin",
    "lr_schedules": "megalm.plugin.contract.optim:LRSchedule",
    "data_sources": "megalm.plugin.contract.source:DataSource",
    "callbacks": "megalm.plugin.contract.callback:Callback",
    "kernels": "megalm.plugin.contract.kernels:KernelProvider",
    "pipeline_schedules": "megalm.plugin.contract.pipeline:PipelineSchedule",
}
"""The class that components of a kind must subclass."""

_CALLBACK = "callback:"


class PluginManager:
    """The plugins of a run. Use :meth:`for_launch`."""

    def __init__(self) -> None:
        self._pluggy = pluggy.PluginManager(PROJECT)
        for spec in SPECS:
            self._pluggy.add_hookspecs(spec)
        self._loaded: dict[str, PluginInfo] = {}
        self._unloaded: list[str] = []
        self._registries: dict[str, Registry] = {}
        callers = {doc.name: getattr(self._pluggy.hook, doc.name) for doc in hook_docs() if doc.family == "event"}
        self.hook = EventHooks(callers, self._owner)
        """Event hooks: ``manager.hook.megalm_step_end(run=run, step=step, metrics=metrics)`` calls every implementation
        (last registered first) and returns the results that are not None. See :class:`EventHooks` for errors."""

    @classmethod
    def for_launch(cls, only: Sequence[str] | None = None) -> PluginManager:
        """A manager with all installed plugins loaded, or exactly those of ``only``. PluginError, all at once."""
        manager = cls()
        found = discover()
        chosen = select(found, only)
        manager.load(chosen)
        manager._unloaded = sorted({info.name for info in found} - {info.name for info in chosen})
        return manager

    @property
    def plugins(self) -> dict[str, PluginInfo]:
        """Loaded plugins by name."""
        return dict(self._loaded)

    def load(self, infos: Iterable[PluginInfo]) -> None:
        """Import and register plugins. One PluginError lists every one that fails; those are left unregistered."""
        problems = []
        for info in infos:
            try:
                self._load(info)
            except (Exception, SystemExit) as error:
                text = str(error) if isinstance(error, PluginError) else describe(error)
                problems.append(f"plugin {info}, entry point {info.target}: {text}")
        if problems:
            head = "cannot load 1 plugin" if len(problems) == 1 else f"cannot load {len(problems)} plugins"
            raise PluginError(f"{head}:\n" + "\n".join(f"  {problem}" for problem in problems))

    def _load(self, info: PluginInfo) -> None:
        if info.name in self._loaded:
            raise PluginError(f"a plugin of that name is loaded: {self._loaded[info.name]}; names must differ")
        plugin = metadata.EntryPoint(info.name, info.target, PROJECT).load()
        check_api(plugin)
        check_hooks(plugin)
        self._register(plugin, info.name)
        self._loaded[info.name] = info
        self._registries.clear()

    def _register(self, plugin: object, name: str) -> None:
        """Register with pluggy, which checks that implementations take no argument that their hook lacks."""
        try:
            self._pluggy.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._pluggy.has_plugin(name):  # pluggy 1.6 and older keep what they registered before the error
                self._pluggy.unregister(name=name)
            raise PluginError(" ".join(str(error).split())) from error

    def check_pending(self) -> None:
        """PluginError where an implementation has no hook. :meth:`load` has refused those of plugins already."""
        try:
            self._pluggy.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(" ".join(str(error).split())) from error

    def registry(self, kind: str) -> Registry:
        """Components of a kind by name (in order), each with its plugin; several where plugins share a name."""
        if kind not in self._registries:
            hook = component_hook(kind)
            self._registries[kind] = collect(hook, self._offers(hook))
        return dict(self._registries[kind])

    def _offers(self, hook: str) -> Iterator[tuple[PluginInfo, Callable[[], Iterable[Component]]]]:
        caller: pluggy.HookCaller = getattr(self._pluggy.hook, hook)
        functions: dict[str, Callable[[], Any]] = {i.plugin_name: i.function for i in caller.get_hookimpls()}
        for name, info in self._loaded.items():
            if name in functions:
                yield info, functions[name]

    def get(self, kind: str, name: str) -> Component:
        """The component that a configuration calls ``name`` or ``plugin:name``; PluginError if unknown or ambiguous."""
        return pick(self.registry(kind), kind, name, self._unloaded)

    def load_component(self, component: Component) -> Any:
        """Import a component's target. PluginError names the component, its plugin, the cause and its file and line."""
        module, _, attribute = component.target.partition(":")
        try:
            value: Any = importlib.import_module(module)
            for part in attribute.split("."):
                value = getattr(value, part)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f'"{component.name}" of plugin {component.plugin} cannot be loaded from {component.target}: '
                f"{describe(error)}"
            ) from error
        return value

    def load_class(self, kind: str, name: str) -> Any:
        """Find a component, import it, and check that it subclasses the contract of its kind (:data:`CONTRACTS`)."""
        component = self.get(kind, name)
        return self.check_class(kind, component, self.load_component(component))

    def tokenizer_class(self, name: str) -> Any:
        """:meth:`load_class` of a tokenizer, as those who read one from a folder ask for it."""
        return self.load_class("tokenizers", name)

    def check_class(self, kind: str, component: Component, value: Any) -> Any:
        """``value`` if it subclasses the contract of ``kind``, or ``kind`` has none; else PluginError."""
        if kind not in CONTRACTS:
            return value
        module, _, attribute = CONTRACTS[kind].partition(":")
        base = getattr(importlib.import_module(module), attribute)
        if not (isinstance(value, type) and issubclass(value, base)):
            raise PluginError(
                f'{singular(kind)} "{component.name}" of plugin {component.plugin}: {component.target} must be a '
                f"subclass of megalm.api.{attribute}; found {value!r}"
            )
        return value

    def register_callback(self, callback: object, name: str) -> None:
        """Make the ``@hookimpl`` methods of an object run with the event hooks; ``name`` is how messages call it.

        PluginError where it has none, where one is unmarked, misspelt or takes unknown arguments, or the name is taken.
        """
        try:
            if self._pluggy.has_plugin(_CALLBACK + name):
                raise PluginError("that name is taken")
            hooks = check_hooks(callback)
            if not hooks:
                raise PluginError("implements no hook; mark its methods with @hookimpl")
            component_hooks = {component_hook(kind) for kind in KINDS}.intersection(hooks)
            if component_hooks:
                raise PluginError(f"implements {', '.join(sorted(component_hooks))}, which only a plugin can")
            self._register(callback, _CALLBACK + name)
        except PluginError as error:
            raise PluginError(f'callback "{name}": {error}') from error

    def _owner(self, registration: str) -> str:
        if not registration.startswith(_CALLBACK):
            return f"plugin {self._loaded[registration]}"
        name = registration.removeprefix(_CALLBACK)
        owner, _, bare = name.rpartition(":")
        plugins = [c.plugin for c in self.registry("callbacks").get(bare, ()) if c.plugin is not None]
        plugins = [plugin for plugin in plugins if not owner or plugin.name == owner]
        by = f" of plugin {plugins[0]}" if len(plugins) == 1 else ""
        return f'callback "{name}"{by}'

    def fingerprint(self) -> dict[str, dict[str, str]]:
        """What must agree across ranks: for each plugin its distribution, version and a SHA-256 of its source files.

        The files are those of the entry point's package and of the modules that its components name, found without
        importing them.
        """
        targets: dict[str, list[str]] = {name: [info.target] for name, info in self._loaded.items()}
        for kind in KINDS:
            for components in self.registry(kind).values():
                for component in components:
                    if component.plugin is not None:
                        targets[component.plugin.name].append(component.target)
        return {
            name: {
                "dist": self._loaded[name].dist,
                "version": self._loaded[name].version,
                "sha256": source_hash(module_of(target) for target in targets[name]),
            }
            for name in sorted(targets)
        }
