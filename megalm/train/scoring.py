"""A checkpoint's head on a file of records: predictions, what they are worth, and how many records were cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from megalm.errors import CheckpointError
from megalm.model.language_model import LanguageModel
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.head import Goal, Head
from megalm.plugin.contract.records import Record
from megalm.train.head import HeadObjective, as_corpus, in_parts, predict
from megalm.train.stored import Stored


def stored_head(stored: Stored) -> tuple[str, Head]:
    """The head that a checkpoint was trained with, and what it is called. CheckpointError where there is none."""
    for name, part in stored.objective.parts.items():
        if isinstance(part, HeadObjective):
            return name, part.head
    raise CheckpointError(
        f"{stored.folder}: has no head: it was trained with {', '.join(stored.objective.parts)}; train one on it with "
        "train.head"
    )


@dataclass(frozen=True)
class Scores:
    """What predictions are worth."""

    metrics: Mapping[str, float]
    goals: Mapping[str, Goal]
    report: Mapping[str, Any] = field(default_factory=dict)


def score(name: str, head: Head, records: Sequence[Record], predictions: Sequence[Any]) -> Scores:
    """The head's metrics and report of predictions for labelled records. DataError lists records that lack labels, or
    have unknown ones.
    """
    HeadObjective(name, head).check_corpus(as_corpus(records))
    whole = list(records)
    return Scores(head.metrics(predictions, whole), head.goals(), head.report(predictions, whole))


def predict_and_count(
    model: LanguageModel,
    name: str,
    head: Head,
    records: Sequence[Record],
    *,
    micro_batch: int,
    labelled: bool = False,
    pipeline: Pipeline | None = None,
) -> tuple[list[Any], int]:
    """Predictions for records, and how many of them were cut to the head's sequence length. ``labelled``: they must
    have labels, which is looked at before anything is computed.
    """
    HeadObjective(name, head, labelled=labelled).check_corpus(as_corpus(records))
    found = predict(model, name, head, records, micro_batch=micro_batch, pipeline=pipeline)
    rows, counts = in_parts(name, head, records)
    parts, cut = iter(rows), 0
    for count in counts:
        own = [head.build_example(part) for part in islice(parts, count)]
        cut += any(bool(example.get("truncated")) for example in own)
    return found, cut
