"""A model that a run learns from: a checkpoint's, frozen, in the run's own layout.

Its layers are cut over the run's pipeline, so that its last hidden vectors come to the rank that needs them. It goes
forward for all microbatches before the step's order begins, which leaves schedules as they are; what is held meanwhile
are its hidden vectors of the step, on the ranks with the last stage.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from megalm.checkpoint.manifest import MANIFEST
from megalm.config.schema import Config
from megalm.errors import ConfigError
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec, tensor_parallel_problems
from megalm.model.stages import split_problems
from megalm.ops.kernels import Kernels
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.train.objective import TrainingObjective
from megalm.train.stored import Stored, find_checkpoint, open_stored


@dataclass(frozen=True)
class Teacher:
    """A checkpoint that fits the run."""

    stored: Stored

    @property
    def spec(self) -> ModelSpec:
        """Its model."""
        return self.stored.spec

    def computed_by(self, kernels: Kernels) -> Teacher:
        """The same, with other implementations of its operations."""
        return replace(self, stored=replace(self.stored, spec=replace(self.spec, kernels=kernels)))

    @property
    def identity(self) -> str:
        """Hex SHA-256 over its manifest, which has the hashes of all files."""
        return hashlib.sha256((self.stored.folder / MANIFEST).read_bytes()).hexdigest()

    def attach(self, model: LanguageModel, precision: str, pipeline: Pipeline | None) -> None:
        """Give a run's model its teacher, of which this rank has the stages that it has of the model."""
        parallel = model.parallel
        stages = None if pipeline is None else pipeline.stages_for(self.spec, parallel.pp.index)
        teacher = self.stored.model(parallel, precision, stages)
        teacher.requires_grad_(False)
        model.learn_from(teacher)


def open_teacher(
    objective: TrainingObjective,
    manager: PluginManager,
    config: Config,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    pipeline: Pipeline,
) -> Teacher:
    """The teacher that an objective needs, of a run whose model is ``spec``. ConfigError lists why it does not fit;
    CheckpointError where there is none, or it is damaged."""
    needs = objective.needs.teacher
    assert needs is not None
    folder, _ = find_checkpoint(Path(needs.path))
    stored = open_stored(folder, manager)
    its, problems = stored.spec, []
    theirs = str(stored.manifest.state.get("tokenizer"))
    if theirs != tokenizer.identity:
        problems.append(f"has the tokenizer {theirs[:16]}, but this run's data has {tokenizer.identity[:16]}")
    if its.vocab_size != spec.vocab_size:
        problems.append(f"has model.vocab_size = {its.vocab_size}, but this run has {spec.vocab_size}")
    if objective.needs.lm_head and not its.lm_head:
        problems.append("has no language-modelling head")
    if (theirs := stored.objective.attention) != objective.attention:
        problems.append(f"has {theirs} attention, but this run has {objective.attention}")
    if needs.hidden_size not in (None, its.cfg.hidden_size):
        problems.append(
            f"has model.hidden_size = {its.cfg.hidden_size}, but {objective.name} was told of {needs.hidden_size}"
        )
    if its.token_types < spec.token_types:
        problems.append(f"has {its.token_types} token types, but this run has {spec.token_types}")
    length = config.train.sequence_length
    if its.cfg.position == "learned" and its.max_positions - its.cfg.position_offset < length:
        problems.append(f"has {its.max_positions} positions, but train.sequence_length = {length}")
    problems += tensor_parallel_problems(its, config.parallel.tp)
    problems += split_problems(its, pipeline.order.stages, None)
    if problems:
        raise ConfigError([f"the teacher {folder}: {problem}" for problem in problems])
    return Teacher(stored)
