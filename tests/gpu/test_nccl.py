"""One GPU exercises NCCL: groups of one that communicate give what the CPU gives without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.testing.runs import TEMPLATE, make_store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def train(folder: Path, data: Path, objective: str, architecture: str, *settings: str, **variables: str) -> list[Any]:
    """Metrics of a run through torchrun with one rank."""
    folder.mkdir()
    config = folder / "run.toml"
    config.write_text(
        TEMPLATE.format(run=folder / "run", architecture=architecture, data=data, objective=objective)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "megalm.launch"]
    ended = subprocess.run(
        [*command, str(config), "--set", "model.dropout=0.1", "sample.tokens=0", *settings],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("objective", "architecture"), [("causal_lm", "gpt2"), ("mlm+nsp", "bert")])
@pytest.mark.parametrize("sp", ["false", "true"])
def test_a_run_with_groups_of_one(tmp_path: Path, objective: str, architecture: str, sp: str) -> None:
    data = make_store(tmp_path)
    on_cpu = train(tmp_path / "cpu", data, objective, architecture, 'launch.device="cpu"')
    on_gpu = train(
        tmp_path / "gpu",
        data,
        objective,
        architecture,
        'launch.device="cuda"',
        f"parallel.sp={sp}",
        MEGALM_NO_SHORT_CIRCUIT="1",
    )
    assert len(on_cpu) == len(on_gpu) > 4
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        for key in ("loss", "grad_norm"):
            if key in cpu:
                assert gpu[key] == pytest.approx(cpu[key], rel=1e-7)
