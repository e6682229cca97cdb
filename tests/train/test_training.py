"""The loop's parts on real ranks: evaluation, generation, what happens when training breaks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import megalm.train.trainer as trainer_module
from megalm.errors import ConfigError
from megalm.model.language_model import LanguageModel
from megalm.nn.module import materialise
from megalm.optim.weights import Weights
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.testing.processes import run_processes
from megalm.train.feed import evaluation_rows
from megalm.train.generate import sample_text
from megalm.train.prepare import Prepared
from megalm.train.step import evaluate
from megalm.train.trainer import Trainer, TrainingError

pytestmark = pytest.mark.dist


def build(prepared: Prepared, parallel: ParallelContext) -> LanguageModel:
    model = LanguageModel(prepared.spec, parallel)
    materialise(model, parallel, 7, torch.float64)
    return model


@pytest.mark.parametrize("objective", ["causal_lm", "mlm+nsp"])
def test_evaluation_is_the_same_under_every_layout(prepare: Any, objective: str) -> None:
    prepared = prepare(objective, "model.dropout=0.3")

    def losses(parallel: ParallelContext, micro_batch: int, samples: int) -> dict[str, torch.Tensor]:
        rows = evaluation_rows(
            prepared.objective,
            prepared.validation,
            seed=7,
            samples=samples,
            micro_batch=micro_batch,
            dp_index=parallel.dp.index,
            dp_size=parallel.dp.size,
        )
        found = evaluate(build(prepared, parallel), prepared.objective, rows)
        values = {"loss": found.total, **found.terms}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    # 13 and 1 do not divide evenly: the last microbatch is short, and some ranks have none.
    for samples in (13, 1, 10**6):
        expected = losses(single_rank(), 4, samples)
        assert all(value.isfinite() for value in expected.values())
        found = [losses(single_rank(), micro_batch, samples) for micro_batch in (1, 8)]
        for layout in ({"dp": 2}, {"tp": 2, "sp": True}, {"dp": 3}):
            found += run_processes(lambda parallel, n=samples: losses(parallel, 3, n), **layout)  # type: ignore[misc]
        for each in found:
            for name, value in expected.items():
                torch.testing.assert_close(each[name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("settings", [(0.0, 0), (1.0, 0), (0.8, 5)], ids=str)
def test_generation_is_the_same_under_every_layout(prepare: Any, settings: tuple[float, int]) -> None:
    prepared = prepare("causal_lm")
    temperature, top_k = settings

    def generate(parallel: ParallelContext, seed: int = 7) -> torch.Tensor:
        text = sample_text(
            build(prepared, parallel),
            prepared.tokenizer,
            prompt="Abc",
            tokens=20,
            context=16,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        return torch.tensor([ord(character) for character in text])

    expected = generate(single_rank())
    assert bytes(expected[:3].tolist()) == b"Abc"
    assert torch.equal(generate(single_rank()), expected)
    assert torch.equal(generate(single_rank(), 8), expected) == (temperature == 0)
    for layout in ({"tp": 2}, {"tp": 2, "sp": True}, {"tp": 3}):
        for found in run_processes(lambda parallel: {"text": generate(parallel)}, **layout):
            assert torch.equal(found["text"], expected)


def test_a_gradient_that_is_not_a_number_is_named(
    prepare: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare("causal_lm")
    finish = trainer_module.finish_gradients

    def poisoned(weights: Weights) -> None:
        finish(weights)
        (piece,) = (p for p in weights.gradient_pieces() if p.name == "backbone.layers.1.mlp.down.weight")
        piece.local[3, 4] = math.nan

    monkeypatch.setattr(trainer_module, "finish_gradients", poisoned)
    with pytest.raises(TrainingError, match=r"step 1: .* backbone\.layers\.1\.mlp\.down\.weight on rank 0"):
        Trainer(prepared, single_rank()).run()
    assert not (prepared.run_dir / "summary.json").exists()
    assert not list((prepared.run_dir / "checkpoints").glob("*"))


def test_diverged_weights_end_the_run(prepare: Any) -> None:
    trainer = Trainer(prepare("causal_lm"), single_rank())
    with torch.no_grad():
        trainer.weights.masters["backbone.embedding.tokens.weight"].fill_(math.inf)
    with pytest.raises(TrainingError, match="step 1: loss is nan"):
        trainer.run()


def test_steps_and_learning_rate_are_recorded(prepare: Any) -> None:
    prepared = prepare("mlm+nsp", "lr_schedule.cosine.warmup_steps=2", "train.clip_grad=0.5", "eval.every=2")
    Trainer(prepared, single_rank()).run()
    records = [json.loads(line) for line in (prepared.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["step"] for record in records if "eval" in record] == [2, 4]
    for record in steps:
        assert set(record["terms"]) == {"mlm", "nsp"}
        assert record["loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-12)
        assert record["lr"] == prepared.schedule.at(record["step"] - 1)
        assert record["tokens"] == record["step"] * 8 * 16
        assert record["grad_norm"] > 0
    summary = json.loads((prepared.run_dir / "summary.json").read_text())
    assert summary["train_loss"] == steps[-1]["loss"]
    assert summary["eval_loss"] == records[-1]["eval"]["loss"]


def test_tensorboard_events(prepare: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    prepared = prepare("causal_lm", 'log.callbacks=["tensorboard"]')
    Trainer(prepared, single_rank()).run()
    (path,) = Path(prepared.run_dir / "tensorboard").iterdir()
    found = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            found[event.step, value.tag] = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
    records = [json.loads(line) for line in (prepared.run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if "loss" in record:
            assert found[record["step"], "train/loss"] == pytest.approx(record["loss"], rel=1e-6)
        else:
            assert found[record["step"], "eval/loss"] == pytest.approx(record["eval"]["loss"], rel=1e-6)


def test_a_model_that_diverges_in_its_last_step_is_no_finished_run(prepare: Any) -> None:
    prepared = prepare("causal_lm", "train.steps=1", "train.lr=1e300", "sample.tokens=0")
    with pytest.raises(TrainingError, match=r"evaluation after step 1: loss is (nan|inf)"):
        Trainer(prepared, single_rank()).run()
    assert not (prepared.run_dir / "summary.json").exists()


def test_baselines_are_for_next_token_losses(prepare: Any) -> None:
    with pytest.raises(ConfigError, match="next-token models"):
        prepare("mlm", "eval.baselines=true")
