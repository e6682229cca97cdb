"""Which plugins made a checkpoint, and whether they are here.

A plugin's code decides what a run computes. A checkpoint names the plugins that its run used, with distribution,
version and a hash of their source; a run that goes on from it with others is refused with what to install, unless the
user says that the change is of no consequence (``checkpoint.allow_changed_plugins``). Naming a plugin never loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalm.checkpoint.folders import complete_checkpoints
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.config.source import read_source
from megalm.errors import CheckpointError, UsageError
from megalm.plugin.manager import PluginManager
from megalm.train.prepare import Prepared
from megalm.train.run_folder import CHECKPOINTS

Fingerprint = Mapping[str, Any]


def used_plugins(prepared: Prepared) -> list[str]:
    """Names of the plugins whose components decide what the run computes. Callbacks only watch."""
    resolved, manager = prepared.resolved, prepared.manager
    components = [found for (section, _), found in resolved.components.items() if section != "callback"]
    components.append(manager.get("architectures", resolved.config.model.architecture))
    components.append(manager.get("tokenizers", prepared.tokenizer_component))
    return sorted({component.plugin.name for component in components if component.plugin is not None})


def plugin_problems(manifest: Manifest, prepared: Prepared) -> list[str]:
    """What differs from the plugins that made a checkpoint, each as a line that says what to install."""
    before, now = manifest.state.get("plugins", {}), prepared.manager.fingerprint()
    mine = used_plugins(prepared)
    # Format 1 did not say which plugins were in use; those that both have are compared.
    names = manifest.state.get("uses", [name for name in before if name in mine])
    return [
        line for name in sorted({*names, *mine} & set(before)) if (line := _problem(name, before[name], now.get(name)))
    ]


def _problem(name: str, before: Fingerprint, now: Fingerprint | None) -> str | None:
    there = f"plugin {name} of {before['dist']} {before['version']}"
    install = f'pip install "{before["dist"]}=={before["version"]}"'
    if now is None:
        return f"{there}: is not installed or not loaded here; {install}"
    if (before["dist"], before["version"]) != (now["dist"], now["version"]):
        return f"{there}: here it is of {now['dist']} {now['version']}; {install}"
    if before["sha256"] != now["sha256"]:
        return (
            f"{there}: its source has changed since (SHA-256 {before['sha256'][:12]}, here {now['sha256'][:12]}); "
            f"restore it, or {install}"
        )
    return None


def check_plugins(folder: Path, manifest: Manifest, prepared: Prepared) -> list[str]:
    """CheckpointError where the plugins that made a checkpoint are not those that are here; where the configuration
    allows that, the differences."""
    problems = plugin_problems(manifest, prepared)
    if problems and not prepared.resolved.config.checkpoint.allow_changed_plugins:
        raise CheckpointError(
            f"{folder}: was made with other plugins:\n"
            + "\n".join(f"  {line}" for line in problems)
            + "\nTo go on with those that are here: --set checkpoint.allow_changed_plugins=true"
        )
    return problems


def absent_plugins(config: Path, overrides: Sequence[str], manager: PluginManager) -> list[str]:
    """For a run that cannot be prepared: what its own newest checkpoint was made with and is not loaded here."""
    try:
        run = read_source(config, overrides).data.get("run")
        folder = run.get("dir") if isinstance(run, dict) else None
        newest = complete_checkpoints(Path(folder) / CHECKPOINTS) if isinstance(folder, str) else []
        manifest = read_manifest(newest[0]) if newest else None
    except (UsageError, OSError, ValueError):
        return []
    if manifest is None:
        return []
    before = manifest.state.get("plugins", {})
    names = [name for name in manifest.state.get("uses", []) if name in before and name not in manager.plugins]
    return [f"{newest[0]} was made with {_problem(name, before[name], None)}" for name in names]
