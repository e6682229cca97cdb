"""A run whose launcher is killed goes on as if nothing had happened (tests/dist/test_kills.py kills ranks)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .result import Result

pytestmark = pytest.mark.dist
COMMON = ["train.steps=9", "checkpoint.every=2", "model.dropout=0.2", "eval.every=3"]
LAYOUT = ["parallel.tp=2", "parallel.sp=true", "model.attention_dropout=0.1", "train.micro_batch=4"]


def test_killed_under_torchrun(write_config: Any, fork: Any, torchrun: Any, tmp_path: Path) -> None:
    """Only torchrun is killed, after the first checkpoint: its ranks must not train on without it."""
    arguments = [str(write_config()), "--set", *COMMON, *LAYOUT, "train.steps=20"]
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
