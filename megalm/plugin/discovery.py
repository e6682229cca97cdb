"""Finding plugins without running them.

Discovery reads the metadata of installed distributions and imports nothing. The order is (distribution, name), since
the file system's own order differs between machines, and ranks must agree. Nothing in the working directory is loaded
unless it is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import metadata

from megalm.errors import PluginError
from megalm.plugin.component import PluginInfo
from megalm.plugin.hookspecs import PROJECT
from megalm.plugin.suggest import did_you_mean, listing


def discover() -> list[PluginInfo]:
    """Every entry point of group ``megalm`` of every distribution on ``sys.path``, sorted by (distribution, name).

    Where a distribution is on the path twice, the first one counts, as it does for imports.
    """
    found = []
    for entry in metadata.entry_points(group=PROJECT):
        dist = entry.dist
        name, version = (dist.name, dist.version) if dist is not None else ("unknown", "unknown")
        found.append(PluginInfo(entry.name, name, version, entry.value))
    return sorted(found, key=lambda info: (info.dist.lower(), info.name, info.target))


def select(found: Iterable[PluginInfo], only: Sequence[str] | None) -> list[PluginInfo]:
    """The plugins to load: all of them, or exactly those named in ``only``.

    PluginError for a name that is not installed, or that several distributions (or one of them twice) claim.
    """
    found = list(found)
    installed = {info.name for info in found}
    problems = []
    for name in dict.fromkeys(only or ()):
        if name not in installed:
            hint = did_you_mean(name, installed) or f"; installed: {listing(installed)}"
            problems.append(f'plugin "{name}" is not installed{hint}')
    chosen = [info for info in found if only is None or info.name in only]
    claims: dict[str, list[PluginInfo]] = {}
    for info in chosen:
        claims.setdefault(info.name, []).append(info)
    for name, claimants in sorted(claims.items()):
        if len(claimants) > 1:
            who = " and ".join(f"{c.dist} {c.version} ({c.target})" for c in claimants)
            problems.append(
                f'plugin name "{name}" is claimed by {who}; uninstall one of them, or leave the name out with --plugins'
            )
    if problems:
        raise PluginError("\n".join(problems))
    return chosen
