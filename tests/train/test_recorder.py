"""Steps of real pipelines are recorded, now and then, and are the same steps as without."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import megalm.train.recorder as recorder_module
from megalm import files
from megalm.errors import DataError
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.dependencies import Places
from megalm.pipeline.recorded import NAME, Recorded
from megalm.testing.processes import run_processes
from megalm.train.outcome import make_report
from megalm.train.prepare import Prepared
from megalm.train.recorder import PipelineRecorder
from megalm.train.trainer import Trainer

LAYOUTS = {
    "pp2 zb-v": (["parallel.pp=2", "parallel.pp_schedule=zb-v", "model.layers=5"], {"pp": 2}),
    "pp3 1f1b": (["parallel.pp=3", "model.layers=5"], {"pp": 3}),
    "pp2 dp2 tp2": (["parallel.pp=2", "parallel.tp=2", "parallel.pp_schedule=zb-h1"], {"pp": 2, "dp": 2, "tp": 2}),
}
QUICK = ["sample.tokens=0", "train.micro_batch=1", "eval.samples=4"]


def train(prepared: Prepared, layout: dict[str, int], run: Any = run_simulated) -> None:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        Trainer(prepared, parallel).run()
        return {}

    run(rank, **layout)


def world(layout: dict[str, int]) -> int:
    return layout["pp"] * layout.get("dp", 1) * layout.get("tp", 1)


def check(found: Recorded | None, prepared: Prepared, step: int) -> None:
    """It is the run's own order, and nothing runs before what it needs, nor two things at once."""
    assert found is not None
    assert found.step == step
    assert found.order == prepared.pipeline.order
    assert found.schedule == prepared.pipeline.name
    places, ends = Places(found.order), {r.action: r.end for r in found.measured.records}
    for rank in range(found.measured.ranks):
        now = 0.0
        for record in found.measured.of(rank):
            assert now <= record.start < record.end
            now = record.end
            for other in places.waits(record.action):
                needed = ends[found.order.ranks[other.rank][other.at]]
                assert needed <= record.start + (found.clock_error if other.rank != rank else 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_recorded_in_simulated_groups(prepare: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, layout = LAYOUTS[name]
    prepared = prepare("causal_lm", *overrides, *QUICK, world_size=world(layout))
    written, write = [], Recorded.write
    monkeypatch.setattr(Recorded, "write", lambda self, folder: [written.append(folder), write(self, folder)])
    train(prepared, layout)
    assert written == [prepared.run_dir], "one rank writes"
    check(Recorded.read(prepared.run_dir), prepared, 3)
    page = (prepared.run_dir / "report.html").read_text()
    shape = f"P={layout['pp']}, M={prepared.pipeline.order.microbatches}"
    assert f"{prepared.pipeline.name}: {shape}" in page
    assert page.count("idle/makespan") == page.count("(longest span - work)/span") == 2
    assert page.index(">planned") < page.index(">measured")


def test_a_record_that_cannot_be_written_ends_no_run(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full just then: the record of an earlier launch stays, and the user is told."""
    overrides, layout = LAYOUTS["pp3 1f1b"]
    prepared = prepare("causal_lm", *overrides, *QUICK, world_size=3)
    write_text = files.write_text

    def full(path: Path, text: str) -> None:
        if path.name == NAME:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_text(path, text)

    monkeypatch.setattr(files, "write_text", full)
    train(prepared, layout)
    assert not (prepared.run_dir / NAME).exists()
    summary = json.loads((prepared.run_dir / "summary.json").read_text())
    assert summary["steps"] == prepared.resolved.config.train.steps
    assert summary["warnings"] == [f"step 3 is not recorded: {prepared.run_dir / NAME}: No space left on device"]
    assert "No space left on device" in (prepared.run_dir / "report.html").read_text()


@pytest.mark.dist
def test_a_step_is_recorded_on_real_ranks(prepare: Any) -> None:
    overrides, layout = LAYOUTS["pp3 1f1b"]
    prepared = prepare("causal_lm", *overrides, *QUICK, world_size=3)
    train(prepared, layout, run_processes)
    check(Recorded.read(prepared.run_dir), prepared, 3)


@pytest.mark.dist
def test_ranks_whose_clocks_differ(prepare: Any) -> None:
    overrides, layout = LAYOUTS["pp3 1f1b"]
    prepared = prepare("causal_lm", *overrides, *QUICK, world_size=3)

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        honest, shift = time.perf_counter, (0.0, 3600.0, -5.0)[parallel.rank]
        time.perf_counter = lambda: honest() + shift
        try:
            Trainer(prepared, parallel).run()
        finally:
            time.perf_counter = honest
        return {}

    run_processes(rank, **layout)
    found = Recorded.read(prepared.run_dir)
    check(found, prepared, 3)
    assert found is not None
    assert found.measured.makespan < 5


def outcome(prepared: Prepared) -> tuple[str, list[dict[str, Any]]]:
    lines = (prepared.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("tokens_per_second", None)
    return json.loads((prepared.run_dir / "summary.json").read_text())["weights_sha256"], records


@pytest.mark.dist
@pytest.mark.parametrize("run", [run_simulated, run_processes], ids=["simulated", "gloo"])
def test_recording_changes_no_bit(prepare: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, layout = LAYOUTS["pp2 zb-v"]
    settings = ("causal_lm", *overrides, *QUICK, "model.dropout=0.2", "train.precision=float32")
    found = []
    for name, due in (("with", lambda *_: True), ("without", lambda *_: False)):
        monkeypatch.setattr(PipelineRecorder, "_due", due)
        prepared = prepare(*settings, f'run.dir="{tmp_path / name}"', world_size=2)
        train(prepared, layout, run)
        assert (prepared.run_dir / "pipeline.json").exists() == (name == "with")
        found.append(outcome(prepared))
    assert found[0] == found[1]


def due(prepared: Prepared, parallel: ParallelContext, done: int, total: int) -> list[int]:
    recorder = PipelineRecorder(prepared.pipeline, parallel, prepared.run_dir, pytest.fail)
    recorder.start(done, total)
    steps = []
    for step in range(done + 1, total + 1):
        recorder.begin(step)
        if recorder._watch is not None:
            steps.append(step)
    return steps


def test_which_steps(prepare: Any) -> None:
    prepared = prepare("causal_lm", "parallel.pp=2", world_size=2)

    def rank(parallel: ParallelContext) -> list[list[int]]:
        cases = ((0, 1500), (0, 2), (0, 1), (500, 1500), (7, 8), (0, 3), (0, 4))
        return [due(prepared, parallel, done, total) for done, total in cases]

    for found in run_simulated(rank, pp=2):
        assert found == [[3, 10, 100, 1000], [2], [1], [503, 510, 600, 1500], [8], [3], [3]]
    assert due(prepared, single_rank(), 0, 100) == []


def test_one_rank_records_nothing(prepare: Any) -> None:
    prepared = prepare("causal_lm", *QUICK)
    Trainer(prepared, single_rank()).run()
    assert not (prepared.run_dir / "pipeline.json").exists()
    assert ">planned" not in (prepared.run_dir / "report.html").read_text()


def test_a_resumed_run_keeps_its_record(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, layout = LAYOUTS["pp2 zb-v"]
    settings = ("causal_lm", *overrides, *QUICK, "checkpoint.every=2", "train.steps=6")
    prepared = prepare(*settings, world_size=2)
    monkeypatch.setattr(recorder_module, "compare_clocks", fail := Failing(after=2))
    with pytest.raises(Exception, match="pulled the plug"):
        train(prepared, layout)
    assert not (prepared.run_dir / "pipeline.json").exists()
    fail.after = 10**9
    train(prepare(*settings, world_size=2), layout)
    check(Recorded.read(prepared.run_dir), prepared, 5)  # the third after the checkpoint of step 2
    # Nothing is left to do: the record and the report of it stay.
    (prepared.run_dir / "report.html").unlink()
    train(prepare(*settings, world_size=2), layout)
    check(Recorded.read(prepared.run_dir), prepared, 5)
    assert "step 5" in (prepared.run_dir / "report.html").read_text()


class Failing:
    """compare_clocks, which at some call ends the run instead."""

    def __init__(self, after: int) -> None:
        self.after, self.real = after, recorder_module.compare_clocks

    def __call__(self, *arguments: Any) -> Any:
        self.after -= 1
        if self.after <= 0:
            raise RuntimeError("pulled the plug")
        return self.real(*arguments)


def test_a_damaged_record_is_told_by_the_report(tmp_path: Path) -> None:
    make_report(tmp_path)
    (tmp_path / "pipeline.json").write_text("{}")
    with pytest.raises(DataError, match=r"pipeline\.json: not a record of a pipeline"):
        make_report(tmp_path)
