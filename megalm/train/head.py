"""A head as an objective, so that the step, evaluation, checkpoints and proofs need no branch for it.

The corpus of such an objective is a sequence of records: a sample's number is its place. Rows are padded to the longest
of them, as far as the layout allows that, or to the run's sequence length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch

from megalm.data.labelled.records import Records, corpus_problems, where
from megalm.errors import DataError, MegalmError, ObjectiveError
from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import Microbatch, make_microbatch
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.head import Head
from megalm.plugin.contract.objective import Batch, Corpus, Example, LossContext, Needs, Objective, ObjectiveEnv, Term
from megalm.plugin.contract.records import Record
from megalm.train.feed import evaluation_rows
from megalm.train.objective import TrainingObjective
from megalm.train.stages import forward_only
from megalm.train.step import AT_ONCE

ROW_UNITS = {"cuda": 8, "cpu": 1}
"""Tokens: tensor cores like rows of such lengths. To a processor a token of padding costs what any other does."""


class HeadObjective(Objective):
    """The objective of a head called ``name`` over records. Without ``labelled``, records may lack what is to be
    predicted, and score nothing then. Rows are padded to the sequence length, or, with ``unit``, to the least multiple
    of it that holds them all.
    """

    def __init__(self, name: str, head: Head, *, labelled: bool = True, unit: int | None = None) -> None:
        super().__init__(head.cfg, ObjectiveEnv(head.env.tokenizer, head.env.sequence_length))
        self.head = head
        self.module_name = re.sub(r"\W", "_", name.rpartition(":")[2])
        self.version = head.version  # type: ignore[misc]  # an objective's is its class's; this one speaks for a head
        self._name = name
        self._labelled = labelled
        self._unit = unit

    def needs(self) -> Needs:
        needs = self.head.needs()
        if needs.attention != self.head.env.attention:
            raise ObjectiveError(
                f"head {self._name}: needs() asks for {needs.attention} attention, but the backbone's is "
                f"{self.head.env.attention}; give HeadEnv.attention"
            )
        return replace(needs, modules={**needs.modules, self.module_name: self.head.build})

    def weights(self) -> Mapping[str, float]:
        return self.head.weights()

    def check_corpus(self, corpus: Corpus) -> None:
        """DataError that lists the records that lack what the head needs, each with its place, field and value."""
        records = _records(corpus)
        bad, problems = corpus_problems(records, self.head.fields(), self.head.env.labels, labelled=self._labelled)
        if bad:
            lines = "\n".join(f"  {line}" for line in problems)
            raise DataError(f"head {self._name}: {bad} of {len(records)} records cannot be used:\n{lines}")
        if not records:
            raise DataError(f"head {self._name}: no records")

    def num_samples(self, corpus: Corpus) -> int:
        return len(_records(corpus))

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        place = where(_records(corpus), sample)
        try:
            example = self.head.build_example(_records(corpus)[sample])
        except DataError as error:
            raise DataError(f"head {self._name}: {place}: {error}") from error
        if (length := len(example["tokens"])) > self.env.sequence_length:
            raise ObjectiveError(
                f"head {self._name}: build_example gives {length} tokens for {place}, more than the sequence length "
                f"of {self.env.sequence_length}; cut the text and set 'truncated'"
            )
        return example

    def collate(self, examples: list[Example]) -> Batch:
        return self.collate_to(examples, self.rounded(max(self.length(example) for example in examples)))

    def collate_to(self, examples: list[Example], length: int) -> Batch:
        """The same in rows of ``length`` tokens, which is enough."""
        return self.head.collate(examples, length)

    def length(self, example: Example) -> int:
        """Tokens of the longest row that an example gives."""
        return self.head.length(example)

    def rounded(self, length: int) -> int:
        """How long rows of up to ``length`` tokens are made."""
        whole = self.env.sequence_length
        return whole if self._unit is None else min(-(-length // self._unit) * self._unit, whole)

    def counts(self, batch: Batch) -> dict[str, int]:
        return self.head.counts(batch)

    def loss(self, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        return self.head.loss(ctx.module(self.module_name), hidden, batch, ctx)

    def predict(self, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> list[Any]:
        """The head's predictions. ObjectiveError where they are not a list of JSON values."""
        found = self.head.predict(ctx.module(self.module_name), hidden, batch, ctx)
        if not isinstance(found, list):
            raise ObjectiveError(f"head {self._name}: predict() must return a list; found {found!r}")
        for prediction in found:
            try:
                json.dumps(prediction, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ObjectiveError(
                    f"head {self._name}: predict() returns what JSON cannot hold: {error}; found {prediction!r}"
                ) from error
        return found


def _records(corpus: Corpus) -> Sequence[Record]:
    return cast("Sequence[Record]", corpus)


def as_corpus(records: Sequence[Record]) -> Corpus:
    """Records as feeds take them: a HeadObjective's corpus is its records."""
    return cast("Corpus", records)


def in_parts(name: str, head: Head, records: Sequence[Record]) -> tuple[Sequence[Record], list[int]]:
    """Checked records as the head reads them, long ones in parts, and how many parts each has: what the engine trains
    on and predicts.
    """
    rows: list[Any] = []
    places, counts = [], []
    for number, record in enumerate(records):
        try:
            parts = head.parts(record)
        except DataError as error:
            raise DataError(f"head {name}: {where(records, number)}: {error}") from error
        if not parts:
            raise ObjectiveError(f"head {name}: parts() gives none for {where(records, number)}; give at least one")
        rows += parts
        counts.append(len(parts))
        if isinstance(records, Records):
            places += [records.places[number]] * len(parts)
    if isinstance(records, Records):
        return Records(rows, places), counts
    return rows, counts


def by_size(rows: Sequence[Record]) -> list[int]:
    """The places of the rows, those with little text first: what is predicted together is then of like length, and
    little is padded. Text is measured as JSON, which costs less than to encode it once more.
    """
    sizes = [len(json.dumps(row, ensure_ascii=False, default=str)) for row in rows]
    return sorted(range(len(rows)), key=sizes.__getitem__)


def row_unit(tp: int, sp: bool, device: str) -> int:
    """What the lengths of rows are multiples of, on a type of device. Where the sequence is divided it divides evenly;
    else it is the same for every layout, so that all pad alike.
    """
    unit = ROW_UNITS.get(device, 1)
    return math.lcm(unit, tp) if sp else unit


def head_objective(name: str, head: Head, *, labelled: bool = True, unit: int | None = None) -> TrainingObjective:
    """What the engine trains for a head; ``unit`` as HeadObjective has it."""
    vocab_size = head.env.tokenizer.vocab_size
    return TrainingObjective({name: HeadObjective(name, head, labelled=labelled, unit=unit)}, vocab_size)


@torch.no_grad()
def predict(
    model: LanguageModel,
    name: str,
    head: Head,
    records: Sequence[Record],
    *,
    micro_batch: int,
    pipeline: Pipeline | None = None,
) -> list[Any]:
    """The head's predictions for records, labelled or not, in their order, without dropout.

    Every rank gets all of them. Data-parallel ranks share the work, ``micro_batch`` rows at a time; neither changes a
    prediction. ``pipeline``: the one that the model's stages were cut for; default: one stage. DataError lists records
    that cannot be used.
    """
    parallel = model.parallel
    unit = row_unit(parallel.tp.size, parallel.sp, parallel.device.type)
    objective = head_objective(name, head, labelled=False, unit=unit)
    part = cast("HeadObjective", objective.parts[name])
    part.check_corpus(as_corpus(records))
    rows, counts = in_parts(name, head, records)
    order = by_size(rows)
    corpus = as_corpus(rows.take(order) if isinstance(rows, Records) else [rows[place] for place in order])
    mine: list[Any] = []
    waiting = evaluation_rows(
        objective,
        corpus,
        seed=0,
        samples=len(rows),
        micro_batch=micro_batch,
        dp_index=parallel.dp.index,
        dp_size=parallel.dp.size,
    )
    while some := list(islice(waiting, AT_ONCE * parallel.pp.size)):
        tensors = [each.tensors(parallel.device) for each in some]

        def add(number: int, hidden: torch.Tensor, batch: Microbatch, some: Any = some, tensors: Any = tensors) -> None:
            slots = some[number].slots
            found = part.predict(hidden, objective.last_stage(tensors[number]), model.context(batch))
            if len(found) != len(slots):
                raise ObjectiveError(f"head {name}: predict() returns {len(found)} predictions for {len(slots)} rows")
            mine.extend([order[slot], prediction] for slot, prediction in zip(slots, found, strict=True))

        forward_only(model, [make_microbatch(each, parallel) for each in tensors], add, pipeline)
    # Only ranks with the pipeline's last stage have any.
    shares = parallel.dp.gather_json(mine)
    everyone = [pair for stage in parallel.pp.gather_json(shares) for share in stage for pair in share]
    if len(everyone) != len(rows):
        raise MegalmError(f"head {name}: {len(everyone)} predictions of {len(rows)} rows reached rank {parallel.rank}")
    found = iter([prediction for _, prediction in sorted(everyone, key=lambda pair: int(pair[0]))])
    return [head.join(record, list(islice(found, count))) for record, count in zip(records, counts, strict=True)]
