"""Killed at any moment and run again, a run ends as if nothing had happened.

Ranks are killed with SIGKILL at random moments, all at once or one of them (the others must then end by themselves),
and the same command is run again, over and over, until the run is complete.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.dist
COMMON = ["train.steps=9", "checkpoint.every=2", "model.dropout=0.2", "eval.every=3"]
LAYOUTS = {
    "tp2+sp": ["parallel.tp=2", "parallel.sp=true", "model.attention_dropout=0.1", "train.micro_batch=4"],
    "dp2 accumulating": ["parallel.dp=2", "train.micro_batch=2"],
    "pp2 zb-v": ["parallel.pp=2", "parallel.pp_schedule=zb-v", "model.layers=4", "train.micro_batch=2"],
    "bfloat16": ["parallel.tp=2", "train.precision=bfloat16"],
}


@dataclass
class Result:
    """What must not depend on interruptions."""

    sha256: str
    records: list[dict[str, Any]]
    eval_loss: float

    @classmethod
    def read(cls, run: Path) -> Result:
        summary = json.loads((run / "summary.json").read_text())
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            record.pop("tokens_per_second", None)
        return cls(summary["weights_sha256"], records, summary["eval_loss"])


@dataclass
class Uninterrupted:
    arguments: list[str]
    result: Result
    seconds: float


@pytest.fixture(params=LAYOUTS)
def uninterrupted(request: pytest.FixtureRequest, fork: Any, write_config: Any, tmp_path: Path) -> Uninterrupted:
    arguments = [str(write_config()), "--set", *COMMON, *LAYOUTS[request.param]]
    started = time.monotonic()
    ended = fork(arguments, cwd=tmp_path).wait()
    seconds = time.monotonic() - started
    assert [rank.code for rank in ended] == [0, 0], ended
    result = Result.read(tmp_path / "run")
    assert [r["step"] for r in result.records if "loss" in r] == list(range(1, 10))
    assert [r["step"] for r in result.records if "eval" in r] == [3, 6, 9]
    return Uninterrupted(arguments, result, seconds)


def test_killed_and_run_again(
    uninterrupted: Uninterrupted, fork: Any, tmp_path: Path, campaign_seed: int, full: bool
) -> None:
    draw = random.Random(f"{campaign_seed} kills")
    kills, runs, history = 0, 0, []
    wanted = 60 if full else 4
    while kills < wanted:
        folder = tmp_path / f"again-{runs}"
        folder.mkdir()
        runs += 1
        complete = False
        while not complete:
            launch = fork(uninterrupted.arguments, cwd=folder)
            until = time.monotonic() + draw.uniform(0.05, 1.0) * uninterrupted.seconds
            while kills < wanted and not launch.poll() and time.monotonic() < until:
                time.sleep(0.002)
            if kills < wanted and not launch.poll():
                # Before the process group exists, a launcher ends the others; nobody does so here.
                victims = draw.choice([None, [0], [1]]) if launch.said() else None
                launch.kill(victims)
                ended = launch.wait(after_first=10)
                kills += any(rank.code == -signal.SIGKILL for rank in ended)
                history.append(victims)
                for rank in ended:
                    assert rank.code in (0, 1, -signal.SIGKILL), (campaign_seed, history, ended)
                complete = all(rank.code == 0 for rank in ended)
            else:
                ended = launch.wait()
                assert [rank.code for rank in ended] == [0, 0], (campaign_seed, history, ended)
                complete = True
        label = f"seed {campaign_seed}, kills {history}"
        found = Result.read(folder / "run")
        assert found.sha256 == uninterrupted.result.sha256, label
        assert found.records == uninterrupted.result.records, label
        assert found.eval_loss == uninterrupted.result.eval_loss, label
        assert not list((folder / "run").rglob("*.tmp")), label


def test_killed_under_torchrun(write_config: Any, fork: Any, torchrun: Any, tmp_path: Path) -> None:
    """Only torchrun is killed, after the first checkpoint: its ranks must not train on without it."""
    arguments = [str(write_config()), "--set", *COMMON, *LAYOUTS["tp2+sp"], "train.steps=20"]
    reference = tmp_path / "reference"
    reference.mkdir()
    assert [rank.code for rank in fork(arguments, cwd=reference).wait()] == [0, 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, "-m", "megalm.launch", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 90
        checkpoints = tmp_path / "run/checkpoints"
        while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(ranks) >= 2
        process.kill()
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    assert not (tmp_path / "run/summary.json").exists()
    done = torchrun(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step  1/20" not in done.stdout
    found, expected = Result.read(tmp_path / "run"), Result.read(reference / "run")
    assert found == expected
