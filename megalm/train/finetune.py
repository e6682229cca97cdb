"""What a fine-tuning run begins with: weights of a checkpoint, whatever they were trained for.

The backbone is taken as it is, so everything that decides what it computes must agree. Heads may differ: what the run
needs and the checkpoint lacks has its initial values, and what the checkpoint has besides is left behind. Both are
said. Step, optimizer and data begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalm.checkpoint.load import load_state
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.state import TrainingState
from megalm.config.schema import ModelConfig
from megalm.errors import CheckpointError
from megalm.model.language_model import logical_shapes, parameter_names
from megalm.model.spec import ModelSpec
from megalm.model.tuning import Tuning
from megalm.optim.weights import Weights

Say = Callable[[str], None]
_SHOWN = 4
_DECIDES = (
    *("heads", "norm", "norm_eps", "norm_placement", "embedding_norm", "final_norm", "position", "position_offset"),
    *("rope_theta", "rope_scaling", "rope_factor", "rope_low_frequency_factor", "rope_high_frequency_factor"),
    *("rope_original_positions", "qk_norm", "activation", "gated"),
)
"""Keys of [model] that change what the same weights compute; sizes show in the tensors."""


@dataclass(frozen=True)
class Differences:
    """Logical tensors that a checkpoint and a run do not share."""

    fresh: list[str]
    """Only the run has them."""
    left: list[str]
    """Only the checkpoint has them."""


def tuning_problems(spec: ModelSpec) -> list[str]:
    """What of ``[finetune]`` this model does not admit; empty where all is well."""
    if spec.tuning.method == "none" and not spec.tuning.keep_zeros:
        return []
    return spec.tuning.problems(parameter_names(spec), spec.cfg.layers, spec.projections())


def check_beginning(spec: ModelSpec, take: Mapping[str, str], folder: Path, manifest: Manifest, warn: Say) -> None:
    """CheckpointError, with every reason, where the checkpoint's backbone is not this run's; else say what differs.

    ``take``: as in ``[finetune]``.
    """
    shapes = logical_shapes(spec)
    differ = differences(manifest, shapes, take)
    problems = [*_settings(spec.cfg, manifest), *_taken(manifest, shapes, take)]
    problems += _tensors(manifest, shapes, take, differ)
    if still := [name for name in differ.fresh if not name.startswith("backbone.") and not spec.tuning.trains(name)]:
        problems.append(
            f"lacks {_listed(still)}, which would stay at initial values; name what is to train in finetune.also_train"
        )
    if problems:
        raise CheckpointError(
            f"{folder}: cannot be fine-tuned as this run says:\n" + "\n".join(f"  {line}" for line in problems)
        )
    if heads := [name for name in differ.fresh if not Tuning.adds(name)]:
        warn(f"not in {folder.name}, so with initial values: {_listed(heads)}")
    if differ.left:
        warn(f"in {folder.name} but not of this run's model, so left behind: {_listed(differ.left)}")


def differences(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], take: Mapping[str, str]) -> Differences:
    """What a checkpoint and a model of these logical tensors do not share."""
    used = {source_name(name, take) for name in shapes}
    return Differences(
        fresh=[name for name in shapes if source_name(name, take) not in manifest.weights],
        left=[name for name in manifest.weights if name not in used and name not in shapes],
    )


def source_name(name: str, take: Mapping[str, str]) -> str:
    """What a checkpoint calls the tensor that a run's tensor begins as."""
    for part, source in take.items():
        if name == part or name.startswith(f"{part}."):
            return source + name[len(part) :]
    return name


def load_weights(folder: Path, manifest: Manifest, weights: Weights, take: Mapping[str, str]) -> None:
    """Fill what the checkpoint has of this rank's weights; the rest keeps its initial values."""
    named = (replace(piece, name=source_name(piece.name, take)) for piece in weights.pieces())
    shared = [piece for piece in named if piece.name in manifest.weights]
    everything = frozenset(manifest.weights) | {name.partition("@")[0] for name in manifest.optimizer}
    load_state(folder, manifest, TrainingState(shared, [], {}, everything))
    weights.publish(frozen=True)


def _settings(now: ModelConfig, manifest: Manifest) -> list[str]:
    before: dict[str, Any] = manifest.state.get("config", {}).get("model", {})
    mine = now.model_dump(mode="json")
    return [
        f"model.{key} = {mine[key]}, but the checkpoint was made with {before[key]}"
        for key in _DECIDES
        if key in before and before[key] != mine[key]
    ]


def _taken(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], take: Mapping[str, str]) -> list[str]:
    lines = []
    for part, source in take.items():
        mine = [name for name in shapes if source_name(name, {part: source}) != name]
        if not mine:
            lines.append(f"finetune.take: this model has no {part}")
        elif lacks := [name for name in mine if source_name(name, take) not in manifest.weights]:
            lines.append(f"finetune.take: has nothing for {_listed(lacks)} in {source}")
    return lines


def _tensors(
    manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], take: Mapping[str, str], differ: Differences
) -> list[str]:
    sources = {name: manifest.weights.get(source_name(name, take)) for name in shapes}
    lines = [
        f"{name}: shape {record.shape}, but this model's is {list(shapes[name])}"
        for name, record in sources.items()
        if record is not None and tuple(record.shape) != shapes[name]
    ]
    tuned = [name for name in differ.left if Tuning.adds(name)]
    if tuned:
        lines.append(f"has {_listed(tuned)} of an earlier fine-tuning; begin with what megalm merge makes of it")
    missing = [name for name in differ.fresh if name.startswith("backbone.") and not Tuning.adds(name)]
    if missing:
        lines.append(f"lacks {_listed(missing)}, which this model's backbone needs")
    beyond = [name for name in differ.left if name.startswith("backbone.") and name not in tuned]
    if beyond:
        lines.append(f"has {_listed(beyond)}, which this model's backbone lacks")
    return lines


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
