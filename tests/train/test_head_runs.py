"""Runs of heads: records, labels and tokenizer, metrics, the best checkpoint, and its later use."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.config.load import load_config
from megalm.errors import CheckpointError, ConfigError, DataError, UsageError
from megalm.metrics import jsonl
from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.parallel.sim import run_simulated
from megalm.plugin.manager import PluginManager
from megalm.train.head import predict
from megalm.train.prepare import Prepared, prepare_run
from megalm.train.stored import find_checkpoint, open_stored
from megalm.train.trainer import Trainer

RUN = """
[run]
dir = "{folder}/tuned"
seed = 7
[model]
architecture = "bert"
layers = 2
hidden_size = 24
heads = 6
init_std = 0.3
[data.records]
train = ["{folder}/train.tsv"]
[train]
head = "sequence_classification"
steps = 30
sequence_length = 16
global_batch = 8
micro_batch = 4
lr = 1e-2
precision = "float32"
[head.sequence_classification]
pooling = "mean"
metrics = ["accuracy"]
[finetune]
method = "full"
[eval]
every = 10
[checkpoint]
load = "{folder}/base"
keep = 1
[launch]
threads = 1
device = "cpu"
"""
Tune = Callable[..., Prepared]


@pytest.fixture
def tune(tmp_path: Path, prepare: Any, manager: PluginManager) -> Tune:
    """``tune(*overrides)``: a prepared run of a head on a checkpoint, to tell texts with more a than b from others."""
    common = ["train.precision=float32", "train.steps=1", "sample.tokens=0", f"run.dir={tmp_path / 'base'}"]
    Trainer(prepare("mlm", *common), single_rank()).run()
    draw = rng.generator("head run")
    texts = ["".join(draw.choice(list("ab"), size=9)) for _ in range(200)]
    rows = [f"{text}\t{'more' if text.count('a') > 4 else 'fewer'}\n" for text in texts]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "".join(rows))
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path))

    def make(*overrides: str, world_size: int = 1) -> Prepared:
        return prepare_run(load_config(tmp_path / "run.toml", overrides, manager), manager, world_size, "cpu")

    return make


def test_a_head_is_trained_measured_and_used(tune: Tune, manager: PluginManager) -> None:
    prepared = tune()
    assert prepared.task is not None
    assert prepared.task.head.env.labels == ("fewer", "more")
    assert (len(prepared.task.train), len(prepared.task.validation)) == (180, 20)
    Trainer(prepared, single_rank()).run()
    recorded = {r["step"]: r["eval"] for r in jsonl.read(prepared.run_dir / "metrics.jsonl") if "eval" in r}
    assert list(recorded) == [10, 20, 30]
    accuracy = {step: each["metrics"]["accuracy"] for step, each in recorded.items()}
    best = max(accuracy, key=lambda step: accuracy[step])
    assert accuracy[best] > 0.8
    summary = json.loads((prepared.run_dir / "summary.json").read_text())
    assert summary["best"] == {"step": best, "metric": "metrics.accuracy", "value": accuracy[best]}
    assert summary["eval_metrics"] == recorded[30]["metrics"]
    stored = open_stored(find_checkpoint(prepared.run_dir / "checkpoints" / "best")[0], manager, required=True)
    assert stored.tokenizer.identity == prepared.tokenizer.identity
    name, head, records = prepared.task.name, prepared.task.head, prepared.task.validation
    found = predict(stored.model(single_rank(), "float32"), name, head, records.rows, micro_batch=4)
    assert head.metrics(found, records.rows)["accuracy"] == pytest.approx(accuracy[best])


def test_some_records_of_a_sorted_file_have_all_labels(tune: Tune, tmp_path: Path) -> None:
    header, *rows = (tmp_path / "train.tsv").read_text().splitlines(keepends=True)
    rows.sort(key=lambda row: row.split("\t")[1])
    (tmp_path / "sorted.tsv").write_text(header + "".join(rows))
    overrides = (f'data.records.validation=["{tmp_path}/sorted.tsv"]', "eval.samples=40")
    tasks = [tune(*overrides).task for _ in range(2)]
    assert tasks[0] is not None
    assert tasks[1] is not None
    assert tasks[0].validation.rows == tasks[1].validation.rows
    assert len(set(tasks[0].validation.places)) == 200
    share = sum(row["label"] == "more" for row in tasks[0].validation.rows[:40]) / 40
    assert share == pytest.approx(sum("more" in row for row in rows) / 200, abs=0.2)


@pytest.mark.parametrize("layout", [{"tp": 2, "sp": True}, {"pp": 2}, {"dp": 2}], ids=str)
def test_layouts_measure_the_same(tune: Tune, tmp_path: Path, layout: dict[str, Any]) -> None:
    more = ["train.steps=4", "eval.every=2", "finetune.method=lora", "finetune.lora_targets=['q','v','up']"]
    Trainer(tune(*more), single_rank()).run()
    axes = [f"parallel.{axis}={json.dumps(size)}" for axis, size in layout.items() if axis != "dp"]
    prepared = tune(*more, *axes, f"run.dir={tmp_path / 'divided'}", world_size=2)
    run_simulated(lambda parallel: Trainer(prepared, parallel).run(), **layout)
    one, other = (
        [r["eval"] for r in jsonl.read(tmp_path / name / "metrics.jsonl") if "eval" in r]
        for name in ("tuned", "divided")
    )
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["metrics"] == pytest.approx(b["metrics"], abs=0.06), "20 records: one may stand on the border"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["finetune.method=none"], ConfigError, r"is fine-tuning; give finetune\.method"),
        (["train.objective=mlm"], ConfigError, r"leave train\.objective or train\.head out"),
        (["data.path=x"], ConfigError, r"a store and data\.records exclude each other"),
        (["data.records.columns={txt='a'}"], DataError, r"'txt', which the head does not read"),
        (["data.records.validation=['nowhere.tsv']"], UsageError, r"nowhere\.tsv"),
        (["finetune.metric=metrics.acc"], ConfigError, r"no metrics\.acc, but .*metrics\.accuracy"),
        (["checkpoint.load=nowhere"], CheckpointError, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_the_start(
    tune: Tune, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tune(*overrides)


def test_a_library_that_measures_need_is_missed_before_the_start(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    metrics = "head.sequence_classification.metrics=['f1_macro']"
    for every in (10, 0):  # a run evaluates after its last step all the same
        with pytest.raises(DataError, match=r"f1_macro.*megalm\[eval\]"):
            tune(metrics, f"eval.every={every}")


def test_labels_that_training_never_saw_are_refused(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("text\tlabel\nabab\tmore\nabba\tequal\n")
    with pytest.raises(DataError, match=r"test\.tsv: line 3: .*equal"):
        tune(f"data.records.validation=['{tmp_path / 'test.tsv'}']")


def test_a_head_of_other_labels_does_not_fit(tune: Tune, tmp_path: Path) -> None:
    Trainer(tune("train.steps=1", "eval.every=0"), single_rank()).run()
    (tmp_path / "three.tsv").write_text("text\tlabel\n" + "ab\tone\nba\ttwo\naa\tthree\n" * 9)
    prepared = tune(
        f"data.records.train=['{tmp_path / 'three.tsv'}']",
        f"checkpoint.load={tmp_path / 'tuned'}",
        f"run.dir={tmp_path / 'again'}",
    )
    with pytest.raises(CheckpointError, match=r"plugins\.sequence_classification.*shape \[2.*but this model's is \[3"):
        Trainer(prepared, single_rank()).run()
