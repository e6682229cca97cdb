"""What a fine-tuning run begins with: weights of a checkpoint, whatever they were trained for.

The backbone is taken as it is, so everything that decides what it computes must agree. Heads may differ: what the run
needs and the checkpoint lacks has its initial values, and what the checkpoint has besides is left behind. Both are
said. Step, optimizer and data begin anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    if spec.tuning.method == "none":
        return []
    return spec.tuning.problems(parameter_names(spec), spec.cfg.layers, spec.projections())


def check_beginning(spec: ModelSpec, folder: Path, manifest: Manifest, warn: Say) -> None:
    """CheckpointError, with every reason, where the checkpoint's backbone is not this run's; else say what differs."""
    shapes = logical_shapes(spec)
    differ = differences(manifest, shapes)
    problems = [*_settings(spec.cfg, manifest), *_tensors(manifest, shapes, differ)]
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


def differences(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> Differences:
    """What a checkpoint and a model of these logical tensors do not share."""
    return Differences(
        fresh=[name for name in shapes if name not in manifest.weights],
        left=[name for name in manifest.weights if name not in shapes],
    )


def load_weights(folder: Path, manifest: Manifest, weights: Weights) -> None:
    """Fill what the checkpoint has of this rank's weights; the rest keeps its initial values."""
    shared = [piece for piece in weights.pieces() if piece.name in manifest.weights]
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


def _tensors(manifest: Manifest, shapes: dict[str, tuple[int, ...]], differ: Differences) -> list[str]:
    lines = [
        f"{name}: shape {list(manifest.weights[name].shape)}, but this model's is {list(shape)}"
        for name, shape in shapes.items()
        if name in manifest.weights and tuple(manifest.weights[name].shape) != shape
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
