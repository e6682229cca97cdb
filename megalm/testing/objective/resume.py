"""A run that stops and goes on ends with the same bits as one that never stopped."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

from megalm.checkpoint.folders import complete_checkpoints, folder_name
from megalm.metrics import jsonl
from megalm.metrics.summary import read_summary
from megalm.parallel.mesh import single_rank
from megalm.testing.check import CheckFailed
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.train.run_folder import CHECKPOINTS, METRICS
from megalm.train.trainer import Trainer

STEPS, STOP = 4, 2
TIMED = ("tokens_per_second", "seconds")


def resumes_exactly(subject: ObjectiveSubject) -> str:
    """Stopped after some steps and resumed by a new instance, a run ends with the same weights and metrics."""
    whole, resumed = _home(subject, "whole"), _home(subject, "resumed")
    expected = _train(subject, whole)
    shutil.copytree(whole / "run", resumed / "run", dirs_exist_ok=True)
    shutil.rmtree(resumed / "run" / CHECKPOINTS / folder_name(STEPS))
    (resumed / "run" / "summary.json").unlink()
    found = _train(subject, resumed)
    for what, a, b in zip(("metrics", "weights"), found, expected, strict=True):
        if a != b:
            raise CheckFailed(
                f"objective {subject.name}: resumed after step {STOP} of {STEPS}, the run ends with other {what}. An "
                "objective may keep nothing from one step to the next: rows are addressed by their numbers, and "
                "everything else comes from the model"
            )
    return f"{STEPS} steps, stopped after {STOP}"


def _home(subject: ObjectiveSubject, name: str) -> Path:
    folder = subject.folder / f"resume-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _train(subject: ObjectiveSubject, home: Path) -> tuple[list[Any], str]:
    """Metrics of every step and evaluation, and the hash of the weights, of a run in ``home`` taken to its end."""
    prepared = subject.prepared(
        f"train.steps={STEPS}", f"checkpoint.every={STOP}", "sample.tokens=0", f"eval.every={STOP}", folder=home
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Trainer(prepared, single_rank(subject.device)).run()
    records = [{k: v for k, v in record.items() if k not in TIMED} for record in jsonl.read(home / "run" / METRICS)]
    newest = complete_checkpoints(home / "run" / CHECKPOINTS)[0]
    assert newest.name == folder_name(STEPS)
    return records, str(read_summary(home / "run")["weights_sha256"])
