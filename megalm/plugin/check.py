"""What a plugin must satisfy before it is registered: a fitting API version, and hooks that really are hooks.

pluggy ignores a function that lacks the marker, so that a forgotten ``@hookimpl`` would be a plugin that silently does
nothing. Here it is an error, and so is a misspelt hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from megalm.errors import PluginError
from megalm.plugin.hookspecs import API_VERSION, PROJECT, hook_docs
from megalm.plugin.suggest import did_you_mean

HOOKS = frozenset(doc.name for doc in hook_docs())
"""Names of all hooks."""


def check_api(plugin: object) -> None:
    """PluginError unless ``MEGALM_API`` says that the plugin was written for this API."""
    wanted = getattr(plugin, "MEGALM_API", None)
    ours = f"this megalm provides API {API_VERSION[0]}.{API_VERSION[1]}"
    if wanted is None:
        raise PluginError(f"declares no API version ({ours}); add MEGALM_API = {API_VERSION} to it")
    pair = isinstance(wanted, (tuple, list)) and len(wanted) == 2 and all(type(part) is int for part in wanted)
    if not pair:
        raise PluginError(f"MEGALM_API must be two integers, such as {API_VERSION}; found {wanted!r}")
    major, minor = wanted
    if major != API_VERSION[0]:
        raise PluginError(f"was written for API {major}.{minor}, but {ours}; install a version of it for that API")
    if minor > API_VERSION[1]:
        raise PluginError(f"needs API {major}.{minor}, but {ours}; install a newer megalm")


def check_hooks(plugin: object) -> list[str]:
    """Names of the hooks that a module or object implements. PluginError for unmarked or unknown ones, all at once."""
    found, problems = [], []
    for name, marked in _candidates(plugin):
        if name not in HOOKS and marked is not None and marked.get("optionalhook"):
            continue
        if name not in HOOKS:
            hint = did_you_mean(name, HOOKS) or "; see megalm plugins --hooks"
            problems.append(f"{name} is not a hook{hint}")
        elif marked is None:
            problems.append(f"{name} is named like a hook but lacks @hookimpl; add it, or rename the function")
        else:
            found.append(name)
    if problems:
        raise PluginError("; ".join(problems))
    return found


def _candidates(plugin: object) -> Iterator[tuple[str, dict[str, object] | None]]:
    """(name, options of the marker) of each routine that is marked or named like a hook; its name is the hook's."""
    for name in dir(plugin):
        value = getattr(plugin, name, None)
        if not inspect.isroutine(value):
            continue
        marked = getattr(value, f"{PROJECT}_impl", None)
        if marked is not None or name.startswith(f"{PROJECT}_"):
            yield str((marked or {}).get("specname") or name), marked
