"""HeadSuite: the first-party heads pass it; each broken head fails the check meant for it, and passes when mended."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalm.errors import MegalmError, ObjectiveError
from megalm.parallel.comm import Group
from megalm.plugin.component import Component, PluginInfo
from megalm.plugin.contract.head import Head
from megalm.plugin.contract.modules import BuildContext
from megalm.plugin.contract.objective import IGNORE, Needs, TensorSpec, Term
from megalm.plugin.contract.records import FieldSpec, Record
from megalm.plugin.manager import PluginManager
from megalm.testing import HeadSuite
from megalm.testing.check import Check, CheckFailed, run_checks
from megalm.testing.head.checks import CHECKS
from megalm.testing.head.subject import HeadSubject, of_a_head
from megalm.testing.layouts import RankLayout
from megalm.testing.objective.parity import assert_layout_parity, layouts_for


class TestSequenceClassification(HeadSuite):
    head = "sequence_classification"


class SampledSuite(HeadSuite):
    """There are many heads: every quick layout of each would take minutes, and the full proof takes them all."""

    sample = 2


class TestTokenClassification(SampledSuite):
    head = "token_classification"


class TestTokenClassificationWithACRF(SampledSuite):
    head = "token_classification"
    settings = ("crf=true",)


class TestMultiLabelClassification(SampledSuite):
    head = "multi_label_classification"


class TestExtractiveQA(SampledSuite):
    head = "extractive_qa"


class TestRelationClassification(SampledSuite):
    head = "relation_classification"


class TestEmbeddingByPairs(SampledSuite):
    head = "embedding"


class TestEmbeddingByCosine(SampledSuite):
    head = "embedding"
    settings = ("loss=cosine", "size=5")


class TestRegressionOfPairs(SampledSuite):
    head = "regression"
    settings = ("pair=true", "pooling=mean")


class Letters(Head):
    """Which class each character is of: a small right head, which the gallery breaks in one place at a time."""

    def fields(self) -> Mapping[str, FieldSpec]:
        return {
            "text": FieldSpec("text", "a text"),
            "label": FieldSpec("class", "the class of its characters", label=True),
        }

    def needs(self) -> Needs:
        place = ("batch", "place")
        tensors = {
            "tokens": TensorSpec(),
            "attention_mask": TensorSpec(dtype="bool"),
            "places": TensorSpec(place, to="last"),
            "labels": TensorSpec(place, to="last"),
        }
        return Needs("bidirectional", tensors, lm_head=False, coupling="example")

    def weights(self) -> Mapping[str, float]:
        return {"letters": 1.0}

    def padding(self) -> Mapping[str, int | float | bool]:
        return {**super().padding(), "places": -1, "labels": IGNORE}

    def build_example(self, record: Record) -> dict[str, Any]:
        ids = self.env.tokenizer.encode_batch([record["text"]])[0]
        tokens = np.array(ids[: self.env.sequence_length])
        label = self.env.labels.index(record["label"]) if "label" in record else IGNORE
        return {
            "tokens": tokens,
            "places": np.arange(len(tokens)),
            "labels": np.full(len(tokens), label),
            "truncated": len(ids) > len(tokens),
        }

    def counts(self, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
        return {"letters": int((batch["labels"] != IGNORE).sum())}

    def build(self, hidden_size: int, ctx: BuildContext) -> nn.Module:
        return ctx.linear(hidden_size, len(self.env.labels))

    def scores(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> torch.Tensor:
        x = ctx.take(hidden, batch["places"].clamp(min=0))
        scores: torch.Tensor = ctx.widen(module(ctx.dropout(x, 0.2, "letters")))
        return scores

    def loss(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> dict[str, Term]:
        scores = self.scores(module, hidden, batch, ctx)
        total = F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=IGNORE)
        return {"letters": Term(total, scope="example")}

    def predict(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> list[Any]:
        scores = self.scores(module, hidden, batch, ctx).masked_fill((batch["places"] < 0)[..., None], 0.0)
        return scores.sum(1).tolist()

    def truth(self, record: Record) -> Any:
        return [float(label == record["label"]) for label in self.env.labels]

    def goals(self) -> Mapping[str, Any]:
        return {"accuracy": "max"}

    def metrics(self, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
        found = [self.env.labels[int(np.argmax(row))] for row in predictions]
        return {"accuracy": float(np.mean([a == r["label"] for a, r in zip(found, records, strict=True)]))}


class MeanInsteadOfSum(Letters):
    def loss(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> dict[str, Term]:
        terms = super().loss(module, hidden, batch, ctx)
        return {k: Term(t.sum / (batch["labels"] != IGNORE).sum().clamp(min=1), "example") for k, t in terms.items()}


class LossOverPadding(Letters):
    """Scores every position of a row, those of the padding too."""

    def needs(self) -> Needs:
        needs = super().needs()
        return Needs("bidirectional", {k: v for k, v in needs.tensors.items() if k != "places"}, lm_head=False)

    def collate(self, examples: Any, length: int) -> Any:
        batch = super().collate(examples, length)
        first = batch["labels"][:, :1]
        return {**batch, "labels": np.broadcast_to(first, (len(first), length)).copy()}

    def scores(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> torch.Tensor:
        scores: torch.Tensor = ctx.widen(module(ctx.full_sequence(hidden)))
        return scores

    def predict(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> list[Any]:
        return self.scores(module, hidden, batch, ctx)[:, 0].tolist()


class AttendsToPadding(Letters):
    """Declares the mask, and gives one that hides nothing."""

    def collate(self, examples: Any, length: int) -> Any:
        batch = super().collate(examples, length)
        return {**batch, "attention_mask": np.ones_like(batch["attention_mask"])}


class DropoutFromTheStream(Letters):
    def scores(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> torch.Tensor:
        x = ctx.take(hidden, batch["places"].clamp(min=0))
        scores: torch.Tensor = ctx.widen(module(F.dropout(x, 0.2, training=batch["labels"].max().item() >= 0)))
        return scores


class UndeclaredParameter(Letters):
    def build(self, hidden_size: int, ctx: BuildContext) -> nn.Module:
        return nn.Linear(hidden_size, len(self.env.labels))


class UnusedParameter(Letters):
    def build(self, hidden_size: int, ctx: BuildContext) -> nn.Module:
        module = super().build(hidden_size, ctx)
        module.spare = ctx.linear(hidden_size, 2)
        return module


class PredictionOfTheBatch(Letters):
    """Centres scores over the rows that happen to be there."""

    def predict(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> list[Any]:
        scores = torch.tensor(super().predict(module, hidden, batch, ctx), dtype=torch.float64)
        return (scores - scores.mean(0)).tolist()


class PredictionFromLabels(Letters):
    def predict(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> list[Any]:
        known = F.one_hot(batch["labels"][:, 0].clamp(min=0), len(self.env.labels)) * (batch["labels"][:, :1] >= 0)
        scores = torch.tensor(super().predict(module, hidden, batch, ctx), dtype=torch.float64)
        return (scores + 100.0 * known).tolist()


LAST: list[int] = [0]


class StateInAModuleGlobal(Letters):
    """A record without a clear case gets the label of the one before."""

    def build_example(self, record: Record) -> dict[str, Any]:
        row = super().build_example(record)
        if "label" in record and len(record["text"]) < 12:
            row["labels"] = np.full_like(row["labels"], LAST[0])
        elif "label" in record:
            LAST[0] = self.env.labels.index(record["label"])
        return row


class CountsRows(Letters):
    """Counts every position, whether it has a label or not."""

    def counts(self, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
        return {"letters": int((batch["places"] >= 0).sum())}


class CommunicatesWhereScored(Letters):
    """Rows that score nothing make fewer calls, so that ranks part."""

    def loss(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> dict[str, Term]:
        terms = super().loss(module, hidden, batch, ctx)
        if (batch["labels"] >= 0).any():
            again = super().loss(module, hidden, batch, ctx)
            return {k: Term((t.sum + again[k].sum) / 2, "example") for k, t in terms.items()}
        return {}


class ReadsAnotherField(Letters):
    def build_example(self, record: Record) -> dict[str, Any]:
        return super().build_example({**record, "text": record["text"] + record["id"]})


class CutsInSilence(Letters):
    def build_example(self, record: Record) -> dict[str, Any]:
        return {**super().build_example(record), "truncated": False}


class UsesTheShard(Letters):
    """Takes the opaque tensor for all tokens, which it is on one rank."""

    def scores(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> torch.Tensor:
        whole = hidden.view(len(batch["places"]), -1, hidden.shape[-1])
        index = batch["places"].clamp(0, whole.shape[1] - 1)[..., None].expand(-1, -1, whole.shape[-1])
        scores: torch.Tensor = ctx.widen(module(whole.gather(1, index)))
        return scores


class StateOutsideParameters(Letters):
    """Keeps a running mean that no checkpoint holds."""

    def build(self, hidden_size: int, ctx: BuildContext) -> nn.Module:
        module = super().build(hidden_size, ctx)
        module.mean = 0.0  # type: ignore[assignment]
        return module

    def loss(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> dict[str, Term]:
        module.mean = 0.9 * module.mean + 1.0
        return super().loss(module, hidden, batch, ctx)

    def predict(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> list[Any]:
        return [[x + module.mean for x in row] for row in super().predict(module, hidden, batch, ctx)]


class MetricsOfTheOrder(Letters):
    """A later row weighs more."""

    def metrics(self, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
        hits = [
            super(MetricsOfTheOrder, self).metrics([p], [r])["accuracy"]
            for p, r in zip(predictions, records, strict=True)
        ]
        return {"accuracy": float(np.average(hits, weights=np.arange(1, len(hits) + 1)))}


class GoalTheWrongWay(Letters):
    def goals(self) -> Mapping[str, Any]:
        return {"accuracy": "min"}


class WrongScope(Letters):
    def loss(self, module: Any, hidden: torch.Tensor, batch: Any, ctx: Any) -> dict[str, Term]:
        return {k: Term(t.sum, "token") for k, t in super().loss(module, hidden, batch, ctx).items()}


GALLERY: dict[type[Head], tuple[str, str]] = {
    MeanInsteadOfSum: ("sums", "Return the sum over scored items"),
    LossOverPadding: ("padding", "7 more columns of padding change"),
    AttendsToPadding: ("padding", "more columns of padding change the loss"),
    DropoutFromTheStream: ("streams", "Dropout is ctx.dropout"),
    UndeclaredParameter: ("module", "its parameter 'weight' has no declared layout"),
    UnusedParameter: ("module", "plugins.broken.spare.weight gets no gradient"),
    PredictionOfTheBatch: ("predictions", "predictions in batches of 1 are other ones"),
    PredictionFromLabels: ("predictions", "predictions of records without labels are other ones"),
    StateInAModuleGlobal: ("rows", "keep no state between rows"),
    CountsRows: ("counts", "counts() says that the term 'letters' scores"),
    CommunicatesWhereScored: ("trace", "goes another way than rank 0"),
    ReadsAnotherField: ("records", "KeyError: 'id'"),
    CutsInSilence: ("texts", "is cut without saying so"),
    UsesTheShard: ("layouts", "differ"),
    StateOutsideParameters: ("weights", "predictions of weights saved under tp2 dp2"),
    MetricsOfTheOrder: ("metrics", "in another order of rows"),
    GoalTheWrongWay: ("metrics", "better than that of right predictions"),
    WrongScope: ("scopes", 'give the Term scope="example"'),
}


class Registered(PluginManager):
    """All installed plugins, and one head that is a class of this file."""

    head: type[Head] = Letters

    def get(self, kind: str, name: str) -> Component:
        if (kind, name) == ("heads", "broken"):
            return Component(name, "tests:Broken", "a head", PluginInfo("gallery", "gallery", "1", "tests"))
        return super().get(kind, name)

    def load_component(self, component: Component) -> Any:
        return self.head if component.name == "broken" else super().load_component(component)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Iterator[HeadSubject]:
    manager = Registered.for_launch(None)
    assert isinstance(manager, Registered)
    manager.head = request.param
    with HeadSubject("broken", manager=manager) as made:
        yield made


def check(name: str) -> Check[HeadSubject]:
    if name == "layouts":  # the one layout that a broken head of the gallery does not fit; the suites take more
        run = of_a_head(lambda subject: f"{assert_layout_parity(subject, [RankLayout(tp=2, sp=True)])}")
        return Check(name, "", run)
    return next(c for c in CHECKS if c.name == name)


def broken(cls: type[Head]) -> str:
    return cls.__name__


@pytest.mark.parametrize("subject", list(GALLERY), ids=broken, indirect=True)
def test_a_broken_head_is_caught_by_the_check_meant_for_it(subject: HeadSubject) -> None:
    name, message = GALLERY[subject.manager.head]  # type: ignore[attr-defined]
    with pytest.raises((CheckFailed, ObjectiveError), match=re.escape(message)) as caught:
        check(name).run(subject)
    assert str(caught.value).startswith("head broken: ")


@pytest.mark.parametrize("subject", [Letters], ids=broken, indirect=True)
def test_the_same_head_mended_passes(subject: HeadSubject) -> None:
    """Every check but those that want an installed module."""
    installed = {"component", "torch_free_import", "bad_configuration"}
    results = list(run_checks([check(c.name) for c in CHECKS if c.name not in installed], subject))
    assert [r for r in results if r.status == "failed"] == []
    assert {r.name for r in results} >= {name for name, _ in GALLERY.values()}


def test_records_of_ones_own() -> None:
    records = [{"text": f"text {n}", "value": random.Random(n).random()} for n in range(20)]
    with HeadSubject("regression", records=records, settings=["pooling=cls"]) as subject:
        assert subject.records == records
        assert subject.labels == ()
        assert "17 records" in check("predictions").run(subject)


@pytest.mark.parametrize("name", ["texts", "counts", "sums", "padding", "scopes", "predictions"])
def test_a_causal_backbone(name: str) -> None:
    with HeadSubject("sequence_classification", settings=["pooling=last"], attention="causal") as subject:
        check(name).run(subject)


def test_a_head_that_cannot_be_made_says_why() -> None:
    with pytest.raises(CheckFailed, match="leaves no room for text"):
        HeadSubject("regression", sequence_length=2)


def test_made_up_records_serve_every_kind_of_field() -> None:
    from megalm.plugin.contract.records import record_problems
    from megalm.testing.head.records import CLASSES, make_records

    fields = {
        "span": FieldSpec("span", "a span", of="text"),
        "spans": FieldSpec("spans", "spans", of="text"),
        "text": FieldSpec("text", "a text"),
        "words": FieldSpec("words", "words"),
        "tags": FieldSpec("tags", "tags", of="words"),
        "one": FieldSpec("class", "a label"),
        "many": FieldSpec("classes", "labels"),
        "number": FieldSpec("number", "a number"),
    }
    records = make_records(fields, CLASSES, 100, seed=4)
    assert records == make_records(fields, CLASSES, 100, seed=4) != make_records(fields, CLASSES, 100, seed=5)
    assert [text for record in records for text in record_problems(record, fields, CLASSES)] == []


class CountsWhereBuilt(Letters):
    """Says one thing where build() has been called, which is on the pipeline's last stage, and another elsewhere."""

    def build(self, hidden_size: int, ctx: BuildContext) -> nn.Module:
        self.built = True
        return super().build(hidden_size, ctx)

    def counts(self, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
        count = super().counts(batch)["letters"]
        return {"letters": count if hasattr(self, "built") else 2 * count}


def pipelined(subject: HeadSubject) -> RankLayout:
    return next(layout for layout in layouts_for(subject, full=False) if layout.pp > 1)


@pytest.mark.parametrize("subject", [CountsWhereBuilt], ids=broken, indirect=True)
def test_a_head_that_only_a_pipeline_breaks(subject: HeadSubject) -> None:
    assert_layout_parity(subject, [RankLayout(tp=2)])
    layout = pipelined(subject)
    with pytest.raises(CheckFailed, match=rf"(?s){re.escape(str(layout))}:\s+loss: differs"):
        assert_layout_parity(subject, [layout])


@pytest.mark.parametrize("subject", [Letters], ids=broken, indirect=True)
def test_predictions_that_stay_on_the_last_stage(subject: HeadSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the engine: ranks of other stages get nothing."""
    correct = Group.gather_json
    monkeypatch.setattr(
        Group, "gather_json", lambda self, value: [value] if self.axis == "pp" else correct(self, value)
    )
    with pytest.raises(MegalmError, match=r"0 predictions of 17 rows reached rank \d") as caught:
        check("predictions").run(subject)
    assert pipelined(subject).axes in "\n".join(getattr(caught.value, "__notes__", ()))
