"""Everything about a run that can be wrong before it starts, checked without process groups or model memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megalm.config.load import Resolved
from megalm.config.schema import Config, DataConfig
from megalm.data.blend import Blend
from megalm.data.mapped import make_room
from megalm.data.store import TOKENIZER_FOLDER, TokenStore
from megalm.data.stream import Stream
from megalm.data.tokenizer import load_tokenizer
from megalm.errors import ConfigError, DataError, LayoutError, PluginError, ScheduleError
from megalm.model.kernels import kernel_requests
from megalm.model.spec import ModelSpec, layout_problems, resolve_model
from megalm.ops.choose import Decision, choose_kernels
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.plugin.contract.callback import Callback
from megalm.plugin.contract.objective import Corpus, ObjectiveEnv
from megalm.plugin.contract.optim import LRSchedule, OptimizerPlugin
from megalm.plugin.contract.pipeline_csv import order_to_csv
from megalm.plugin.contract.source import AddressedSource, DataSource, StreamSource
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.train.best import selection_problems
from megalm.train.build import build_objective
from megalm.train.feed import evaluated_places
from megalm.train.finetune import tuning_problems
from megalm.train.head import as_corpus
from megalm.train.mixed import MixedObjective
from megalm.train.objective import TrainingObjective
from megalm.train.task import Task, check_no_task, open_task
from megalm.train.teacher import Teacher, open_teacher

CHECKED_BYTES = 1 << 30
"""Parts of a token store up to this size (about a second's reading) are checked whole before every launch."""

_ENDS = 4096
"""Ids at either end that are compared of a corpus that has no hashes."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start: plugins chosen and built, data open, sizes known."""

    resolved: Resolved
    manager: PluginManager
    tokenizer_component: str
    """What the store calls the component that its tokenizer is of."""
    tokenizer: Tokenizer
    objective: TrainingObjective
    spec: ModelSpec
    pipeline: Pipeline
    kernels: tuple[Decision, ...]
    """What each operation of the model is computed by; none where nothing is going to be computed."""
    train: Corpus | Blend | Stream
    validation: Corpus | Blend
    optimizer: type[OptimizerPlugin]
    optimizer_settings: Any
    schedule: LRSchedule
    callbacks: dict[str, Callback]
    source: DataSource | None = None
    """What is trained on, where that is no token store."""
    teacher: Teacher | None = None
    """What is learnt from besides."""
    task: Task | None = None
    """The head that is trained, and its records."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.resolved.config.run.dir)

    @property
    def data_identity(self) -> str:
        """Hex SHA-256 over the hashes of the token files, and over what else decides which samples come when."""
        if self.task is not None:
            return self.task.identity
        data = self.resolved.config.data
        content = {
            "stores": [
                {name: part.model_dump() for name, part in store.manifest.parts.items()}
                for store in stores_of(self.train)
            ],
            "weights": [entry.weight for entry in data.blend],
            "source": None if self.source is None else [data.source, self.source.identity, data.block, data.sentences],
            "ids": None if self.source is None or isinstance(self.train, Blend | Stream) else _print_of(self.train),
            "packing_window": data.packing_window if data.packing else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

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
            "teacher": None if self.teacher is None else self.teacher.identity,
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
    headless = config.train.head is None
    opened = _open_corpus(resolved, manager) if headless else _open_records(resolved, manager, device or "cpu")
    tokenizer, objective, train, validation = opened.tokenizer, opened.objective, opened.train, opened.validation
    source = opened.source
    for part, corpus in (("training", train), ("validation", validation)):
        for each in _corpora(corpus):
            objective.check_corpus(each)
            for member in objective.members:
                samples = member.num_samples(each)
                if config.train.cell is not None and samples < config.train.cell:
                    raise DataError(
                        f"{_name(each, config.data)}: the {part} part gives {member.name} {samples} samples, "
                        f"fewer than train.cell = {config.train.cell}"
                    )
    if isinstance(objective, MixedObjective) and isinstance(train, Stream):
        raise ConfigError(
            [f"data.source = {config.data.source} is a stream, whose samples one objective takes; mix on a store"]
        )
    if config.eval.baselines and source is not None:
        raise ConfigError(["eval.baselines fits a token store, and the run trains on data.source"])
    if config.eval.baselines and isinstance(train, Blend):
        raise ConfigError(
            ["eval.baselines fits one corpus, and data.blend names several; use megalm data baselines for each"]
        )
    if config.eval.baselines and (objective.needs.attention != "causal" or len(objective.members) > 1):
        raise ConfigError(
            [f"eval.baselines compares next-token models with the loss, which {objective.name} does not measure"]
        )
    spec = resolve_model(config, objective.needs, tokenizer.vocab_size)
    goals = {} if opened.task is None else opened.task.head.goals()
    problems = [*tuning_problems(spec), *selection_problems(config, objective.weights, goals)]
    if problems := [*problems, *layout_problems(config, spec, world_size)]:
        raise ConfigError(problems)
    if not isinstance(train, Stream):
        _check_lasts(config.data, objective, train, config.train.steps, config.train.global_batch)
    if isinstance(objective, MixedObjective):
        _check_evaluated(config, objective, validation)
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
    teacher = None
    if objective.needs.teacher is not None:
        teacher = open_teacher(objective, manager, config, spec, tokenizer, pipeline)
    decisions: tuple[Decision, ...] = ()
    if device is not None:
        requests = kernel_requests(spec, device, config.train.precision)
        kernels, decisions = choose_kernels(requests, config.kernels.model_dump(), manager)
        spec = replace(spec, kernels=kernels)
        if teacher is not None:
            requests = kernel_requests(teacher.spec, device, config.train.precision)
            teacher = teacher.computed_by(choose_kernels(requests, config.kernels.model_dump(), manager)[0])
    chosen = {key: manager.load_component(component) for key, component in resolved.components.items()}
    optimizer = ("optimizer", config.train.optimizer)
    schedule = ("lr_schedule", config.train.lr_schedule)
    return Prepared(
        resolved=resolved,
        manager=manager,
        tokenizer_component=opened.component,
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
        source=source,
        task=opened.task,
        teacher=teacher,
    )


@dataclass(frozen=True)
class _Opened:
    """What is trained, and on what."""

    component: str
    tokenizer: Tokenizer
    objective: TrainingObjective
    train: Corpus | Blend | Stream
    validation: Corpus | Blend
    source: DataSource | None = None
    task: Task | None = None


def _open_corpus(resolved: Resolved, manager: PluginManager) -> _Opened:
    """The stores or the source, and the objective over them."""
    config = resolved.config
    check_no_task(config)
    make_room(len(config.data.blend))
    validation = _open(config.data, "validation")
    first = Path(config.data.paths[0]) / TOKENIZER_FOLDER
    component, tokenizer = load_tokenizer(first, manager.tokenizer_class)
    source = _source(resolved, manager)
    train = _open(config.data, "train") if source is None else _opened(source, config.data, tokenizer)
    for store in (*stores_of(train), *stores_of(validation)):
        store.check_tokenizer(tokenizer)
    packing = config.data.packing_window if config.data.packing else 0
    env = ObjectiveEnv(tokenizer=tokenizer, sequence_length=config.train.sequence_length, packing=packing)
    return _Opened(component, tokenizer, build_objective(resolved, manager, env), train, validation, source)


def _open_records(resolved: Resolved, manager: PluginManager, device: str) -> _Opened:
    """The head, and its records."""
    task = open_task(resolved, manager, device)
    objective = task.objective
    for records in (task.train, task.validation):
        objective.check_corpus(as_corpus(records))
    task.rehearse()  # a run evaluates after its last step, whatever eval.every says
    corpora = task.train_corpus, task.validation_corpus
    return _Opened(task.component, task.tokenizer, objective, *corpora, task=task)


def verify_data(prepared: Prepared) -> None:
    """DataError where a small corpus was altered. Readers check every page when they touch it, but here a damage shows
    before the launch."""
    for store in (*stores_of(prepared.train), *stores_of(prepared.validation)):
        if store.data_bytes <= CHECKED_BYTES:
            store.check()


def stores_of(corpus: Corpus | Blend | Stream) -> tuple[TokenStore, ...]:
    """The token stores, one or several, or none."""
    return tuple(each for each in _corpora(corpus) if isinstance(each, TokenStore))


def _corpora(corpus: Corpus | Blend | Stream) -> tuple[Corpus, ...]:
    """What samples are counted in beforehand: nothing of a stream."""
    if isinstance(corpus, Stream):
        return ()
    return corpus.corpora if isinstance(corpus, Blend) else (corpus,)


def _print_of(corpus: Corpus) -> list[Any]:
    """What tells an addressed corpus from another without reading all of it: sizes, and its first and last ids."""
    size = corpus.num_tokens
    ends = (corpus.stream(0, min(size, _ENDS)), corpus.stream(max(0, size - _ENDS), size))
    return [size, corpus.num_documents, *(hashlib.sha256(ids.tobytes()).hexdigest() for ids in ends)]


def _name(corpus: Corpus, data: DataConfig) -> str:
    if data.records is not None:
        return f"data.records: {', '.join(data.records.train)}"
    return f"data.path: {corpus.folder}" if isinstance(corpus, TokenStore) else f"data.source {data.source}"


def _source(resolved: Resolved, manager: PluginManager) -> DataSource | None:
    name = resolved.config.data.source
    if name is None:
        return None
    component = resolved.components["data_source", name]
    source: DataSource = manager.load_component(component)(resolved.sections["data_source", name])
    return source


def _opened(source: DataSource, data: DataConfig, tokenizer: Tokenizer) -> Corpus | Stream:
    if isinstance(source, StreamSource):
        return Stream(source, data.block, data.sentences, data.epochs)
    if isinstance(source, AddressedSource):
        return source.corpus(tokenizer.vocab_size)
    raise PluginError(
        f"data source {data.source}: {type(source).__name__} is neither a StreamSource nor an AddressedSource"
    )


def _open(data: DataConfig, part: str) -> TokenStore | Blend:
    if data.path is not None:
        return TokenStore.open(data.path, part)
    weights = tuple(entry.weight for entry in data.blend if entry.weight is not None)
    stores = tuple(TokenStore.open(entry.path, part) for entry in data.blend)
    return Blend(stores, weights or None, tuple(entry.epochs for entry in data.blend))


def _check_lasts(
    data: DataConfig, objective: TrainingObjective, train: Corpus | Blend, steps: int, global_batch: int
) -> None:
    """DataError where the run would see a corpus more often than was said: in the rows of each objective."""
    places = steps * global_batch
    taken = objective.taken(places) if isinstance(objective, MixedObjective) else [places]
    for member, needed in zip(objective.members, taken, strict=True):
        if isinstance(train, Blend):
            sizes = [member.num_samples(store) for store in train.corpora]
            train.check_lasts(sizes, needed, max(1, needed // steps))
            continue
        size = member.num_samples(train)
        if data.epochs and needed > data.epochs * size:
            raise DataError(
                f"{_name(train, data)} runs out after step {data.epochs * size * steps // needed}: it has {size} "
                f"samples for {member.name} and data.epochs = {data.epochs}, but the run takes {needed}. Set "
                f"data.epochs = {-(-needed // size)} (0: as often as it takes), or lower train.steps"
            )


def _check_evaluated(config: Config, objective: MixedObjective, validation: Corpus | Blend) -> None:
    """ConfigError where an evaluation has no rows of one of the objectives."""
    assert config.train.cell is not None
    for key, samples in (("samples", config.eval.samples), ("final_samples", config.eval.final_samples)):
        if samples is None:
            continue
        found = evaluated_places(objective, validation, samples=samples, cell=config.train.cell)
        if not all(found):
            told = ", ".join(f"{n} of {each.name}" for n, each in zip(found, objective.members, strict=True))
            raise ConfigError(
                [
                    f"eval.{key} = {samples}: in whole cells of {config.train.cell}, each of one objective, an "
                    f"evaluation would have rows so: {told}; raise it, lower train.cell, or prepare a larger "
                    "validation part"
                ]
            )
