"""A checkpoint as a model to use: which model it is, its tokenizer, its weights under any layout.

A run needs its whole configuration, data and optimizer; whoever generates or exports needs the model alone, so of the
stored configuration only what decides the model is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.folders import newest_whole, open_whole, resolve
from megalm.checkpoint.load import load_state
from megalm.checkpoint.manifest import MANIFEST, Manifest
from megalm.checkpoint.state import TrainingState
from megalm.config import toml
from megalm.config.load import Resolved, load_config
from megalm.data.store import TOKENIZER_FOLDER
from megalm.data.tokenizer import DESCRIPTOR, load_tokenizer, save_tokenizer
from megalm.errors import CheckpointError, TokenizerError
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec, resolve_model
from megalm.nn.module import materialise
from megalm.optim.weights import DTYPES, Weights
from megalm.parallel.mesh import ParallelContext
from megalm.plugin.contract.head import HeadEnv
from megalm.plugin.contract.objective import ObjectiveEnv
from megalm.plugin.contract.tokenizer import SpecialTokens, Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.train.build import build_objective
from megalm.train.head import head_objective
from megalm.train.objective import TrainingObjective
from megalm.train.run_folder import CHECKPOINTS

NO_TOKENIZER = "none"
"""Identity of the tokenizer of a model that was imported without one."""
_MODEL_KEYS = ("objective", "head", "sequence_length", "precision")
"""Keys of [train] that say something of the model; the others have to be there, so they get any value."""
_ANY = {"steps": 1, "global_batch": 1, "micro_batch": 1, "lr": 1.0}


class UnknownTokenizer(Tokenizer):
    """Stands for a tokenizer that nobody has, so that an objective can be asked what it needs. It has a special token
    of each kind, and encodes nothing."""

    def __init__(self, vocab_size: int) -> None:
        self._size = vocab_size

    @classmethod
    def train(cls, texts: Any, cfg: Any) -> Tokenizer:
        raise TokenizerError("a tokenizer that is not known cannot be trained")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        raise TokenizerError("a tokenizer that is not known cannot be loaded")

    def save(self, folder: Path) -> None:
        raise TokenizerError("a tokenizer that is not known cannot be saved")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise TokenizerError("this model's tokenizer is not known; name it with --tokenizer")

    def decode(self, ids: Sequence[int]) -> str:
        raise TokenizerError("this model's tokenizer is not known; name it with --tokenizer")

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens(pad=0, eos=0, bos=0, cls=0, sep=0, mask=0, unk=0)

    @property
    def identity(self) -> str:
        return NO_TOKENIZER


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose files were verified."""

    folder: Path
    manifest: Manifest
    resolved: Resolved
    component: str | None
    """The tokenizer's; none where it is not known."""
    tokenizer: Tokenizer
    objective: TrainingObjective
    spec: ModelSpec

    def model(self, parallel: ParallelContext, precision: str, stages: Any = None) -> LanguageModel:
        """The model with its weights in this layout, in a type of :data:`DTYPES`. ``stages``: of this pipeline rank."""
        model = LanguageModel(self.spec, parallel, stages)
        (dtype,) = {record.dtype for record in self.manifest.weights.values()} or {"float32"}
        materialise(model, parallel, None, getattr(torch, dtype))
        weights = Weights(model, parallel, getattr(torch, dtype))
        # Whatever else the checkpoint has is not this rank's, or not for this purpose.
        others = frozenset(self.manifest.weights)
        load_state(self.folder, self.manifest, TrainingState(weights.pieces(), [], {}, others))
        return model.to(DTYPES[precision])


def find_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint folder that is meant: the folder itself, or the newest whole one of a run, with why newer ones
    were passed over. CheckpointError where there is none."""
    if path.is_file():  # "latest" or "best"
        path = resolve(path)
    if (path / MANIFEST).is_file():
        return path, []
    root = path / CHECKPOINTS
    folder, complaints = newest_whole(root if root.is_dir() else path)
    if folder is None:
        why = "; ".join(complaints) or "there is no checkpoint in it"
        raise CheckpointError(f"{path}: neither a checkpoint nor a run folder with a whole one: {why}")
    return folder, complaints


def open_stored(
    folder: Path, manager: PluginManager, tokenizer: tuple[str, Tokenizer] | None = None, *, required: bool = False
) -> Stored:
    """Verify a checkpoint and find out which model it is. ``tokenizer``: instead of the one that lies with it or with
    the run's data.

    CheckpointError where files are damaged, TokenizerError where the tokenizer is another one than the checkpoint's, or
    where it is ``required`` and not found.
    """
    manifest = open_whole(folder)
    config = manifest.state.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: does not say which configuration it was made with")
    resolved = model_configuration(config, manager)
    found = tokenizer or nearby_tokenizer(folder, resolved, manager)
    identity = manifest.state.get("tokenizer")
    if found is None and required:
        raise TokenizerError(
            f"{folder}: its tokenizer is neither in {folder / TOKENIZER_FOLDER} nor with its run or data "
            f"({', '.join(resolved.config.data.paths)}); name it with --tokenizer"
        )
    if found is not None and identity not in (found[1].identity, NO_TOKENIZER):
        raise TokenizerError(
            f"{folder}: was made with a tokenizer of identity {str(identity)[:16]}, but {found[0]} has "
            f"{found[1].identity[:16]}; name the right one with --tokenizer"
        )
    component, known = found or (None, UnknownTokenizer(resolved.config.model.vocab_size or 1))
    objective, spec = objective_and_spec(resolved, manager, known, manifest.state.get("head"))
    return Stored(folder, manifest, resolved, component, known, objective, spec)


def model_configuration(config: Mapping[str, Any], manager: PluginManager) -> Resolved:
    """The part of a run's resolved configuration that decides its model, validated anew."""
    train = config.get("train", {})
    tree = {
        "run": {"dir": "-"},
        "model": config.get("model", {}),
        "data": {"path": _data_path(config.get("data", {}))},
        "train": {**_ANY, **{key: train[key] for key in _MODEL_KEYS if train.get(key) is not None}},
        "head": config.get("head", {}),
        "objective": config.get("objective", {}),
        "finetune": {key: value for key, value in config.get("finetune", {}).items() if value is not None},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stored.toml"
        path.write_text(toml.dumps(tree), encoding="utf-8")
        return load_config(path, [], manager)


def _data_path(data: Mapping[str, Any]) -> str:
    """A store of the run's data, the first of several: all have one tokenizer."""
    stores = [data.get("path"), *(entry.get("path") for entry in data.get("blend", []))]
    return next((path for path in stores if path), "-")


def objective_and_spec(
    resolved: Resolved,
    manager: PluginManager,
    tokenizer: Tokenizer | None = None,
    head: Mapping[str, Any] | None = None,
) -> tuple[TrainingObjective, ModelSpec]:
    """What is trained, and the model that it needs. ``head``: what a checkpoint says of one that was trained."""
    tokenizer = tokenizer or UnknownTokenizer(resolved.config.model.vocab_size or 1)
    length = resolved.config.train.sequence_length
    if head is None:
        objective = build_objective(resolved, manager, ObjectiveEnv(tokenizer=tokenizer, sequence_length=length))
    else:
        env = HeadEnv(tokenizer, length, tuple(head["labels"]), head["attention"])
        key = ("head", str(resolved.config.train.head))
        cls = manager.load_component(resolved.components[key])
        objective = head_objective(head["name"], cls(resolved.sections[key], env))
    return objective, resolve_model(resolved.config, objective.needs, tokenizer.vocab_size)


def keep_tokenizer(stored: Stored, folder: Path) -> None:
    """Write its tokenizer, if it is known, beside a checkpoint that is made of it."""
    if stored.component is not None:
        (folder / TOKENIZER_FOLDER).mkdir()
        save_tokenizer(stored.tokenizer, stored.component, folder / TOKENIZER_FOLDER)


def nearby_tokenizer(folder: Path, resolved: Resolved, manager: PluginManager) -> tuple[str, Tokenizer] | None:
    """The tokenizer that lies with a checkpoint, its run, or its run's data."""
    for place in (folder, folder.parent.parent, *map(Path, resolved.config.data.paths)):
        if (place / TOKENIZER_FOLDER / DESCRIPTOR).is_file():
            return load_tokenizer(place / TOKENIZER_FOLDER, manager.tokenizer_class)
    return None
