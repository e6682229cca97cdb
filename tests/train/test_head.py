"""A head as an objective: what the adapter refuses, what prediction promises, and the page's example."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.errors import DataError, ObjectiveError
from megalm.plugin.component import Component, PluginInfo
from megalm.plugin.contract.head import Head, HeadEnv
from megalm.plugin.manager import PluginManager
from megalm.testing.check import run_checks
from megalm.testing.head.checks import CHECKS
from megalm.testing.head.module import serial_model
from megalm.testing.head.subject import HeadSubject
from megalm.train.head import as_corpus, head_objective, predict
from megalm.train.step import evaluate
from megalm_plugins.heads.sequence_classification import SequenceClassification
from megalm_plugins.tokenizers.byte import ByteTokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "heads.md"


@pytest.fixture(scope="module")
def subject() -> Iterator[HeadSubject]:
    with HeadSubject("sequence_classification") as made:
        yield made


def make_head() -> SequenceClassification:
    env = HeadEnv(ByteTokenizer(), 16, ("no", "yes"))
    return SequenceClassification(SequenceClassification.Config(), env)


def test_bad_records_are_listed_with_their_numbers() -> None:
    objective = head_objective("sc", make_head())
    good = {"text": "x", "label": "no"}
    with pytest.raises(DataError) as caught:
        objective.check_corpus(as_corpus([good, {"text": "x"}, good, {"text": 3, "label": "maybe"}]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "head sc: 2 of 4 records cannot be used:"
    assert lines[1] == "  record 1: field 'label' is missing; it holds the label of the text"
    assert lines[2] == "  record 3: field 'text': expected text, found 3"
    assert "record 3: field 'label': expected one of 'no, yes', found 'maybe'" in lines[3]
    with pytest.raises(DataError) as caught:
        objective.check_corpus(as_corpus([{"text": "x"}] * 50))
    assert len(str(caught.value).splitlines()) == 12
    with pytest.raises(DataError, match="head sc: no records"):
        objective.check_corpus(as_corpus([]))


def broken(method: str, function: Callable[..., Any]) -> Head:
    head = make_head()
    setattr(head, method, function)
    return head


def test_rows_that_break_the_contract_are_named() -> None:
    head = make_head()
    correct = head.build_example
    cases: list[tuple[Callable[..., Any], str]] = [
        (
            lambda r: {**correct(r), "tokens": correct(r)["tokens"].repeat(9)},
            "tokens for record 0, more than the sequence",
        ),
        (
            lambda r: {k: v for k, v in correct(r).items() if k != "label"},
            "'label' is declared with dimensions .* nothing",
        ),
        (lambda r: {**correct(r), "label": [1, 2]}, "'label' is declared with dimensions .batch., but .* shape .2."),
    ]
    for function, message in cases:
        objective = head_objective("sc", broken("build_example", function))
        with pytest.raises(ObjectiveError, match=message):
            objective.collate([objective.build(0, as_corpus([{"text": "abc", "label": "no"}]), (0, "train", 0))])

    def refuse(record: Any) -> Any:
        raise DataError("field 'text': no")

    objective = head_objective("sc", broken("build_example", refuse))
    with pytest.raises(DataError, match="head sc: record 1: field 'text': no"):
        objective.build(1, as_corpus([{}, {}]), (0, "train", 0))


def test_another_attention_than_the_backbones_is_refused() -> None:
    head = make_head()
    needs = head.needs()
    object.__setattr__(needs, "attention", "causal")
    with pytest.raises(ObjectiveError, match="asks for causal attention, but the backbone's is bidirectional"):
        head_objective("sc", broken("needs", lambda: needs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:-1], "2 predictions for 3 rows"),
        (lambda found: tuple(found), "must return a list"),
        (lambda found: [float("nan")] * len(found), "what JSON cannot hold"),
        (lambda found: [{1, 2}] * len(found), "what JSON cannot hold"),
    ],
)
def test_predictions_that_break_the_contract_are_named(
    subject: HeadSubject, change: Callable[[list[Any]], Any], message: str
) -> None:
    head = subject.make()
    correct = head.predict
    head.predict = lambda *arguments: change(correct(*arguments))  # type: ignore[method-assign]
    with pytest.raises(ObjectiveError, match=message):
        predict(serial_model(subject), subject.name, head, subject.records[:3], micro_batch=8)


def test_prediction_refuses_bad_records(subject: HeadSubject) -> None:
    with pytest.raises(DataError, match="record 1: field 'text' is missing"):
        predict(serial_model(subject), subject.name, subject.head, [{"text": "x"}, {"txt": "x"}], micro_batch=8)


def test_evaluation_is_the_mean_over_records(subject: HeadSubject) -> None:
    """The engine's evaluation, from the probabilities that prediction gives."""
    from megalm.train.feed import evaluation_rows

    model, records = serial_model(subject), subject.records[:11]
    rows = evaluation_rows(
        subject.objective, as_corpus(records), seed=0, samples=99, micro_batch=4, dp_index=0, dp_size=1
    )
    found = predict(model, subject.name, subject.head, subject.bare[:11], micro_batch=3)
    right = [p["probabilities"][r["label"]] for p, r in zip(found, records, strict=True)]
    expected = -torch.tensor(right, dtype=torch.float64).log().mean().item()
    assert evaluate(model, subject.objective, rows).total == pytest.approx(expected, rel=1e-12)


def test_rows_of_like_length_are_predicted_together(subject: HeadSubject) -> None:
    """Short and long texts by turns: two batches, one of them narrow, and predictions in the records' order."""
    head, widths = subject.make(), []
    model, correct = serial_model(subject), head.predict

    def watch(module: Any, hidden: Any, batch: Any, ctx: Any) -> list[Any]:
        widths.append(batch["attention_mask"].shape[1])
        return correct(module, hidden, batch, ctx)

    records = [{"text": "ab"}, {"text": "abcdefghijklm"}] * 3
    alone = [predict(model, subject.name, head, [record], micro_batch=1)[0] for record in records]
    head.predict = watch  # type: ignore[method-assign]
    together = predict(model, subject.name, head, records, micro_batch=3)
    assert len(widths) == 2
    assert min(widths) < max(widths)
    for one, other in zip(alone, together, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"])


def test_parts_are_rows_and_are_joined(subject: HeadSubject, tmp_path: Path) -> None:
    """A text in parts of five letters; what is predicted of each is joined, and a bad part names the file and line."""
    from megalm.data.labelled.read import read_records
    from megalm.train.head import in_parts

    head = subject.make()
    (tmp_path / "a.tsv").write_text(f"text\tlabel\nabcdefghijklm\t{head.env.labels[0]}\nxyz\t{head.env.labels[1]}\n")
    records = read_records([tmp_path / "a.tsv"], head.fields())
    head.parts = lambda r: [{**r, "text": r["text"][n : n + 5]} for n in range(0, len(r["text"]), 5)]  # type: ignore[method-assign]
    head.join = lambda record, found: [each["label"] for each in found]  # type: ignore[method-assign]
    rows, counts = in_parts("sc", head, records)
    assert ([row["text"] for row in rows], counts) == (["abcde", "fghij", "klm", "xyz"], [3, 1])
    model = serial_model(subject)
    found = predict(model, subject.name, head, records, micro_batch=3)
    whole = predict(model, subject.name, subject.make(), [{"text": row["text"]} for row in rows], micro_batch=4)
    labels = [each["label"] for each in whole]
    assert found == [labels[:3], labels[3:]]

    def refuse(record: Any) -> Any:
        raise DataError("field 'text': no")

    head.build_example = refuse  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"head sc: .*a\.tsv: line 3: field 'text': no"):
        head_objective("sc", head).build(3, as_corpus(rows), (0, "train", 0))
    head.parts = lambda record: []  # type: ignore[method-assign]
    with pytest.raises(ObjectiveError, match=r"parts\(\) gives none for .*a\.tsv: line 2"):
        in_parts("sc", head, records)


def test_the_version_and_the_module_are_the_heads() -> None:
    class Later(SequenceClassification):
        version = 3

    head = Later(Later.Config(), HeadEnv(ByteTokenizer(), 16, ("no", "yes")))
    objective = head_objective("mine:later.one", head)
    assert objective.versions == {"mine:later.one": 3}
    assert list(objective.needs.modules) == ["later_one"]


def test_the_example_of_the_page_is_a_right_head() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(source, names)

    class OnThePage(PluginManager):
        def get(self, kind: str, name: str) -> Component:
            if (kind, name) == ("heads", "topic"):
                return Component(name, "page:Topic", "on the page", PluginInfo("page", "page", "1", "page"))
            return super().get(kind, name)

        def load_component(self, component: Component) -> Any:
            return names["Topic"] if component.name == "topic" else super().load_component(component)

    chosen = {"module", "records", "texts", "counts", "sums", "streams", "padding", "scopes", "metrics", "predictions"}
    with HeadSubject("topic", manager=OnThePage.for_launch(None)) as subject:
        results = list(run_checks([check for check in CHECKS if check.name in chosen], subject))
    assert len(results) == len(chosen)
    assert [(r.name, r.detail) for r in results if r.status != "passed"] == []


def test_rows_are_padded_to_the_given_length_and_items_to_the_longest() -> None:
    from megalm_plugins.heads.token_classification import TokenClassification

    head = TokenClassification(TokenClassification.Config(), HeadEnv(ByteTokenizer(), 16, ("no", "yes")))
    records = [{"words": ["a", "bc"], "tags": ["yes", "no"]}, {"words": ["d"]}]
    for length in (9, 16):
        batch = head.collate([head.build_example(record) for record in records], length)
        rest = [256] * (length - 6)
        assert batch["tokens"].tolist() == [[259, 97, 32, 98, 99, 260, *rest], [259, 100, 260, 256, 256, 256, *rest]]
        assert batch["attention_mask"].sum(1).tolist() == [6, 3]
        assert batch["attention_mask"].shape == (2, length)
        assert batch["first_tokens"].tolist() == [[1, 3], [1, -1]]
        assert batch["tags"].tolist() == [[1, 0], [-100, -100]]
