"""Measures by name: what a head says it is measured by, and which way each gets better.

A head names measures of the kind of its predictions and gives what was predicted and what is right; how a measure is
computed is written once, here, for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megalm.errors import ConfigError
from megalm.metrics.measures import answers, classes, numbers, retrieval, tags, texts
from megalm.plugin.suggest import did_you_mean

Goal = Literal["max", "min"]
MeasureKind = Literal["class", "classes", "number", "tags", "answers", "text", "retrieval"]
"""What one prediction is: a label or none; a list of labels; a number; a tag or none for each word; a text, of several
right ones; a text; the vectors of a text and its counterpart, where what is right is the counterpart's text."""


@dataclass(frozen=True)
class Measure:
    """A function of what was predicted and what is right, and which way it gets better."""

    compute: Callable[[Sequence[Any], Sequence[Any]], float]
    goal: Goal = "max"


def _words(measure: Callable[[Sequence[Any], Sequence[Any]], float]) -> Callable[[Sequence[Any], Sequence[Any]], float]:
    """A measure of labels, of the tags of all words."""

    def compute(predicted: Sequence[Any], true: Sequence[Any]) -> float:
        return measure([tag for row in predicted for tag in row], [tag for row in true for tag in row])

    return compute


MEASURES: Mapping[MeasureKind, Mapping[str, Measure]] = {
    "class": {
        "accuracy": Measure(classes.accuracy),
        "f1_macro": Measure(classes.f1_macro),
        "f1_micro": Measure(classes.f1_micro),
        "matthews": Measure(classes.matthews),
    },
    "classes": {
        "f1_micro": Measure(classes.set_f1_micro),
        "f1_macro": Measure(classes.set_f1_macro),
        "accuracy": Measure(classes.set_accuracy),
    },
    "number": {
        "pearson": Measure(numbers.pearson),
        "spearman": Measure(numbers.spearman),
        "mse": Measure(numbers.mean_squared_error, "min"),
    },
    "tags": {
        "span_f1": Measure(tags.span_f1),
        "span_precision": Measure(tags.span_precision),
        "span_recall": Measure(tags.span_recall),
        "f1_macro": Measure(_words(classes.f1_macro)),
        "accuracy": Measure(tags.word_accuracy),
    },
    "answers": {"f1": Measure(answers.answer_f1), "exact_match": Measure(answers.exact_match)},
    "retrieval": {
        **{f"recall@{k}": Measure(partial(retrieval.recall_at, k)) for k in (1, 5, 10, 100)},
        "mrr": Measure(retrieval.mean_reciprocal_rank),
    },
    "text": {"bleu": Measure(texts.bleu), "bleu_zh": Measure(lambda a, b: texts.bleu(a, b, tokenize="zh"))},
}
_REPORTS: Mapping[str, Callable[[Sequence[Any], Sequence[Any]], dict[str, Any]]] = {
    "class": classes.class_report,
    "classes": classes.set_report,
}


class Measures:
    """Some measures of one kind, the first of which a checkpoint is chosen by.

    ConfigError where a name is none of the kind's, or is given twice.
    """

    def __init__(self, kind: MeasureKind, names: Sequence[str], *, where: str = "metrics") -> None:
        """``where``: the setting that holds the names, for messages."""
        known = MEASURES[kind]
        problems = [
            f"{where}: {name!r} is no measure of a head that predicts {kind}; choose among "
            f"{', '.join(known)}{did_you_mean(name, known)}"
            for name in names
            if name not in known
        ]
        if len(set(names)) < len(names) or not names:
            problems.append(f"{where}: expected measures, each once, found {list(names)}")
        if problems:
            raise ConfigError(problems)
        self.kind = kind
        self.names = tuple(names)

    def goals(self) -> dict[str, Goal]:
        """Which way each gets better."""
        return {name: MEASURES[self.kind][name].goal for name in self.names}

    def __call__(self, predicted: Sequence[Any], true: Sequence[Any]) -> dict[str, float]:
        """Each measure; a finite number. ValueError where one side has more items, DataError where a library is
        missing."""
        if len(predicted) != len(true):
            raise ValueError(f"{len(predicted)} predictions for {len(true)} records")
        return {name: MEASURES[self.kind][name].compute(predicted, true) for name in self.names}

    def report(self, predicted: Sequence[Any], true: Sequence[Any]) -> dict[str, Any]:
        """What classes there are, and how well each is found, as JSON: ``{"labels": {NAME: {"precision", "recall",
        "f1-score", "support"}}, "averages": {...}}``; empty for kinds that have no classes.
        """
        if self.kind == "tags":
            spans = tags.marks_spans([tag for row in true for tag in row])
            return (tags.span_report if spans else _word_report)(predicted, true)
        return _REPORTS[self.kind](predicted, true) if self.kind in _REPORTS else {}


def _word_report(predicted: Sequence[Any], true: Sequence[Any]) -> dict[str, Any]:
    return classes.class_report([tag for row in predicted for tag in row], [tag for row in true for tag in row])
