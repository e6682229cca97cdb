"""Everything about a run that can be wrong before it starts, checked without process groups or model memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megalm.config.load import Resolved
from megalm.data.store import TOKENIZER_FOLDER, TokenStore
from megalm.data.tokenizer import load_tokenizer
from megalm.errors import ConfigError, DataError, LayoutError, PluginError, ScheduleError
from megalm.model.kernels import kernel_requests
from megalm.model.spec import ModelSpec, layout_problems, resolve_model
from megalm.ops.choose import Decision, choose_kernels
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.plugin.contract.callback import Callback
from megalm.plugin.contract.objective import ObjectiveEnv
from megalm.plugin.contract.optim import LRSchedule, OptimizerPlugin
from megalm.plugin.contract.pipeline_csv import order_to_csv
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.train.objective import TrainingObjective, build_objective

CHECKED_BYTES = 1 << 30
"""Parts of a token store up to this size (about a second's reading) are checked whole before every launch."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start: plugins chosen and built, data open, sizes known."""

    resolved: Resolved
    manager: PluginManager
    tokenizer: Tokenizer
    objective: TrainingObjective
    spec: ModelSpec
    pipeline: Pipeline
    kernels: tuple[Decision, ...]
    """What each operation of the model is computed by; none where nothing is going to be computed."""
    train: TokenStore
    validation: TokenStore
    optimizer: type[OptimizerPlugin]
    optimizer_settings: Any
    schedule: LRSchedule
    callbacks: dict[str, Callback]

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.resolved.config.run.dir)

    @property
    def data_identity(self) -> str:
        """Hex SHA-256 over the hashes of the token files."""
        parts = {name: part.model_dump() for name, part in sorted(self.train.manifest.parts.items())}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def order_identity(self) -> str:
        """Hex SHA-256 over the pipeline's order: a file that ranks read, or a plugin, may give each another."""
        return hashlib.sha256(order_to_csv(self.pipeline.order).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What every rank of a launch must agree on, as JSON."""
        return {
            "configuration": self.resolved.as_dict(),
            "plugins": self.manager.fingerprint(),
            "versions": {name: metadata.version(name) for name in ("megalm", "torch")},
            "tokenizer": self.tokenizer.identity,
            "data": self.data_identity,
            "pipeline": {"order": self.order_identity},
            "kernels": {
                **{decision.operation: decision.implementation for decision in self.kernels},
                "sources": next((decision.sources for decision in self.kernels if decision.sources), None),
            },
        }


def prepare_run(
    resolved: Resolved, manager: PluginManager, world_size: int, device: Literal["cpu", "cuda"] | None = None
) -> Prepared:
    """Build what the configuration names, to run on a device, or only to look at. Raises a UsageError with all that is
    wrong with one kind of thing.
    """
    config = resolved.config
    data = Path(config.data.path)
    train, validation = TokenStore.open(data, "train"), TokenStore.open(data, "validation")
    _, tokenizer = load_tokenizer(data / TOKENIZER_FOLDER, lambda name: manager.load_class("tokenizers", name))
    train.check_tokenizer(tokenizer)
    env = ObjectiveEnv(tokenizer=tokenizer, sequence_length=config.train.sequence_length)
    objective = build_objective(resolved, manager, env)
    for part, corpus in (("training", train), ("validation", validation)):
        objective.check_corpus(corpus)
        if config.train.cell is not None and objective.num_samples(corpus) < config.train.cell:
            raise DataError(
                f"{data}: the {part} part gives {objective.name} {objective.num_samples(corpus)} samples, fewer than "
                f"train.cell = {config.train.cell}"
            )
    if config.eval.baselines and objective.needs.attention != "causal":
        raise ConfigError(
            [f"eval.baselines compares next-token models with the loss, which {objective.name} does not measure"]
        )
    spec = resolve_model(config, objective.needs, tokenizer.vocab_size)
    if problems := layout_problems(config, spec, world_size):
        raise ConfigError(problems)
    layout, train_rows = config.parallel, config.train
    dp = world_size // (layout.tp * layout.pp)
    try:
        pipeline = make_pipeline(
            spec,
            manager,
            schedule=layout.pp_schedule,
            ranks=layout.pp,
            microbatches=train_rows.global_batch // (train_rows.micro_batch * dp),
            virtual=layout.pp_virtual,
            split=layout.pp_split,
            settings=next((s for (kind, _), s in resolved.sections.items() if kind == "pipeline_schedule"), None),
        )
    except (PluginError, ScheduleError) as error:
        raise ConfigError([f"parallel.pp_schedule: {error}"]) from None
    except LayoutError as error:
        raise ConfigError([str(error)]) from None
    decisions: tuple[Decision, ...] = ()
    if device is not None:
        requests = kernel_requests(spec, device, config.train.precision)
        kernels, decisions = choose_kernels(requests, config.kernels.model_dump(), manager)
        spec = replace(spec, kernels=kernels)
    chosen = {key: manager.load_component(component) for key, component in resolved.components.items()}
    optimizer = ("optimizer", config.train.optimizer)
    schedule = ("lr_schedule", config.train.lr_schedule)
    return Prepared(
        resolved=resolved,
        manager=manager,
        tokenizer=tokenizer,
        objective=objective,
        spec=spec,
        pipeline=pipeline,
        kernels=decisions,
        train=train,
        validation=validation,
        optimizer=chosen[optimizer],
        optimizer_settings=resolved.sections[optimizer],
        schedule=chosen[schedule](resolved.sections[schedule], config.train.lr, config.train.steps),
        callbacks={
            name: cls(resolved.sections[section, name])
            for (section, name), cls in chosen.items()
            if section == "callback"
        },
    )


def verify_data(prepared: Prepared) -> None:
    """DataError where a small corpus was altered. Readers check every page when they touch it, but here a damage shows
    before the launch."""
    for store in (prepared.train, prepared.validation):
        if store.data_bytes <= CHECKED_BYTES:
            store.check()
