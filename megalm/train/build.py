"""From ``train.objective`` to what is trained: one objective, several on shared rows, or one for each cell."""

from __future__ import annotations

from megalm.config.load import Resolved
from megalm.errors import ConfigError
from megalm.plugin.contract.objective import Objective, ObjectiveEnv
from megalm.plugin.manager import PluginManager
from megalm.train.mixed import MixedObjective
from megalm.train.objective import TrainingObjective


def build_objective(resolved: Resolved, manager: PluginManager, env: ObjectiveEnv) -> TrainingObjective:
    """Build what ``train.objective`` names. ConfigError for what cannot be trained together."""
    built: dict[str, Objective] = {}
    names: dict[str, str] = {}
    for (section, key), component in resolved.components.items():
        if section == "objective":
            names[key] = component.name
            built[component.name] = manager.load_component(component)(resolved.sections[section, key], env)
    if env.packing and (cannot := [name for name, part in built.items() if not part.packs]):
        raise ConfigError([f"data.packing: {' and '.join(cannot)} cannot pack documents into rows; leave it out"])
    train, size = resolved.config.train, env.tokenizer.vocab_size
    if not isinstance(train.objective, list):
        return TrainingObjective(built, size)
    members = []
    for entry in train.objective:
        own = [names[part.strip()] for part in entry.name.split("+")]
        members.append(TrainingObjective({name: built[name] for name in own}, size))
    return MixedObjective(members, [entry.share for entry in train.objective], train.cell)
