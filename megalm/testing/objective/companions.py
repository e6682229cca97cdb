"""What an objective cannot be examined without: another that builds its rows, and models that it learns from.

Both are declared by its class, so that ``megalm check-plugin NAME`` needs no more than the name.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run
from megalm.train.trainer import Trainer

TEACHER_SIZE = 48
"""Width of a model that is made to learn from; not that of the models that are examined."""
ORDINARY = {"causal": "causal_lm", "prefix": "denoise", "bidirectional": "mlm"}
"""Objectives with a language-modelling head, by the attention that they need."""


def parts_of(objective: str) -> list[str]:
    """The names in a joint objective."""
    return [part.strip() for part in objective.split("+")]


def with_builder(objective: str, manager: PluginManager) -> str:
    """The objective, joined with one whose rows it can score where it builds none."""
    joins = [manager.load_class("objectives", part).joins for part in parts_of(objective)]
    return f"{objective}+{joins[0][0]}" if all(joins) else objective


def missing_checkpoints(objective: str, settings: Sequence[str], manager: PluginManager) -> list[str]:
    """Keys of settings that name a checkpoint and are not among ``key=value`` ``settings``."""
    keys = [
        f"{_section(part)}.{setting}"
        for part in parts_of(objective)
        for setting in manager.load_class("objectives", part).checkpoints
    ]
    given = {setting.partition("=")[0].strip() for setting in settings}
    return [key for key in keys if key not in given]


def without_teachers(
    objective: str, settings: Sequence[str], manager: PluginManager
) -> tuple[str | None, list[str]]:
    """The objective without the parts that learn from others, none where none is left, and the settings without
    those of these parts."""
    rest = [part for part in parts_of(objective) if not manager.load_class("objectives", part).checkpoints]
    others = {_section(part) for part in parts_of(objective)} - {_section(part) for part in rest}
    own = [each for each in settings if each.partition("=")[0].strip().rpartition(".")[0] not in others]
    return "+".join(rest) or None, own


def make_teacher(
    folder: Path,
    store: Path,
    objective: str,
    architecture: str,
    settings: Sequence[str],
    manager: PluginManager,
    *,
    length: int,
    device: str,
    layers: int,
) -> Path:
    """The folder of a run of one step, whose model takes rows of twice the length."""
    sizes = [f"model.hidden_size={TEACHER_SIZE}", f"model.layers={layers}", "train.steps=1"]
    sizes.append(f"model.max_positions={2 * length}")
    run = make_run(
        folder, store, objective=objective, architecture=architecture, overrides=[*settings, *sizes], manager=manager
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Trainer(run, single_rank(device)).run()
    return run.run_dir


def _section(part: str) -> str:
    return f"objective.{part.rpartition(':')[2]}"
