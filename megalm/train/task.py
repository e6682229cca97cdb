"""A head's run: labelled records in place of a corpus, and the head's own metrics beside the loss.

Training knows no heads: a head is an objective over records (:mod:`megalm.train.head`). What is left is here: which
records, labels and tokenizer a run has, and measuring predictions at an evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.folders import resolve
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.config.load import Resolved
from megalm.config.schema import Config, RecordsConfig
from megalm.data.labelled.read import read_records
from megalm.data.labelled.records import Records, label_names
from megalm.data.store import TOKENIZER_FOLDER
from megalm.data.tokenizer import DESCRIPTOR, save_tokenizer, tokenizer_from_spec
from megalm.errors import CheckpointError, ConfigError, DataError, TokenizerError
from megalm.model.language_model import LanguageModel
from megalm.parallel import rng
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.head import Head, HeadEnv
from megalm.plugin.contract.objective import Attention, Corpus
from megalm.plugin.contract.records import FieldSpec
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.train.grouped import GroupedSamples
from megalm.train.head import as_corpus, head_objective, in_parts, predict, row_unit
from megalm.train.objective import TrainingObjective
from megalm.train.stored import model_configuration, nearby_tokenizer, objective_and_spec

_ANY_LABELS = ("0", "1")
"""A head says its fields whatever its labels are."""
_REHEARSED = 8


@dataclass(frozen=True)
class Task:
    """A head with what it is trained and measured on."""

    name: str
    head: Head
    component: str
    """The tokenizer's."""
    tokenizer: Tokenizer
    train: Records
    validation: Records
    unit: int
    """Of the lengths of rows, as :func:`megalm.train.head.row_unit` gives it."""

    @property
    def objective(self) -> TrainingObjective:
        """What the engine trains."""
        return head_objective(self.name, self.head, unit=self.unit)

    def samples(self, objective: TrainingObjective, records: Corpus, config: Config) -> GroupedSamples:
        """What a feed of the run takes."""
        assert config.data.records is not None
        window, batch = config.data.records.length_window, config.train.global_batch
        return GroupedSamples(objective, records, seed=config.run.seed, global_batch=batch, window=window)

    @property
    def train_corpus(self) -> Corpus:
        """The records to train on, long ones in parts."""
        return as_corpus(in_parts(self.name, self.head, self.train)[0])

    @property
    def validation_corpus(self) -> Corpus:
        """The records to evaluate on, long ones in parts."""
        return as_corpus(in_parts(self.name, self.head, self.validation)[0])

    @property
    def identity(self) -> str:
        """Hex SHA-256 over the records to train on and the labels."""
        text = json.dumps([list(self.head.env.labels), self.train.rows], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to say so that the head can be built again without its records."""
        env = self.head.env
        return {"name": self.name, "labels": list(env.labels), "attention": env.attention}

    def save_tokenizer(self, run_dir: Path) -> None:
        """Put the tokenizer into the run's folder, unless it is there: a head's run has no store that has it."""
        folder = run_dir / TOKENIZER_FOLDER
        if not (folder / DESCRIPTOR).is_file():
            folder.mkdir(exist_ok=True)
            save_tokenizer(self.tokenizer, self.component, folder)

    def rehearse(self) -> None:
        """Measure right predictions for a few checked records, so that what measuring lacks (a library that is not
        installed, DataError) is said before the first step and not after the hours before the first evaluation.
        """
        records = self.validation.rows[:_REHEARSED]
        self.head.metrics([self.head.truth(record) for record in records], records)

    def measure(self, model: LanguageModel, samples: int, micro_batch: int, pipeline: Pipeline) -> dict[str, float]:
        """The head's metrics over the first ``samples`` records of the validation part, the same on every rank."""
        records = self.validation[: min(samples, len(self.validation))]
        found = predict(model, self.name, self.head, records, micro_batch=micro_batch, pipeline=pipeline)
        parallel = model.parallel
        metrics = self.head.metrics(found, records.rows) if parallel.rank == 0 else {}
        told: dict[str, float] = parallel.world.broadcast_json(metrics)
        return told


def open_task(resolved: Resolved, manager: PluginManager, device: str) -> Task:
    """The run's head, records and tokenizer, for a type of device. ConfigError, DataError, TokenizerError or
    CheckpointError where one of them will not do; records are checked later, with all that an objective checks.
    """
    config, name = resolved.config, resolved.config.train.head
    assert name is not None
    wanted = config.data.records
    problems = []
    if wanted is None:
        problems.append(f"train.head = {name} is trained on labelled records; name files in [data.records]")
    if config.checkpoint.load is None:
        problems.append(f"train.head = {name} stands on a model that exists; name its checkpoint as checkpoint.load")
    if config.finetune.method == "none":
        problems.append(f'train.head = {name} is fine-tuning; give finetune.method ("full", say)')
    if config.eval.baselines:
        problems.append("eval.baselines compares next-token models")
    if problems or wanted is None or config.checkpoint.load is None:
        raise ConfigError(problems)
    folder = resolve(Path(config.checkpoint.load))
    manifest = read_manifest(folder)
    component, tokenizer = _tokenizer(wanted, folder, manifest, manager)
    env = HeadEnv(tokenizer, config.train.sequence_length, _ANY_LABELS, attention_of(manifest, manager))
    cls = manager.load_component(resolved.components["head", name])
    settings = resolved.sections["head", name]
    fields = cls(settings, env).fields()
    train, validation = _records(wanted, fields)
    env = HeadEnv(tokenizer, env.sequence_length, label_names(train, fields), env.attention)
    unit = row_unit(config.parallel.tp, config.parallel.sp, device)
    title = resolved.components["head", name].name
    return Task(title, cls(settings, env), component, tokenizer, train, validation, unit)


def check_no_task(config: Config) -> None:
    """ConfigError where records are named and nothing that trains on them."""
    if config.data.records is not None:
        raise ConfigError(["data.records is for heads; name one as train.head"])


def attention_of(manifest: Manifest, manager: PluginManager) -> Attention:
    """How a checkpoint's backbone attends to a whole row, which is all prefix where rows may have one."""
    told = manifest.state.get("head")
    if told is not None:
        attention: Attention = told["attention"]
        return attention
    resolved = model_configuration(manifest.state.get("config", {}), manager)
    objective, _ = objective_and_spec(resolved, manager)
    return "bidirectional" if objective.attention == "prefix" else objective.attention


def _tokenizer(
    wanted: RecordsConfig, folder: Path, manifest: Manifest, manager: PluginManager
) -> tuple[str, Tokenizer]:
    if wanted.tokenizer is not None:
        return tokenizer_from_spec(wanted.tokenizer, manager.tokenizer_class)
    found = nearby_tokenizer(folder, model_configuration(manifest.state.get("config", {}), manager), manager)
    if found is None:
        raise TokenizerError(f"{folder}: its tokenizer does not lie with it; name it as data.records.tokenizer")
    if found[1].identity != manifest.state.get("tokenizer"):
        raise CheckpointError(f"{folder}: the tokenizer that lies with it is not the one that it was made with")
    return found


def _records(wanted: RecordsConfig, fields: Mapping[str, FieldSpec]) -> tuple[Records, Records]:
    """(train, validation), the second in an order that is drawn once for all runs: an evaluation takes the first of
    them, and many files have one label after another."""

    def read(paths: list[str], only: dict[str, str]) -> Records:
        how: dict[str, Any] = {"format": wanted.format, "columns": wanted.columns, "header": wanted.header}
        return read_records([Path(path) for path in paths], fields, only=only, **how)

    train = read(wanted.train, wanted.only)
    if wanted.validation or wanted.validation_only:
        validation = read(wanted.validation or wanted.train, wanted.validation_only)
        return train, validation.take(_drawn("evaluated records", validation))
    held = round(len(train) * wanted.validation_share)
    if not 0 < held < len(train):
        raise DataError(
            f"data.records.validation_share = {wanted.validation_share} of {len(train)} records leaves nothing to "
            "train or to evaluate on; name files in data.records.validation"
        )
    order = _drawn("held-out records", train)
    return train.take(sorted(order[held:])), train.take(order[:held])


def _drawn(site: str, records: Records) -> list[int]:
    order: list[int] = rng.generator(site, len(records)).permutation(len(records)).tolist()
    return order
