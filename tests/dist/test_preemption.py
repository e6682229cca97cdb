"""SIGTERM: a run saves after the step that it is in, ends within the deadline, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.folders import complete_checkpoints, open_whole
from megalm.errors import Preempted

pytestmark = pytest.mark.dist
STEPS = 12
SETTINGS = [f"train.steps={STEPS}", "eval.every=1", "model.dropout=0.2", "checkpoint.every=10"]


def result(run: Path) -> tuple[str, list[dict[str, Any]]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_second", None)
    return json.loads((run / "summary.json").read_text())["weights_sha256"], records


def begun(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("settings", [["parallel.tp=2"], ["parallel.dp=2", "checkpoint.async_save=true"]], ids=str)
def test_a_run_that_is_asked_to_end(
    fork: Any, write_config: Any, tmp_path: Path, campaign_seed: int, settings: list[str]
) -> None:
    draw = random.Random(f"{campaign_seed} SIGTERM {settings}")
    arguments = [write_config(), "--set", *SETTINGS, *settings]
    whole = tmp_path / "whole"
    whole.mkdir()
    assert [rank.code for rank in fork(arguments, cwd=whole).wait()] == [0, 0]
    launch = fork(arguments, cwd=tmp_path)
    while not begun(tmp_path / "run"):
        assert not launch.poll(), launch.ended()
        time.sleep(0.002)
    for rank in draw.choice([[0], [1], [0, 1]]):
        os.kill(launch.pids[rank], signal.SIGTERM)
    ended = launch.wait()
    assert [rank.code for rank in ended] == [Preempted.STATUS] * 2, ended
    folder = complete_checkpoints(tmp_path / "run/checkpoints")[0]
    step = open_whole(folder).step
    assert step < STEPS
    assert f"stopped after step {step}: SIGTERM" in ended[0].out
    assert ended[1].out == ended[0].err == ended[1].err == ""
    ended = fork(arguments, cwd=tmp_path).wait()
    assert [rank.code for rank in ended] == [0, 0], ended
    assert f"after step {step} of {STEPS}" in ended[0].out
    assert result(tmp_path / "run") == result(whole / "run")


def test_the_deadline(fork: Any, write_config: Any, point_type: Any, tmp_path: Path) -> None:
    """A rank whose disk hangs: nothing is saved, everybody ends, and the message says where the run stands."""
    deadline = "checkpoint.preemption_deadline=0.5"
    arguments = [write_config(), "--set", *SETTINGS, "parallel.tp=2", "checkpoint.every=0", deadline]
    hangs = point_type(1, "call os.write", "weights-00001")
    launch = fork(arguments, cwd=tmp_path, point=hangs)
    while not begun(tmp_path / "run"):
        assert not launch.poll(), launch.ended()
        time.sleep(0.002)
    for pid in launch.pids:
        os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    ended = launch.wait()
    assert time.monotonic() - began < 15
    assert Preempted.STATUS in [rank.code for rank in ended]
    assert all(rank.code for rank in ended)
    said = ended[0].err + ended[1].err
    assert "SIGTERM, and 0.5 s later no checkpoint is complete; the run has none" in said
    assert not complete_checkpoints(tmp_path / "run/checkpoints")
    assert [rank.code for rank in fork(arguments, cwd=tmp_path).wait()] == [0, 0]
