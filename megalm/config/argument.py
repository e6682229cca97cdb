"""Names that carry an argument: ``csv:FILE`` is the component ``csv`` and a file's name.

A colon also parts a plugin from its component (``plugin:1f1b``), so it takes the registry to tell which is which.
"""

from __future__ import annotations

from megalm.plugin.manager import PluginManager


def split_argument(text: str, kind: str, manager: PluginManager) -> tuple[str, str | None]:
    """Name and argument. The first word is a component's name, unless it is a plugin's that has the second."""
    registry = manager.registry(kind)
    head, colon, rest = text.partition(":")
    if not colon:
        return text, None
    bare, colon, argument = rest.partition(":")
    owned = any(component.plugin is not None and component.plugin.name == head for component in registry.get(bare, ()))
    if head in registry and not owned:
        return head, rest
    return f"{head}:{bare}", argument if colon else None
