"""Records of like length in one step: every sample once an epoch, the same steps for every layout, little padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.load import load_config
from megalm.metrics import jsonl
from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.parallel.sim import run_simulated
from megalm.plugin.manager import PluginManager
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.train.feed import TrainFeed
from megalm.train.head import row_unit
from megalm.train.prepare import Prepared, prepare_run
from megalm.train.streamed import train_samples
from megalm.train.trainer import Trainer

COUNT, ROWS, WINDOW, LONGEST = 90, 6, 5, 48
PAD = 256
"""The byte tokenizer's."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of very unequal lengths."""
    draw = rng.generator("grouped")
    rows = [f"{''.join(draw.choice(list('ab'), size=int(draw.integers(1, 40))))}\tx{n % 3}\n" for n in range(COUNT)]
    path = tmp_path_factory.mktemp("records") / "train.tsv"
    path.write_text("text\tlabel\n" + "".join(rows))
    return path


@pytest.fixture
def tune(tmp_path: Path, prepare: Any, manager: PluginManager, tokens: Path) -> Any:
    base = ["train.precision=float64", "train.steps=1", "sample.tokens=0", f"run.dir={tmp_path / 'base'}"]
    base.append(f"model.max_positions={LONGEST}")
    Trainer(prepare("mlm", *base), single_rank()).run()
    text = f"""
    [run]
    dir = "{tmp_path}/tuned"
    seed = 7
    [model]
    architecture = "bert"
    layers = 2
    hidden_size = 24
    heads = 6
    init_std = 0.3
    max_positions = {LONGEST}
    attention_dropout = 0.1
    [data.records]
    train = ["{tokens}"]
    validation = ["{tokens}"]
    length_window = {WINDOW}
    [train]
    head = "sequence_classification"
    steps = 4
    sequence_length = {LONGEST}
    global_batch = {ROWS}
    micro_batch = {ROWS}
    lr = 1e-2
    precision = "float64"
    [finetune]
    method = "full"
    [checkpoint]
    load = "{tmp_path}/base"
    every = 1
    [launch]
    threads = 1
    device = "cpu"
    """
    (tmp_path / "run.toml").write_text(text)

    def make(*overrides: str, world_size: int = 1) -> Prepared:
        return prepare_run(load_config(tmp_path / "run.toml", overrides, manager), manager, world_size, "cpu")

    return make


def feed_of(prepared: Prepared, micro_batch: int, dp_index: int = 0, dp_size: int = 1, workers: int = 0) -> TrainFeed:
    samples = train_samples(prepared, single_rank())
    shape: dict[str, Any] = {"global_batch": ROWS, "micro_batch": micro_batch}
    return TrainFeed(
        prepared.objective, samples, seed=7, **shape, dp_index=dp_index, dp_size=dp_size, workers=workers
    )


def rows_of(feed: TrainFeed, step: int) -> list[tuple[int, ...]]:
    """Each slot's tokens with its padding."""
    found: dict[int, tuple[int, ...]] = {}
    for rows in feed.step(step):
        found |= dict(zip(rows.slots, map(tuple, rows.batch["tokens"].tolist()), strict=True))
    return [found[slot] for slot in sorted(found)]


def test_every_record_once_an_epoch_among_those_of_like_length(tune: Any) -> None:
    feed = feed_of(tune(), ROWS)
    epochs = [[rows_of(feed, step) for step in range(n * COUNT // ROWS, (n + 1) * COUNT // ROWS)] for n in (0, 1)]
    seen = [sorted(tuple(t for t in row if t != PAD) for step in epoch for row in step) for epoch in epochs]
    assert len(seen[0]) == COUNT
    assert seen[0] == seen[1], "an epoch is three windows here"
    assert epochs[0] != epochs[1]
    lengths = [[len(row) for row in step] for step in epochs[0]]
    longest = [max(sum(t != PAD for t in row) for row in step) for step in epochs[0]]
    assert lengths == [[size] * ROWS for size in longest], "one length a step, its longest row's"
    assert len({step[0] for step in lengths}) > 2
    padded = sum(sum(step) for step in lengths)
    assert padded < 0.75 * COUNT * max(step[0] for step in lengths)
    assert feed.tokens(len(lengths)) == padded
    assert feed.tokens(3) == sum(sum(step) for step in lengths[:3])


def test_steps_are_the_same_for_every_layout_and_wherever_one_begins(tune: Any) -> None:
    prepared = tune()
    expected = [rows_of(feed_of(prepared, ROWS), step) for step in range(12)]
    for micro_batch, dp_size, workers in ((1, 1, 0), (1, 3, 2), (3, 2, 1)):
        feeds = [feed_of(prepared, micro_batch, index, dp_size, workers) for index in range(dp_size)]
        for step in (11, 2, 3, 4, 5, 6):
            found: dict[int, tuple[int, ...]] = {}
            for feed in feeds:
                for rows in feed.step(step):
                    found |= dict(zip(rows.slots, map(tuple, rows.batch["tokens"].tolist()), strict=True))
            assert [found[slot] for slot in range(ROWS)] == expected[step]
        for feed in feeds:
            feed.close()


@pytest.mark.parametrize("layout", [{"tp": 2, "sp": True}, {"dp": 3}, {"pp": 2}, {"tp": 3, "sp": True}], ids=str)
def test_layouts_have_the_same_gradients(tune: Any, layout: dict[str, Any]) -> None:
    """Dropout of attention included, though a layout may need longer rows than another."""
    expected = loss_and_gradients(tune(), single_rank(), step=1)
    world = int(np.prod([size for name, size in layout.items() if name != "sp"]))
    axes = [f"parallel.{axis}={str(size).lower()}" for axis, size in layout.items() if axis != "dp"]
    prepared = tune(*axes, "train.micro_batch=2", world_size=world)
    pipeline = prepared.pipeline if "pp" in layout else None

    def rank(parallel: Any) -> Any:
        return loss_and_gradients(prepared, parallel, step=1, pipeline=pipeline)

    for found in run_simulated(rank, **layout):
        assert_parity(found, expected, rtol=1e-9, label=str(layout))


def test_a_killed_run_sees_the_same_records_again(tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Trainer.train_step

    def killed(self: Trainer, info: Any, step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return before(self, info, step)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        Trainer(tune(f"run.dir={tmp_path / 'killed'}"), single_rank()).run()
    monkeypatch.setattr(Trainer, "train_step", before)
    told = []
    for name in ("killed", "whole"):
        Trainer(tune(f"run.dir={tmp_path / name}"), single_rank()).run()
        records = [record for record in jsonl.read(tmp_path / name / "metrics.jsonl") if "loss" in record]
        told.append([(record["step"], record["loss"], record["tokens"]) for record in records])
    assert told[0] == told[1]
    assert len(told[0]) == 4


def test_the_unit_of_lengths() -> None:
    layouts = ((1, False), (3, False), (2, True), (3, True))
    assert [row_unit(tp, sp, "cuda") for tp, sp in layouts] == [8, 8, 8, 24]
    assert [row_unit(tp, sp, "cpu") for tp, sp in layouts] == [1, 1, 2, 3]
