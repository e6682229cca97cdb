"""Measures against plain formulas and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megalm.errors import ConfigError, DataError
from megalm.metrics.measures import library as library_module
from megalm.metrics.measures.measures import MEASURES, Measures
from megalm.metrics.measures.numbers import perplexity
from megalm.metrics.measures.retrieval import ranks
from megalm.metrics.measures.tags import marks_spans

for module in ("sklearn", "scipy", "seqeval", "sacrebleu"):
    pytest.importorskip(module)

LABELS = ["a", "b", "c", None]


def counts(predicted, true, label):
    hits = sum(a == b == label for a, b in zip(predicted, true, strict=True))
    return hits, sum(a == label for a in predicted), sum(b == label for b in true)


def f1(hits, predicted, true):
    return 2 * hits / (predicted + true) if predicted + true else 0.0


def test_labels() -> None:
    draw = np.random.default_rng(5)
    predicted = [LABELS[n] for n in draw.integers(4, size=90)]
    true = [LABELS[n] for n in draw.integers(3, size=90)]
    found = Measures("class", ["accuracy", "f1_macro", "f1_micro", "matthews"])(predicted, true)
    assert found["accuracy"] == np.mean([a == b for a, b in zip(predicted, true, strict=True)])
    each = [counts(predicted, true, label) for label in "abc"]
    assert found["f1_macro"] == pytest.approx(np.mean([f1(*c) for c in each]), rel=1e-12)
    assert found["f1_micro"] == pytest.approx(f1(*np.sum(each, axis=0)), rel=1e-12)
    # Matthews is the correlation of both sides' indicators, summed over all classes, of which None is one.
    x, y = (np.array([[label == each for each in LABELS] for label in side], float) for side in (predicted, true))
    x, y = x - x.mean(0), y - y.mean(0)
    assert found["matthews"] == pytest.approx((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()), rel=1e-12)


def test_sets_of_labels() -> None:
    measures = Measures("classes", ["f1_micro", "f1_macro", "accuracy"])
    predicted, true = [["a", "b"], [], ["c"], ["a"]], [["b", "a"], ["a"], ["b"], []]
    found = measures(predicted, true)
    assert found["accuracy"] == 0.25
    assert found["f1_micro"] == pytest.approx(f1(2, 4, 4))
    assert found["f1_macro"] == pytest.approx((f1(1, 2, 2) + f1(1, 1, 2) + 0) / 3)
    assert measures([["a"], []], [["a"], []]) == {"f1_micro": 1, "f1_macro": 1, "accuracy": 1}
    assert measures([["a"], []], [[], ["a"]]) == {"f1_micro": 0, "f1_macro": 0, "accuracy": 0}


def test_numbers() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=50).tolist(), draw.integers(9, size=50).tolist()
    found = Measures("number", ["pearson", "spearman", "mse"])(a, b)
    assert found["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-12)
    assert found["mse"] == pytest.approx(np.square(np.subtract(a, b)).mean(), rel=1e-12)

    def rank(values):
        return [np.mean([np.sum(np.less(values, v)), np.sum(np.less_equal(values, v)) - 1]) for v in values]

    assert found["spearman"] == pytest.approx(np.corrcoef(rank(a), rank(b))[0, 1], rel=1e-12)
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e9))


def test_spans_whose_types_have_hyphens() -> None:
    true = [["B-x-work", "I-x-work", "O", "B-y-work"]]
    measures = Measures("tags", ["span_f1", "span_precision", "span_recall", "accuracy", "f1_macro"])
    assert set(measures(true, true).values()) == {1.0}
    found = measures([["B-y-work", "I-y-work", "O", None]], true)
    assert (found["span_f1"], found["accuracy"]) == (0.0, 0.25)
    found = measures([["B-x-work", "I-x-work", None, "B-x-work"]], true)
    assert (found["span_f1"], found["accuracy"]) == (0.5, 0.5)
    report = measures.report([["B-x-work", "I-x-work", "O", "O"]], true)
    assert {name: row["support"] for name, row in report["labels"].items()} == {"x-work": 1, "y-work": 1}
    assert report["averages"]["micro avg"]["recall"] == 0.5
    hiding = measures.report([["B-micro avg", "B-b"]], [["B-micro avg", "O"]])
    assert hiding["labels"]["micro avg"]["precision"] == 1.0
    assert hiding["averages"]["micro avg"]["precision"] == 0.5
    labels = Measures("class", ["accuracy"]).report(["macro avg", "b"], ["macro avg", "macro avg"])
    assert labels["labels"]["macro avg"]["recall"] == 0.5
    assert labels["averages"]["macro avg"]["recall"] == 0.25
    assert marks_spans(["O", "B-a"])
    assert not marks_spans(["O"])
    assert not marks_spans(["B", "I", "O"])
    assert not marks_spans(["B-a", "E-a", "O"])


def test_answers() -> None:
    measures = Measures("answers", ["f1", "exact_match"])
    assert measures(["The Fens!"], [["Rome", "fens"]]) == {"f1": 1.0, "exact_match": 1.0}
    found = measures(["in the fens of Ely"], [["fens, Ely"]])
    assert found == {"f1": pytest.approx(2 * 2 / 6), "exact_match": 0.0}
    assert measures(["", "x", ""], [[], [], ["y"]]) == {"f1": pytest.approx(1 / 3), "exact_match": pytest.approx(1 / 3)}
    assert measures(["曹操和刘备"], [["曹操"]])["f1"] == pytest.approx(2 * 2 / 7)


def test_bleu() -> None:
    measures = Measures("text", ["bleu"])
    text = "the king of Rome came and saw"
    assert measures([text], [text])["bleu"] == pytest.approx(100)
    # One of seven words differs, the last: 6/7, 5/6, 4/5, 3/4 of the n-grams are right.
    other = text.replace("saw", "left")
    assert measures([other], [text])["bleu"] == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)


def test_retrieval() -> None:
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=(9, 4)), draw.normal(size=(9, 4))
    found = ranks(a, b, [str(n) for n in range(9)])
    scores = a @ b.T
    assert found.tolist() == [(scores[n] > scores[n, n]).sum() for n in range(9)]
    measures = Measures("retrieval", ["recall@1", "recall@5", "mrr"])
    measured = measures(list(zip(a.tolist(), b.tolist(), strict=True)), [str(n) for n in range(9)])
    assert measured["recall@1"] == (found == 0).mean()
    assert measured["recall@5"] == (found < 5).mean()
    assert measured["mrr"] == pytest.approx(np.mean(1 / (found + 1)))
    same = [([1.0, 1.0], [1.0, 1.0])] * 5
    assert measures(same, list("abcde"))["recall@1"] == 0.0  # every text has one vector: nothing is told apart
    assert measures(same, list("aaaaa"))["recall@1"] == 1.0


def test_what_is_not_defined_is_zero_and_a_number() -> None:
    single = {
        "class": [(["a"], ["a"]), (["a", "a"], ["b", "b"]), ([None], ["a"])],
        "classes": [([[]], [[]]), ([["a"]], [[]])],
        "number": [([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])],
        "tags": [([["O"]], [["O"]]), ([[None]], [["B-x"]]), ([["O", "O"]], [["B-x", "O"]])],
        "answers": [([""], [[]]), (["!"], [["?"]])],
        "retrieval": [([([0.0], [0.0])], ["a"]), ([([0.0], [0.0])] * 2, ["a", "b"])],
        "text": [([""], ["a"]), (["a"], ["b"])],
    }
    for kind, measures in MEASURES.items():
        for predicted, true in [*single[kind], ([], [])]:
            found = Measures(kind, list(measures))(predicted, true)
            assert all(type(value) is float and math.isfinite(value) for value in found.values()), (kind, found)
        with pytest.raises(ValueError, match="1 predictions for 0 records"):
            Measures(kind, list(measures))([single[kind][0][0][0]], [])


def test_order_changes_nothing() -> None:
    true, predicted = ["a", "b", "a", "c"], ["a", "a", "b", "c"]
    measures = Measures("class", list(MEASURES["class"]))
    for order in itertools.permutations(range(4)):
        assert measures([predicted[n] for n in order], [true[n] for n in order]) == pytest.approx(
            measures(predicted, true), rel=1e-12
        )


def test_names_that_are_no_measures() -> None:
    with pytest.raises(
        ConfigError, match=r"'matthew' is no measure of a head that predicts class; .* mean \"matthews\""
    ):
        Measures("class", ["matthew"])
    with pytest.raises(ConfigError, match="expected measures, each once"):
        Measures("class", ["accuracy", "accuracy"])
    with pytest.raises(ConfigError, match="expected measures, each once"):
        Measures("class", [])


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = library_module.load_extra
    monkeypatch.setattr(library_module, "load_extra", lambda names, what, extra: real(("no_such_thing",), what, extra))
    with pytest.raises(DataError, match=r"the measure f1_macro needs .* pip install 'megalm\[eval\]'"):
        Measures("class", ["f1_macro"])(["a"], ["b"])
