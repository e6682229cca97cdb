"""A head under examination: records, and tiny runs that train it as an objective.

Because a head is trained as an objective, the subject is one of an objective's, and the checks of those serve it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megalm.config.pairs import settings_from_pairs
from megalm.data.store import TOKENIZER_FOLDER
from megalm.data.tokenizer import load_tokenizer
from megalm.errors import ConfigError
from megalm.model.spec import resolve_model
from megalm.plugin.contract.head import Head, HeadEnv
from megalm.plugin.contract.objective import Attention, Needs
from megalm.plugin.contract.records import Record
from megalm.plugin.manager import PluginManager
from megalm.testing.check import CheckFailed
from megalm.testing.head.records import CLASSES, TAGS, default_labels, make_records, unlabelled
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.runs import make_run
from megalm.train.feed import Rows
from megalm.train.head import HeadObjective, as_corpus, head_objective
from megalm.train.objective import TrainingObjective
from megalm.train.prepare import Prepared

BASES: dict[Attention, str] = {"bidirectional": "mlm", "causal": "causal_lm"}
"""What the run that lends its configuration would pretrain."""
COUNT = 60


class HeadSubject(ObjectiveSubject):
    """What the checks of a head work on.

    Args:
        name: the component, or ``plugin:component``.
        manager: default: one with all installed plugins.
        settings: ``key=value`` pairs of the head's own, such as ``pooling=mean``.
        full: every layout of up to sixteen ranks.
        sample: where it is not full, at most so many layouts, drawn from the quick set; default: all of that.
        seed: of the model, the records, the layouts that are drawn and the schedules.
        records: labelled records; default: made-up ones, as the head's fields ask for.
        labels: names of the classes; default: some where a field holds labels.
        attention: of the backbone.
        tokenizer: component that needs no training, or ``component:path``.
        device: where ranks compute.
        sequence_length: tokens of a row.

    Use it as a context manager or :meth:`close` it: it keeps a temporary folder.
    """

    def __init__(
        self,
        name: str,
        *,
        manager: PluginManager | None = None,
        settings: Sequence[str] = (),
        full: bool = False,
        sample: int | None = None,
        seed: int = 0,
        records: Sequence[Record] | None = None,
        labels: Sequence[str] | None = None,
        attention: Attention = "bidirectional",
        tokenizer: str = "byte",
        device: str = "cpu",
        sequence_length: int = 48,
    ) -> None:
        self._settings = tuple(settings)
        self._records = records
        self._labels = labels
        self.attention = attention
        super().__init__(
            name,
            manager=manager,
            full=full,
            sample=sample,
            seed=seed,
            tokenizer=tokenizer,
            device=device,
            sequence_length=sequence_length,
        )

    def make(self, labels: Sequence[str] | None = None) -> Head:
        """A new instance of the head."""
        component = self.manager.get("heads", self.name)
        cls = self.manager.load_class("heads", self.name)
        section = ("head", component.name)
        settings = settings_from_pairs(cls.Config, section, f"plugin {component.plugin}", self._settings)
        _, tokenizer = load_tokenizer(
            self._store / TOKENIZER_FOLDER, self.manager.tokenizer_class
        )
        chosen = self.labels if labels is None else tuple(labels)
        head: Head = cls(settings, HeadEnv(tokenizer, self.sequence_length, chosen, self.attention))
        return head

    def configuration(self) -> str | None:
        return None  # records are no part of a run's configuration

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        if self._labels is not None:
            return tuple(self._labels)
        reasons = []
        for labels in (CLASSES, TAGS, ()):
            try:
                return default_labels(self.make(labels).fields())
            except ConfigError as error:
                reasons.append(str(error))
        raise CheckFailed(f"head {self.name}: it takes neither labels nor none:\n" + "\n".join(dict.fromkeys(reasons)))

    @cached_property
    def head(self) -> Head:
        """An instance."""
        return self.make()

    @cached_property
    def records(self) -> list[Record]:
        """Labelled records."""
        if self._records is not None:
            return list(self._records)
        return list(make_records(self.head.fields(), self.labels, COUNT, seed=self.seed))

    @property
    def bare(self) -> list[dict[str, Any]]:
        """The same without labels."""
        return unlabelled(self.records, self.head.fields())

    def encoded(self, records: Sequence[Record], first_slot: int = 0) -> Rows:
        """A microbatch of records, labelled or not, in consecutive slots."""
        return self.rows([self.head.build_example(record) for record in records], first_slot)

    def _needs(self) -> Needs:
        try:
            return HeadObjective(self.name, self.head).needs()
        except ConfigError as error:
            raise CheckFailed(f"head {self.name} cannot be made: {error}") from error

    def _run(self, folder: Path, overrides: list[str]) -> Prepared:
        lent = make_run(
            folder,
            self._store,
            objective=BASES[self.attention],
            architecture=self._architecture,
            # What the run would pretrain has no cells; the batches are whole ones of the head's.
            overrides=[each for each in overrides if not each.startswith("train.cell=")],
            manager=self.manager,
        )
        objective = self._objective(lent)
        corpus: Any = as_corpus(self.records)
        objective.check_corpus(corpus)
        return dataclasses.replace(
            lent,
            objective=objective,
            spec=resolve_model(lent.resolved.config, objective.needs, lent.tokenizer.vocab_size),
            train=corpus,
            validation=corpus,
        )

    def _objective(self, prepared: Prepared) -> TrainingObjective:
        return head_objective(self.name, self.make())


def of_a_head(check: Callable[[Any], str]) -> Callable[[HeadSubject], str]:
    """An objective's check for a head: what it says is about a head."""

    def run(subject: HeadSubject) -> str:
        try:
            return check(subject)
        except CheckFailed as failure:
            text = str(failure).replace(f"objective {subject.name}:", f"head {subject.name}:")
            raise CheckFailed(text) from failure

    return run
