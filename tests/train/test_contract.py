"""An objective that breaks its contract is named, with the tensor or the term, instead of failing somewhere below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megalm.errors import ObjectiveError
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import PreparedBatch, Prepares, Term
from megalm.testing.parity import loss_and_gradients
from megalm.train.prepare import Prepared

Prepare = Callable[..., Prepared]


def step(prepared: Prepared) -> dict[str, torch.Tensor]:
    return loss_and_gradients(prepared, single_rank())


def part_of(prepared: Prepared) -> Any:
    (part,) = prepared.objective.parts.values()
    return type(part)


COLLATE: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "a token outside the vocabulary": (lambda b: {**b, "tokens": b["tokens"] + 300}, "'tokens' holds ids from"),
    "a label outside the vocabulary": (lambda b: {**b, "labels": b["labels"] + 300}, "'labels' holds ids from"),
    "another type": (lambda b: {**b, "labels": b["labels"].astype(np.int32)}, "'labels' is int32"),
    "another shape": (lambda b: {**b, "labels": b["labels"][:, :-1]}, "'labels' is int64"),
    "an undeclared tensor": (lambda b: {**b, "more": b["labels"]}, "gives labels, more, tokens"),
    "a missing tensor": (lambda b: {"tokens": b["tokens"]}, "declares labels, tokens"),
}


@pytest.mark.parametrize("way", ["collate", "build_batch"])
@pytest.mark.parametrize("fault", COLLATE)
def test_rows(fault: str, way: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare()
    change, message = COLLATE[fault]
    cls = part_of(prepared)
    correct = getattr(cls, way)
    monkeypatch.setattr(cls, way, lambda self, *given: change(correct(self, *given)))
    monkeypatch.setattr(prepared.objective, "builds_batches", way == "build_batch")
    with pytest.raises(ObjectiveError, match=message):
        step(prepared)


LOSS: dict[str, tuple[Callable[[dict[str, Term]], Any], str]] = {
    "an unknown term": (lambda terms: {**terms, "more": terms["causal_lm"]}, "'more', which weights"),
    "a missing term": (lambda terms: {}, "'causal_lm' scores 128 items"),
    "not a sum": (lambda terms: {"causal_lm": Term(terms["causal_lm"].sum[None])}, r"has shape \[1\]"),
}


@pytest.mark.parametrize("fault", LOSS)
def test_loss(fault: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare()
    change, message = LOSS[fault]
    cls = part_of(prepared)
    correct = cls.loss
    monkeypatch.setattr(cls, "loss", lambda self, *arguments: change(correct(self, *arguments)))
    with pytest.raises(ObjectiveError, match=message):
        step(prepared)


PREPARE: dict[str, tuple[Callable[[PreparedBatch], PreparedBatch], str]] = {
    "an undeclared tensor": (lambda p: _with(p, labels=p.tensors["tokens"]), r"tensors \[labels, replaced, tokens\]"),
    "a missing tensor": (lambda p: PreparedBatch({"tokens": p.tensors["tokens"]}, p.terms), r"the tensors \[tokens\]"),
    "an undeclared term": (
        lambda p: PreparedBatch(p.tensors, {**p.terms, "rtd": p.terms["rtd_generator"]}),
        r"the terms \[rtd, rtd_generator\]",
    ),
    "a missing term": (lambda p: PreparedBatch(p.tensors), "prepare.. gives no such term"),
    "another type": (lambda p: _with(p, tokens=p.tensors["tokens"].int()), "'tokens' torch.int32"),
    "another shape": (lambda p: _with(p, replaced=p.tensors["replaced"][:, :-1]), r"'replaced' torch.int64\[8, 15\]"),
    "not a sum": (
        lambda p: PreparedBatch(p.tensors, {"rtd_generator": Term(p.terms["rtd_generator"].sum[None])}),
        r"has shape \[1\]",
    ),
}


def _with(prepared: PreparedBatch, **tensors: torch.Tensor) -> PreparedBatch:
    return PreparedBatch({**prepared.tensors, **tensors}, prepared.terms)


@pytest.mark.parametrize("fault", PREPARE)
def test_prepare(fault: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare("rtd", "objective.rtd.generator_width=0.5")
    change, message = PREPARE[fault]
    cls = part_of(prepared)
    correct = cls.prepare
    monkeypatch.setattr(cls, "prepare", lambda self, *arguments: change(correct(self, *arguments)))
    with pytest.raises(ObjectiveError, match=message):
        step(prepared)


NEEDS: dict[str, tuple[Prepares, str]] = {
    "a tensor that is none": (Prepares(("tokens", "more"), ("rtd_generator",)), "'more' that needs"),
    "a term that is none": (Prepares(("tokens",), ("more",)), "'more' that weights"),
}


@pytest.mark.parametrize("fault", NEEDS)
def test_what_is_prepared_is_declared(fault: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = part_of(prepare("rtd", "objective.rtd.generator_width=0.5"))
    said, message = NEEDS[fault]
    correct = cls.needs
    monkeypatch.setattr(cls, "needs", lambda self: replace(correct(self), prepares=said))
    with pytest.raises(ObjectiveError, match=message):
        prepare("rtd", "objective.rtd.generator_width=0.5")


def test_loss_leaves_what_is_prepared(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare("rtd", "objective.rtd.generator_width=0.5")
    cls = part_of(prepared)
    correct = cls.loss

    def loss(self: Any, *arguments: Any) -> dict[str, Term]:
        terms = correct(self, *arguments)
        return {**terms, "rtd_generator": terms["rtd"]}

    monkeypatch.setattr(cls, "loss", loss)
    with pytest.raises(ObjectiveError, match=r"'rtd_generator', which needs\(\) says that prepare"):
        step(prepared)


def test_loss_sees_only_what_the_last_stage_has(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare("mlm+nsp")
    seen: set[str] = set()
    for part in prepared.objective.parts.values():
        correct = type(part).loss

        def loss(self: Any, hidden: Any, batch: Any, ctx: Any, correct: Any = correct) -> Any:
            seen.update(batch)
            return correct(self, hidden, batch, ctx)

        monkeypatch.setattr(type(part), "loss", loss)
    step(prepared)
    assert seen == {"labels", "next_label", "attention_mask"}


@pytest.mark.parametrize("left_out", [True, False])
def test_a_microbatch_with_nothing_to_score(
    left_out: bool, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A term that scores nothing may be a constant, or be left out."""
    prepared = prepare("mlm", "objective.mlm.mask_prob=1e-9")
    if left_out:
        monkeypatch.setattr(part_of(prepared), "loss", lambda *_: {})
    else:
        monkeypatch.setattr(part_of(prepared), "loss", lambda *_: {"mlm": Term(torch.zeros(()))})
    found = step(prepared)
    assert found["loss"] == 0
    assert found["grad_norm"] == 0
