"""A run computes with the kernels that were chosen for it, says which, and notices when they change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.launch import _disagreements
from megalm.ops import choose
from megalm.ops.native.library import Absent, Library, library
from megalm.parallel.mesh import single_rank
from megalm.train.prepare import Prepared
from megalm.train.trainer import Trainer


def _losses(prepared: Prepared) -> list[float]:
    Trainer(prepared, single_rank()).run()
    lines = (prepared.run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def _summary(prepared: Prepared) -> dict[str, object]:
    found: dict[str, object] = json.loads((prepared.run_dir / "summary.json").read_text())
    return found


@pytest.mark.skipif(isinstance(library(), Absent), reason="the kernels are not built here")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_native_kernels_train_as_the_references_do(
    prepare: Callable[..., Prepared], tmp_path: Path, architecture: str
) -> None:
    objective = "mlm" if architecture == "bert" else "causal_lm"
    losses, weights = {}, set()
    for name in ("cpu", "reference"):
        prepared = prepare(
            objective,
            *("model.dropout=0.1", "model.attention_dropout=0.1", "train.precision=float32"),
            f"run.dir={tmp_path / name}",
            *(f"kernels.{operation}={name}" for operation in choose.OPERATIONS),
            architecture=architecture,
        )
        assert {decision.implementation for decision in prepared.kernels} == {name}
        losses[name] = _losses(prepared)
        weights.add(_summary(prepared)["weights_sha256"])
        kernels = _summary(prepared)["kernels"]
        assert isinstance(kernels, dict)
        assert {found["implementation"] for found in kernels.values()} == {name}
        loaded = library()
        assert isinstance(loaded, Library)
        sources = loaded.record["sources"] if name == "cpu" else None
        assert {found.get("sources") for found in kernels.values()} == {sources}
        report = (prepared.run_dir / "report.html").read_text()
        assert "Kernels" in report
        assert ("built from" in report) == (name == "cpu")
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=1e-4)
    assert len(weights) == 2, "the same bits: one of them did not compute"


@pytest.mark.skipif(isinstance(library(), Absent), reason="the kernels are not built here")
def test_ranks_agree_on_what_their_kernels_were_built_from(
    prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts may keep libraries of different sources under one name."""
    settings = ("train.precision=float32", "kernels.layer_norm=cpu")
    mine = prepare("causal_lm", *settings).facts()
    assert _disagreements([mine, prepare("causal_lm", *settings).facts()]) == []
    found = library()
    assert isinstance(found, Library)
    other = replace(found, record={**found.record, "sources": "0" * 64})
    monkeypatch.setattr(choose, "library", lambda: other)
    _, line = _disagreements([mine, prepare("causal_lm", *settings).facts()])
    assert line == f'  kernels: sources: "{found.record["sources"]}" -> "{"0" * 64}"'


def test_a_change_on_resume_is_said(
    prepare: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.precision=float32", f"run.dir={tmp_path / 'run'}", "checkpoint.every=2")
    first = prepare("causal_lm", *settings, "kernels.layer_norm=reference", "train.steps=2")
    _losses(first)
    changed = ("kernels.layer_norm=torch", "train.steps=4", "run.allow_changed_config=true")
    again = prepare("causal_lm", *settings, *changed)
    _losses(again)
    (warning,) = _summary(again)["warnings"]  # type: ignore[misc]
    assert "layer_norm was computed by reference" in warning
    assert 'kernels.layer_norm = "reference" keeps it' in warning


def test_float64_needs_no_library(prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Absent:
        raise AssertionError("loaded")

    monkeypatch.setattr(choose, "library", refuse)
    assert prepare("causal_lm").kernels[0].implementation in ("torch", "reference")
